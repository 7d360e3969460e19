"""Read CSV, TSV and JSON files as rows, each with the line on which it begins.

A file is read twice. The first pass checks every row and finds the types of the columns. The second
pass converts the rows. Caller: `zods.tasks.sources`.
"""

from __future__ import annotations

import csv
import gzip
import json
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from zods.tasks.column_types import (
    NULL,
    TEXT,
    cell_value,
    json_value,
    merged,
    type_of_cell,
    type_of_value,
    without_null,
)
from zods.tasks.mistakes import Mistakes, listed

csv.field_size_limit(sys.maxsize)

ROW = "__row__"  # column with the row's number in its source
# Column that names the text columns in which the row's value is no text
NOT_TEXT = "__not_text__"
RESERVED = (ROW, NOT_TEXT)
DEEPEST = 100
TOO_DEEP = f"JSON lists or objects inside each other, more than {DEEPEST} deep"


@dataclass(frozen=True)
class Table:
    """A checked file.

    Attributes:
        types: {column: type}, in order.
        rows: starts to read the file again. It yields (line, values in the order of the columns,
            names of the text columns that hold another JSON value in this row).
        note: one line on how the file was understood; empty where there was no choice.
    """

    types: dict[str, pa.DataType]
    rows: Callable[[], Iterator[tuple[int, list[Any], list[str]]]]
    note: str = ""


def read_table(path: Path, extension: str, column_names: Sequence[str] | None) -> Table:
    """Check a .csv, .tsv, .json or .jsonl file (also .gz).

    Raises:
        ValueError: with all mistakes, by line.
    """
    if extension in (".csv", ".tsv"):
        return _read_delimited(path, "," if extension == ".csv" else "\t", column_names)
    return _read_json(path, extension)


# --- text -----------------------------------------------------------------------------------------


def _open_binary(path: Path) -> BinaryIO:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rb")


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, with their line ends.

    Raises ValueError where the file is not UTF-8, or is a damaged .gz.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file, start=1):
                if "\0" in line:
                    raise ValueError(
                        _with_iconv(
                            path, f"line {number} has a zero byte, as UTF-16 has", "utf-16le"
                        )
                    )
                yield line
    except UnicodeDecodeError:
        raise ValueError(_undecodable(path)) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated: {error}") from None


def _undecodable(path: Path) -> str:
    with _open_binary(path) as file:
        start = file.read(2)
        if start in (b"\xff\xfe", b"\xfe\xff"):
            return _with_iconv(path, "begins with the byte order mark of UTF-16", "utf-16")
        file.seek(0)
        lines, byte = [], 0
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = byte or line[error.start]
                lines.append(number)
    found = (
        f"line {listed(lines)}: not UTF-8 text (the first such byte is 0x{byte:02x}, in line "
        f"{lines[0]})"
    )
    return _with_iconv(path, found, "latin1")


def _with_iconv(path: Path, found: str, encoding: str) -> str:
    name = shlex.quote(str(path))
    command = f"zcat {name} | iconv -f {encoding} -t utf-8" if path.suffix == ".gz" else (
        f"iconv -f {encoding} -t utf-8 {name}"
    )  # fmt: skip
    return f"{path}, {found}. Convert it: {command} > NEW (where its encoding is {encoding})"


# --- CSV and TSV ----------------------------------------------------------------------------------


class _Record(NamedTuple):
    """One record of a file.

    quoted: whether the record begins with a quote. problem: the reason why the record cannot be
    split into fields. keeps_quote: whether a field begins with a quote that is a character of the
    text.
    """

    line: int
    fields: list[str]
    quoted: bool
    problem: str = ""
    keeps_quote: bool = False


class _Reading(NamedTuple):
    """One way to split a file into records, and its results.

    sizes: {number of fields: lines of the records with this number}, without the header. kept:
    lines that keep a quote.
    """

    records: Callable[[], Iterator[_Record]]
    header: _Record | None
    sizes: dict[int, list[int]]
    problems: dict[str, list[int]]
    kept: list[int]

    def num_bad(self, width: int) -> int:
        return sum(map(len, self.problems.values())) + sum(
            len(lines) for size, lines in self.sizes.items() if size != width
        )


def _read_delimited(path: Path, delimiter: str, column_names: Sequence[str] | None) -> Table:
    """Check a CSV or TSV file.

    A CSV file has quotes as in RFC 4180. In a TSV file a field is unquoted where it is quoted as a
    whole, and any other quote is a character. Quoted tabs and line ends of a TSV file are read only
    where the file has the right number of fields with them and not without them. A blank line is no
    row.
    """
    reading = _scan(lambda: _csv_records(path, delimiter), column_names is None)
    if delimiter == "\t":
        plain = _scan(lambda: _plain_records(path), column_names is None)
        width = (
            len(column_names)
            if column_names is not None
            else len(plain.header.fields)
            if plain.header
            else 0
        )
        if width > 1 and plain.num_bad(width) <= reading.num_bad(width):
            reading = plain
    if column_names is None and reading.header is None:
        raise ValueError(f"{path} holds no examples")
    names = reading.header.fields if reading.header is not None else list(column_names or ())
    has_row_names = reading.header is not None and _has_row_names(reading)
    _check_fields(path, reading, names, len(names) + has_row_names, delimiter)
    if reading.header is not None:
        names = _header_names(path, reading.header)
    skipped = int(has_row_names)
    types = dict.fromkeys(names, NULL)
    for record in _rows_of(reading):
        for name, cell in zip(names, record.fields[skipped:], strict=True):
            if types[name] != TEXT:
                types[name] = type_of_cell(cell, types[name])
    types = {name: without_null(dtype) for name, dtype in types.items()}

    def rows() -> Iterator[tuple[int, list[Any], list[str]]]:
        for record in _rows_of(reading):
            cells = zip(record.fields[skipped:], types.values(), strict=True)
            yield record.line, [cell_value(cell, dtype) for cell, dtype in cells], []

    notes = []
    if reading.kept:
        notes.append(
            f"line {listed(reading.kept)}: a quote that does not belong to a pair around a whole "
            "field is a character of the text"
        )
    if has_row_names:
        notes.append(
            "the first field of each row, without a name in the header, is a row name and is left "
            "out"
        )
    return Table(types, rows, "; ".join(notes))


def _scan(records: Callable[[], Iterator[_Record]], has_header: bool) -> _Reading:
    header: _Record | None = None
    sizes: dict[int, list[int]] = {}
    problems: dict[str, list[int]] = {}
    kept: list[int] = []
    for record in records():
        if record.problem:
            problems.setdefault(record.problem, []).append(record.line)
        elif has_header and header is None:
            header = record
        else:
            sizes.setdefault(len(record.fields), []).append(record.line)
            if record.keeps_quote:
                kept.append(record.line)
    return _Reading(records, header, sizes, problems, kept)


def _rows_of(reading: _Reading) -> Iterator[_Record]:
    records = reading.records()
    if reading.header is not None:
        next(records)
    return records


class _RecordStarts:
    """An iterator over lines that remembers the first character of a record.

    It keeps the first character of the first line since `character` was last cleared.
    """

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.character = ""

    def __iter__(self) -> _RecordStarts:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.character = self.character or line[:1]
        return line


def _csv_records(path: Path, delimiter: str) -> Iterator[_Record]:
    starts = _RecordStarts(_lines(path))
    reader = csv.reader(starts, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        starts.character = ""
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                problem = "a field begins with a quote that is never closed"
            else:
                problem = (
                    "a quoted field goes on after its closing quote (a quote inside it is written "
                    "twice)"
                )
            yield _Record(line, [], False, problem)
            continue
        if fields:
            yield _Record(line, fields, starts.character == '"')


def _plain_records(path: Path) -> Iterator[_Record]:
    """Yield each line of a TSV file as one record."""
    for number, line in enumerate(_lines(path), start=1):
        if line := line.rstrip("\r\n"):
            cells = line.split("\t")
            keeps_quote = any(cell.startswith('"') and not _is_quoted(cell) for cell in cells)
            fields = [cell[1:-1].replace('""', '"') if _is_quoted(cell) else cell for cell in cells]
            yield _Record(number, fields, line.startswith('"'), keeps_quote=keeps_quote)


def _is_quoted(field: str) -> bool:
    """Whether a field is quoted as a whole, with the quotes inside it written twice."""
    return (
        len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', "")
    )


def _has_row_names(reading: _Reading) -> bool:
    """Whether the file is one of R's write.table, whose row names have no name in the header.

    R quotes strings and row names. This distinguishes such a file from one whose texts hold
    unquoted delimiters. A last field that is blank in every row is no column: each row ends with a
    delimiter.
    """
    assert reading.header is not None
    if not reading.header.quoted or list(reading.sizes) != [len(reading.header.fields) + 1]:
        return False
    names = set()
    last_is_blank = True
    for record in _rows_of(reading):
        if not record.quoted or record.fields[0] in names:
            return False
        names.add(record.fields[0])
        last_is_blank = last_is_blank and not record.fields[-1].strip()
    return not last_is_blank


def _check_fields(
    path: Path, reading: _Reading, names: Sequence[str], width: int, delimiter: str
) -> None:
    mistakes = Mistakes()
    for problem, lines in reading.problems.items():
        for line in lines:
            mistakes.add(f"{path}, line", line, problem)
    for size, lines in reading.sizes.items():
        for line in lines if size != width else []:
            mistakes.add(f"{path}, line", line, f"{size} field{'s' * (size != 1)}")
    of = "in the header" if reading.header is not None else "in column_names"
    shown = {",": "a comma", "\t": "a tab"}[delimiter]
    mistakes.check(
        f"Each row needs {len(names)} fields, one for each name {of} ({', '.join(names)}). Quote "
        f"fields that hold {shown}, and remove {shown} at the end of a line"
    )
    if not reading.sizes:
        raise ValueError(f"{path} holds no examples")


def _header_names(path: Path, header: _Record) -> list[str]:
    names = [
        name if name.strip() else f"Unnamed: {index}" for index, name in enumerate(header.fields)
    ]
    reserved = [name for name in RESERVED if name in names]
    if reserved:
        raise ValueError(
            f"{path}, line {header.line}: the column name {reserved[0]} is reserved. Rename the "
            "column"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{path}, line {header.line}: the header names {twice[0]!r} twice. Give each column "
            "its own name"
        )
    return names


# --- JSON -----------------------------------------------------------------------------------------


def _read_json(path: Path, extension: str) -> Table:
    """Check a file of JSON lines, or of one list of objects.

    A file that is one object is refused. It may hold rows under a key, columns of lists, or rows by
    index, and these cannot be told apart for sure. Only a .jsonl file may have one object in one
    line.
    """
    first = next((line for line in _lines(path) if line.strip()), "")
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
        raise ValueError(f"{path} holds no examples")
    types = {name: without_null(dtype) for name, dtype in types.items()}

    def rows() -> Iterator[tuple[int, list[Any], list[str]]]:
        for line, row in read(path, Mistakes()):
            values = [json_value(row.get(name), dtype) for name, dtype in types.items()]
            given = [row.get(name) for name in types]
            odd = [
                name
                for name, value, (_, dtype) in zip(types, given, types.items(), strict=True)
                if dtype == TEXT and value is not None and not isinstance(value, str)
            ]
            yield line, values, odd

    return Table(types, rows)


def _json_lines(path: Path, mistakes: Mistakes) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            mistakes.add(
                f"{path}, line", number, f"malformed JSON: {error.msg} at column {error.colno}"
            )
            continue
        except RecursionError:
            mistakes.add(f"{path}, line", number, TOO_DEEP)
            continue
        if wrong := _unusable_row(row):
            mistakes.add(f"{path}, line", number, wrong)
        else:
            yield number, row


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

    The reason is a lone surrogate, or too deep a nesting.
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
    text = "".join(_lines(path))
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
    except RecursionError:
        mistakes.add(f"{path}, line", text.count("\n", 0, position) + 1, TOO_DEEP)


def _after_space(text: str, position: int) -> int:
    """The position of the next character that is no JSON white space."""
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _refuse_one_object(path: Path, extension: str, first: str) -> None:
    """Raise ValueError where the whole file is one JSON object."""
    try:
        json.loads(first)
        is_lines = extension == ".jsonl" or sum(1 for line in _lines(path) if line.strip()) > 1
    except json.JSONDecodeError:
        is_lines = False
    except RecursionError:
        return  # the mistake is reported when the rows are read
    if is_lines:
        return
    try:
        value = json.loads("".join(_lines(path)))
    except (json.JSONDecodeError, RecursionError):
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
