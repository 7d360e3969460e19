"""The interface of every task, and the steps that tasks share: check columns, map rows, pad."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import datasets
import pyarrow.compute
import torch
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from zods.data.columns import LENGTH
from zods.data.evaluation import SeveralForwards
from zods.tasks.row_mistakes import Mistakes
from zods.tasks.tables import NOT_TEXT, ROW

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Columns = dict[str, list[Any]]
TEXT_DTYPES = ("string", "large_string")
# A tokenizer takes about 200 bytes of memory per character, whatever it then truncates.
MOST_CHARACTERS = 1_000_000  # of a text
AT_ONCE = 1_000_000  # characters that are tokenised together, at least one row
TOKEN_COLUMNS = (
    "input_ids",
    "prompt",
    "words",
    "bare_prompt",
    "bare_words",
)  # columns of prepared rows that hold token ids


class Task(Protocol):
    """The interface of a task.

    A task makes batches of examples for one kind of model, and metrics of the model's outputs.
    """

    name: ClassVar[str]
    predicts_next_token: ClassVar[bool]  # True: the model must be causal

    def auto_class(self) -> type[Any]:
        """The transformers Auto class of the model."""

    def model_kwargs(self) -> dict[str, Any]:
        """The keyword arguments for `from_pretrained`, in addition to the model's name."""

    def mistakes(self, dataset: datasets.Dataset) -> Iterator[tuple[int, str]]:
        """Yield (position of a row, mistake) for every row whose text or label cannot be used.

        Raises:
            ValueError: a column is missing or of another type.
        """

    def prepare(
        self,
        dataset: datasets.Dataset,
        row_name: str = "row",
        beside: Mapping[str, Sequence[Any]] | None = None,
    ) -> datasets.Dataset:
        """Validate and tokenise: one row of lists of ints for each row of `dataset`, in order.

        A task may leave out rows that hold nothing to learn, such as an empty response; it says how
        many in one line.

        Ranks may prepare the same data at the same time. Each rank writes its own temporary file
        and renames it to a name that follows from data, task, tokenizer and code, so at worst the
        work is done twice. Where the caller lets one rank go first, the others read its result.

        Args:
            row_name: the text before a row's number in messages, e.g. "dev.csv, line". The numbers
                are in the column ROW; without that column they count from 0.
            beside: columns that are put beside the prepared ones, with a value for each row of
                `dataset`.

        Raises:
            ValueError: all rows would be left out; or a column, or the text or label of some rows, is
                not as the task needs it. The message names all these rows.
        """

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Collate prepared rows to a training batch.

        It has `input_ids` and `attention_mask` (B, L), and `labels`, right-padded.
        """

    def collate_eval(self, rows: Sequence[Row]) -> tuple[dict[str, Tensor] | SeveralForwards, Any]:
        """Collate prepared rows to (inputs of the model's forward, targets for `measure`).

        The inputs have no labels, so that forward computes no loss. A task that scores candidates
        or generates text returns a `SeveralForwards` in their place.
        """

    def measure(self, outputs: Any, inputs: Any, targets: Any) -> dict[str, tuple[float, float]]:
        """Compute {metric: (sum, count)} of an evaluation batch, with "loss" and "accuracy".

        The counts are numbers of examples.

        Args:
            outputs: the model's outputs, with `outputs["logits"]`, or the result of
                `SeveralForwards.run`.
            inputs, targets: from `collate_eval`, on the device of the logits.
        """


def check_text_columns(
    dataset: datasets.Dataset, columns: Sequence[str], others: Sequence[str] = ()
) -> None:
    """Raise ValueError, with all mistakes, where a column is missing or holds no text.

    columns: columns that must hold text. others: columns that must exist.
    """
    wrong = [
        f"column {column!r} must hold text; it holds {dataset.features[column]}"
        for column in dict.fromkeys(columns)
        if column in dataset.column_names
        and getattr(dataset.features[column], "dtype", None) not in TEXT_DTYPES
    ]
    missing = [
        column
        for column in dict.fromkeys([*columns, *others])
        if column not in dataset.column_names
    ]
    if missing:
        named = f"column{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}"
        given = ", ".join(name for name in dataset.column_names if name not in (ROW, NOT_TEXT))
        wrong.insert(0, f"the data has no {named}; its columns are {given}")
    if wrong:
        raise ValueError("; ".join(wrong))


def check_columns(dataset: datasets.Dataset, columns: Sequence[str]) -> None:
    """Raise ValueError where one of these columns is missing."""
    check_text_columns(dataset, (), columns)


def check_rows(task: Task, sources: Sequence[tuple[datasets.Dataset, str]]) -> None:
    """Raise ValueError with the mistakes of all rows of all sources.

    Args:
        sources: datasets, each with the text before its rows' numbers, e.g. "dev.csv, line".
    """
    mistakes, problems = Mistakes(), []
    for dataset, row_name in sources:
        numbers = row_numbers(dataset)
        try:
            for position, what in task.mistakes(dataset):
                mistakes.add(row_name, numbers[position], what)
        except ValueError as error:  # a mistake in the columns
            source = row_name.rpartition(",")[0]
            problems.append(f"{source}: {error}" if source else str(error))
    mistakes.check("Mend these rows or remove them", problems)


def row_numbers(dataset: datasets.Dataset) -> Sequence[int]:
    """The rows' numbers in their source, or from 0 where they are not known."""
    return (
        dataset.with_format("numpy")[ROW][:].tolist()
        if ROW in dataset.column_names
        else range(len(dataset))
    )


def text_mistakes(
    dataset: datasets.Dataset, columns: Sequence[str], *, may_be_empty: bool = False
) -> Iterator[tuple[int, str]]:
    """Yield (position, mistake) of each row where a text is missing or too long, or all texts are
    blank.

    One of several texts may be blank. may_be_empty: texts may be missing, and all be blank.
    """
    read = dataset.select_columns([*columns, *({NOT_TEXT} & set(dataset.column_names))])
    position = 0
    for batch in read.iter(batch_size=1000):
        odd = batch.get(NOT_TEXT, [""] * len(batch[columns[0]]))
        for texts, names in zip(
            zip(*(batch[column] for column in columns), strict=True), odd, strict=True
        ):
            not_text = [column for column in columns if names and column in names.split(", ")]
            if not_text:
                yield (
                    position,
                    f"column {not_text[0]!r} holds {texts[columns.index(not_text[0])][:40]}, which "
                    "is no text",
                )
            elif None in texts and not may_be_empty:
                yield position, f"no text in column {columns[texts.index(None)]!r}"
            elif max(lengths := [len(text or "") for text in texts]) > MOST_CHARACTERS:
                column, longest = max(
                    zip(columns, lengths, strict=True), key=lambda named: named[1]
                )
                yield (
                    position,
                    f"a text of {longest} characters in column {column!r}, at most "
                    f"{MOST_CHARACTERS} are tokenised",
                )
            elif not may_be_empty and not any(text.strip() for text in texts):
                yield position, f"blank text in {', '.join(map(repr, columns))}"
            position += 1


def map_rows(
    dataset: datasets.Dataset,
    make_rows: Callable[[Columns], Columns],
    max_length: int,
    row_name: str,
    beside: Mapping[str, Sequence[Any]] | None = None,
) -> datasets.Dataset:
    """Tokenise a dataset in batches of rows, and put the columns `beside` next to the result.

    `make_rows` also returns the column "truncated", which is counted and dropped, and may return
    "answer_cut", which is true where the end of an answer is cut. Where a row may
    turn out to be unusable, it also returns the column "unusable", which holds the reason or "".
    The column "skipped" is the same for rows that are counted and left out.

    Raises ValueError that names all unusable rows, or where all rows are left out.
    """
    prepared = dataset.map(
        _apply,
        batched=True,
        remove_columns=dataset.column_names,
        fn_kwargs={"make_rows": make_rows, "code": code_digest()},
    )
    if "unusable" in prepared.column_names:
        mistakes = Mistakes()
        for number, reason in zip(row_numbers(dataset), prepared["unusable"][:], strict=True):
            if reason:
                mistakes.add(row_name, number, reason)
        mistakes.check("Mend these rows or remove them")
        prepared = prepared.remove_columns("unusable")
    for name, values in (beside or {}).items():
        prepared = prepared.add_column(name, values)
    if "skipped" in prepared.column_names:
        prepared = _without_skipped(prepared, row_name)
    num_truncated = sum(prepared["truncated"])
    if num_truncated:
        cut = sum(prepared["answer_cut"]) if "answer_cut" in prepared.column_names else 0
        logger.warning(
            "%d of %d examples were cut to %d tokens%s",
            num_truncated,
            len(prepared),
            max_length,
            f", {cut} of them in the answer, whose end is not learned: raise max_length"
            * bool(cut),
        )
    return prepared.remove_columns(
        [name for name in ("truncated", "answer_cut") if name in prepared.column_names]
    )


def _without_skipped(prepared: datasets.Dataset, row_name: str) -> datasets.Dataset:
    """Leave out the rows with a reason in the column "skipped", and say how many."""
    reasons = prepared["skipped"][:]
    kept = [position for position, reason in enumerate(reasons) if not reason]
    if len(kept) < len(reasons):
        source = row_name.rpartition(",")[0]
        counts = Counter(filter(None, reasons)).most_common()
        message = (
            f"{source + ': ' if source else ''}{len(reasons) - len(kept)} of {len(reasons)} "
            f"examples {{}}: {'; '.join(f'{count} with {reason}' for reason, count in counts)}"
        )
        if not kept:
            raise ValueError(
                message.format("have nothing to learn") + ". Mend the data or raise max_length"
            )
        logger.warning(message.format("are left out"))
        prepared = prepared.select(kept)
    return prepared.remove_columns("skipped")


def make_rows(dataset: datasets.Dataset, of_batch: Callable[[Columns], Columns]) -> Columns:
    """Make the rows of a small dataset, with the columns that `map_rows` counts and drops."""
    return _apply(dataset[:], of_batch, "")


def _apply(batch: Columns, make_rows: Callable[[Columns], Columns], code: str) -> Columns:
    """Make the rows of a batch, in parts of at most AT_ONCE characters."""
    made: Columns = {}
    for part in _parts(batch):
        rows = {name: values[part] for name, values in batch.items()}
        for name, values in make_rows(rows).items():
            made.setdefault(name, []).extend(values)
    return made


def _parts(batch: Columns) -> Iterator[slice]:
    sizes = [sum(map(_num_characters, row)) for row in zip(*batch.values(), strict=True)]
    start, held = 0, 0
    for position, size in enumerate(sizes):
        if position > start and held + size > AT_ONCE:
            yield slice(start, position)
            start, held = position, 0
        held += size
    yield slice(start, len(sizes))


def _num_characters(value: Any) -> int:
    """Count the characters of a text, or of all texts in a list or an object."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_num_characters, inner))


def code_digest() -> str:
    """A digest of the code of this package.

    `datasets` identifies the functions of zods by name only. Without the digest it would reuse the
    results of an older version.
    """
    return Hasher.hash([path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))])


def with_lengths(prepared: datasets.Dataset) -> datasets.Dataset:
    """Add the column "length", the number of tokens of each prepared row in a training batch.

    Of a row with candidates it is that of the longest one.
    """
    if "input_ids" in prepared.column_names:
        lengths = [len(tokens) for tokens in prepared["input_ids"]]
    else:
        rows = zip(prepared["prompt"], prepared["words"], strict=True)
        lengths = [len(prompt) + max(map(len, words)) for prompt, words in rows]
    return prepared.add_column(LENGTH, lengths)


def pad_token_id(tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None = None) -> int:
    """Choose an id to pad with.

    This is the tokenizer's pad token, else its end-of-sequence token, else 0 (padding is masked).

    Args:
        num_embeddings: number of the model's embeddings, where it is known. Ids from this number
            on, of tokens added later, are skipped.

    Raises:
        ValueError: the tokenizer has neither token.
    """
    given = [
        token_id
        for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id)
        if token_id is not None
    ]
    if not given:
        raise ValueError(
            "the tokenizer has neither a pad token nor an eos token; set tokenizer.pad_token"
        )
    return next(
        (token_id for token_id in given if num_embeddings is None or token_id < num_embeddings), 0
    )


def check_token_ids(
    prepared: datasets.Dataset, num_embeddings: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ValueError where prepared rows hold a token that the model does not embed."""
    largest = -1
    for batch in prepared.with_format("arrow").iter(batch_size=1000):
        for name in set(TOKEN_COLUMNS) & set(batch.column_names):
            column = batch.column(name)
            while hasattr(column.type, "value_type"):
                column = pyarrow.compute.list_flatten(column)
            largest = max(largest, pyarrow.compute.max(column).as_py() or 0)
    if largest >= num_embeddings:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"the data hold the token {largest} ({token!r}), but the model embeds {num_embeddings} "
            f"tokens, and the tokenizer has {len(tokenizer)}. Give the model's own --tokenizer, or "
            "a model with resized embeddings."
        )


def pad_right(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Pad sequences with `value` on the right, to (B, L) int64; L is the longest length."""
    longest = max(map(len, sequences))
    return torch.tensor(
        [[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences]
    )


def pad_inputs(sequences: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Pad token sequences on the right.

    Returns `input_ids` and `attention_mask`, both (B, L) int64.
    """
    return {
        "input_ids": pad_right(sequences, pad_id),
        "attention_mask": pad_right([[1] * len(sequence) for sequence in sequences], 0),
    }
