"""Read JSON and JSON lines files as rows, each with the line on which it begins.

A file is read twice. The first pass checks every row and finds the types of the columns. The second
pass converts the rows. Caller: `zods.tasks.sources`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from zods.tasks.column_types import (
    NULL,
    becomes_text,
    json_value,
    merged,
    type_of_value,
    without_null,
)
from zods.tasks.row_mistakes import Mistakes
from zods.tasks.tables import RESERVED, Table
from zods.tasks.text_lines import read_lines

DEEPEST = 100  # allowed nesting of lists and objects
TOO_MANY_DIGITS = "a number of more digits than Python converts"
TOO_DEEP = f"JSON lists or objects inside each other, more than {DEEPEST} deep"


def read_json(path: Path, extension: str) -> Table:
    """Check a file of JSON lines, or of one list of objects.

    A file that is one object is refused. It may hold rows under a key, columns of lists, or rows by
    index, and these forms cannot be distinguished reliably. Only a .jsonl file may hold one object
    in one line.

    Raises ValueError with all mistakes, by line.
    """
    first = next((line for line in read_lines(path) if line.strip()), "")
    is_list = first.lstrip().startswith("[")
    if not is_list:
        _refuse_one_object(path, extension, first)
    read = _list_items if is_list else _json_lines
    types: dict[str, pa.DataType] = {}
    mistakes = Mistakes()
    num_rows = 0
    for _, row in read(path, mistakes):
        num_rows += 1
        for name, value in row.items():
            types[name] = merged(types.get(name, NULL), type_of_value(value))
    mistakes.check("Each row must be one JSON object of column: value")
    if not num_rows or not types:
        raise ValueError(f"{path} holds no examples. Give a file with at least one row")
    types = {name: without_null(dtype) for name, dtype in types.items()}

    def rows() -> Iterator[tuple[int, list[Any], list[str]]]:
        for line, row in read(path, Mistakes()):
            values = [json_value(row.get(name), dtype) for name, dtype in types.items()]
            given = [row.get(name) for name in types]
            odd = [
                name
                for value, (name, dtype) in zip(given, types.items(), strict=True)
                if becomes_text(value, dtype)
            ]
            yield line, values, odd

    return Table(types, rows)


def _json_lines(path: Path, mistakes: Mistakes) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = parse_line(line)
        except ValueError as error:
            mistakes.add(f"{path}, line", number, str(error))
        else:
            yield number, row


def parse_line(line: str) -> dict[str, Any]:
    """Parse a line of a JSON lines file. Raises ValueError with the reason where it is no row."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except ValueError:  # Python converts no text of more than 4300 digits
        raise ValueError(TOO_MANY_DIGITS) from None
    if wrong := _unusable_row(row):
        raise ValueError(wrong)
    return row


def _unusable_row(row: Any) -> str:
    """The reason why a JSON value cannot be a row; empty where it can."""
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}, not an object"
    for name, value in row.items():
        if name in RESERVED:
            return f"the column name {name} is reserved"
        if flaw := _flaw([name, value]):
            return f"column {name!a} holds {flaw}"
    return ""


def _flaw(value: Any, depth: int = 0) -> str:
    """The reason why a table cannot hold a JSON value; empty where it can.

    The reason is half of a surrogate pair, or a nesting that is too deep.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"half of a character, \\u{ord(value[error.start]):04x}, which is no text"
        return ""
    if depth > DEEPEST:
        return TOO_DEEP
    inner = (
        [*value, *value.values()]
        if isinstance(value, dict)
        else value
        if isinstance(value, list)
        else ()
    )
    return next(filter(None, (_flaw(item, depth + 1) for item in inner)), "")


def _list_items(path: Path, mistakes: Mistakes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON list, up to malformed JSON."""
    text = "".join(read_lines(path))
    decoder = json.JSONDecoder()
    position, line, counted = _after_space(text, text.index("[") + 1), 1, 0
    more = text[position : position + 1] != "]"
    try:
        while more:
            row, end = decoder.raw_decode(text, position)
            line, counted = line + text.count("\n", counted, position), position
            if wrong := _unusable_row(row):
                mistakes.add(f"{path}, line", line, wrong)
            else:
                yield line, row
            position = _after_space(text, end)
            more = text[position : position + 1] == ","
            if more:
                position = _after_space(text, position + 1)
        if text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        if _after_space(text, position + 1) != len(text):
            raise json.JSONDecodeError(
                "Extra data after the list", text, _after_space(text, position + 1)
            )
    except json.JSONDecodeError as error:
        mistakes.add(
            f"{path}, line", error.lineno, f"malformed JSON: {error.msg} at column {error.colno}"
        )
    except (RecursionError, ValueError) as error:
        what = TOO_DEEP if isinstance(error, RecursionError) else TOO_MANY_DIGITS
        mistakes.add(f"{path}, line", text.count("\n", 0, position) + 1, what)


def _after_space(text: str, position: int) -> int:
    """The position of the next character that is no JSON white space."""
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _refuse_one_object(path: Path, extension: str, first: str) -> None:
    """Raise ValueError where the whole file is one JSON object."""
    try:
        json.loads(first)
        is_lines = extension == ".jsonl" or sum(1 for line in read_lines(path) if line.strip()) > 1
    except json.JSONDecodeError:
        is_lines = False
    except (RecursionError, ValueError):
        return  # the mistake is reported when the rows are read
    if is_lines:
        return
    try:
        value = json.loads("".join(read_lines(path)))
    except (ValueError, RecursionError):
        return  # the file holds JSON lines, some of them malformed
    if isinstance(value, dict):
        keys = ", ".join(map(repr, list(value)[:5])) + (", ..." if len(value) > 5 else "")
        lists = [
            key
            for key, held in value.items()
            if held and isinstance(held, list) and isinstance(held[0], dict)
        ]
        way = f" Write the list under {lists[0]!r} to a file of its own." if len(lists) == 1 else ""
        raise ValueError(
            f"{path}: one JSON object with the keys {keys}; a list of rows is needed, "
            f'[{{"text": "...", "label": 0}}, ...], or one such object per line.{way}'
        )
