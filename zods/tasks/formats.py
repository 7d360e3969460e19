"""Formats of instruction and chat data: the columns that they have, and how a row is read.

`zods.tasks.build` finds the format of the training data by its columns. The tasks `Instruction`,
`Chat` and `PlainText` read their rows through it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets

from zods.tasks.tables import NOT_TEXT, ROW
from zods.tasks.task import MOST_CHARACTERS, Columns, Row, check_columns

Message = dict[str, str]  # the keys "role" and "content"

NO_RESPONSE = "an empty response"
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
TOOL_ROLES = ("tool", "function", "function_call", "observation")
TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
TURN_KEYS = (("role", "content"), ("from", "value"))


@dataclass(frozen=True)
class PairFormat:
    r"""A prompt and a response in columns of their own.

    The prompt is the column `prompt`. Where the column `more` is there and not empty in a row, a
    blank line and its text follow. Numbers are read as their texts (42 as "42"), and null as an
    empty text.

    Attributes:
        separator: the text between prompt and response.
    """

    name: str
    prompt: str
    response: str
    separator: str
    more: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that data of this format must have."""
        return self.prompt, self.response

    def used_columns(self, dataset: datasets.Dataset) -> tuple[str, ...]:
        """The columns that are read, of a dataset with the columns of this format."""
        has_more = self.more is not None and self.more in dataset.column_names
        return (self.prompt, self.more, self.response) if has_more else self.columns  # type: ignore[return-value]

    def mistakes(self, dataset: datasets.Dataset) -> Iterator[tuple[int, str]]:
        """Yield (position, mistake) of each row that cannot be read.

        A row with an empty response is no mistake. Raises ValueError for a missing column.
        """
        check_columns(dataset, self.columns)
        used = self.used_columns(dataset)
        for position, row in enumerate(_rows(dataset, used)):
            try:
                texts = {column: _text_in_column(row, column) for column in used}
            except ValueError as error:
                yield position, str(error)
                continue
            if not texts[self.prompt].strip() and not texts.get(self.more or "", "").strip():
                yield position, f"blank text in {self.prompt!r}"
            elif wrong := _too_long(sum(map(len, texts.values()))):
                yield position, wrong

    def texts(self, batch: Columns) -> Columns:
        """Read the columns "prompt" and "response" from rows without mistakes."""
        prompts = [text_of(value) for value in batch[self.prompt]]
        if self.more in batch:
            more = [text_of(value) for value in batch[self.more]]
            prompts = [
                "\n\n".join(text for text in pair if text.strip())
                for pair in zip(prompts, more, strict=True)
            ]
        return {"prompt": prompts, "response": [text_of(v) for v in batch[self.response]]}


@dataclass(frozen=True)
class ConversationFormat:
    """A list of turns in one column: {"role", "content"}, or {"from", "value"} as in ShareGPT."""

    name: str
    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that data of this format must have."""
        return (self.column,)

    def used_columns(self, dataset: datasets.Dataset) -> tuple[str, ...]:
        """The columns that are read, of a dataset with the columns of this format."""
        return self.columns

    def mistakes(self, dataset: datasets.Dataset) -> Iterator[tuple[int, str]]:
        """Yield (position, mistake) of each row that holds no conversation.

        Raises ValueError for a missing column.
        """
        check_columns(dataset, self.columns)
        for position, row in enumerate(_rows(dataset, self.columns)):
            try:
                messages = self.read(row)
            except ValueError as error:
                yield position, str(error)
                continue
            if wrong := _too_long(sum(len(message["content"]) for message in messages)):
                yield position, wrong

    def read(self, row: Row) -> list[Message]:
        """Read the conversation of a row, up to the assistant's last turn.

        System turns without content are dropped.

        Raises:
            ValueError: the reason why the row holds no conversation to learn from.
        """
        became_json = self.column in (row.get(NOT_TEXT) or "").split(", ")
        turns = _restored(row[self.column], became_json)
        if not isinstance(turns, list):
            raise ValueError(
                f"column {self.column!r} holds {_kind(turns)}, not a list of turns "
                '[{"role": ..., "content": ...}, ...]'
            )
        messages = [
            _message(_restored(turn, became_json), number, became_json)
            for number, turn in enumerate(turns, start=1)
        ]
        messages = [m for m in messages if m["content"].strip() or m["role"] != "system"]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise ValueError(f"no turn of the assistant in column {self.column!r}")
        if answers[0] == 0:
            raise ValueError(
                f"the conversation in column {self.column!r} begins with the assistant's turn; a "
                "turn of the user or the system must come before it"
            )
        return messages[: answers[-1] + 1]


@dataclass(frozen=True)
class TextFormat:
    """One text in a column."""

    name: ClassVar[str] = "text"
    column: ClassVar[str] = "text"
    columns: ClassVar[tuple[str, ...]] = ("text",)

    def used_columns(self, dataset: datasets.Dataset) -> tuple[str, ...]:
        """The columns that are read, of a dataset with the columns of this format."""
        return self.columns

    def mistakes(self, dataset: datasets.Dataset) -> Iterator[tuple[int, str]]:
        """Yield (position, mistake) of each row whose text cannot be read.

        Raises ValueError for a missing column.
        """
        check_columns(dataset, self.columns)
        for position, row in enumerate(_rows(dataset, self.columns)):
            try:
                wrong = _too_long(len(_text_in_column(row, self.column)))
            except ValueError as error:
                wrong = str(error)
            if wrong:
                yield position, wrong


DataFormat = PairFormat | ConversationFormat | TextFormat

# In the order in which they are looked for. Published Alpaca data also have a column `text`.
FORMATS: Mapping[str, DataFormat] = {
    known.name: known
    for known in (
        ConversationFormat("messages", "messages"),
        ConversationFormat("sharegpt", "conversations"),
        PairFormat("alpaca", "instruction", "output", "\n", more="input"),
        PairFormat("prompt_completion", "prompt", "completion", ""),
        TextFormat(),
    )
}


def find_format(dataset: datasets.Dataset, name: str | None) -> DataFormat:
    """The format with this name, or the first whose columns the dataset has.

    Raises:
        ValueError: an unknown name, a missing column of the named format, or columns that belong
            to no format.
    """
    if name is not None:
        if name not in FORMATS:
            raise ValueError(f"unknown data_format {name!r}; allowed are {', '.join(FORMATS)}")
        check_columns(dataset, FORMATS[name].columns)
        return FORMATS[name]
    for known in FORMATS.values():
        if set(known.columns) <= set(dataset.column_names):
            return known
    given = ", ".join(column for column in dataset.column_names if column not in (ROW, NOT_TEXT))
    needed = "; ".join(f"{n}: {', '.join(known.columns)}" for n, known in FORMATS.items())
    raise ValueError(
        f"the data has the columns {given}, which are those of no known format ({needed}). Name "
        "the columns by a template, or by prompt_column and response_column"
    )


def text_of(value: Any) -> str:
    """The text of a scalar: numbers as in JSON, whole ones without a decimal point; null is "".

    >>> [text_of(value) for value in ("a", 42, 42.0, 0.5, True, None)]
    ['a', '42', '42', '0.5', 'true', '']
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    # A column with 42 and 0.5 holds 42.0 and 0.5.
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return json.dumps(value)


def _rows(dataset: datasets.Dataset, columns: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a dataset with these columns, and NOT_TEXT where it is there."""
    return iter(dataset.select_columns([*columns, *({NOT_TEXT} & set(dataset.column_names))]))


def _text_in_column(row: Row, column: str) -> str:
    """The text of a row's value. Raises ValueError where the value is a list or an object."""
    value = _restored(row[column], column in (row.get(NOT_TEXT) or "").split(", "))
    if isinstance(value, (str, int, float, type(None))):
        return text_of(value)
    raise ValueError(f"column {column!r} holds {_kind(value)}, which is no text")


def _restored(value: Any, became_json: bool) -> Any:
    """Read a list or an object that became JSON text.

    This happens where other rows of a JSON file have a text in the same place.
    """
    if became_json and isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value  # a text of another place in the same row
    return value


def _message(turn: Any, number: int, became_json: bool) -> Message:
    """Read one turn, the `number`th from 1. Raises ValueError where it is not as it must be."""
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number} is {_kind(turn)}, not an object with role and content")
    named = [keys for keys in TURN_KEYS if turn.get(keys[0]) is not None]
    if not named:
        raise ValueError(
            f'turn {number} has no "role" (or "from"); its keys are {", ".join(turn) or "none"}'
        )
    role_key, content_key = named[0]
    role = turn[role_key]
    if role in TOOL_ROLES or any(turn.get(key) for key in TOOL_KEYS):
        raise ValueError(f"turn {number} is a call of a tool or its result, which cannot be used")
    if role not in ROLES:
        raise ValueError(f"turn {number} has the role {role!r}; allowed are {', '.join(ROLES)}")
    try:
        content = _content(_restored(turn.get(content_key), became_json))
    except ValueError as error:
        raise ValueError(f"turn {number}, {content_key!r}: {error}") from None
    if ROLES[role] == "user" and not content.strip():
        raise ValueError(f"turn {number} of the user has no text in {content_key!r}")
    return {"role": ROLES[role], "content": content}


def _content(value: Any) -> str:
    """The text of a turn: a scalar, or a list of parts {"type": "text", "text": ...}, joined."""
    if isinstance(value, (str, int, float, type(None))):
        return text_of(value)
    if not isinstance(value, list):
        raise ValueError(f"found {_kind(value)}, allowed are a text or a list of parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"found a part of type {kind!r}, allowed are parts of type 'text'")
    return "".join(part["text"] for part in value)


def _kind(value: Any) -> str:
    """The kind of a value, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _too_long(num_characters: int) -> str:
    """The reason why a row of this many characters cannot be used; empty where it can."""
    if num_characters <= MOST_CHARACTERS:
        return ""
    return f"{num_characters} characters, at most {MOST_CHARACTERS} are tokenised"
