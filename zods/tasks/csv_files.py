"""Read CSV and TSV files as rows, each with the line on which it begins.

A file is read twice. The first pass checks every row and finds the types of the columns. The second
pass converts the rows. Caller: `zods.tasks.sources`.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zods.tasks.column_types import NULL, TEXT, cell_value, type_of_cell, without_null
from zods.tasks.row_mistakes import Mistakes, listed
from zods.tasks.tables import RESERVED, ROW, Table
from zods.tasks.text_lines import read_lines

csv.field_size_limit(sys.maxsize)


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


def read_csv(path: Path, delimiter: str, column_names: Sequence[str] | None) -> Table:
    """Check a CSV or TSV file, and find the types of its columns.

    A CSV file has quotes as in RFC 4180. In a TSV file a field is unquoted where it is quoted as a
    whole, and any other quote is a character. Quoted tabs and line ends of a TSV file are read only
    where the rows then have the right number of fields, and have it in no other way. A blank line
    is no row.

    Raises ValueError with all mistakes, by line.
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
        raise ValueError(f"{path} holds no examples. Give a file with a header and rows")
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


def stream_csv(path: Path, column_names: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV file, each with its first line in the column ROW.

    All values are texts, because the types of the columns are known only when all rows are. Raises
    ValueError at the first row that has another number of fields.
    """
    records = _csv_records(path, ",")
    names = column_names
    for record in records:
        if names is None and not record.problem:
            names = _header_names(path, record)
            continue
        names = names or ()
        if record.problem or len(record.fields) != len(names):
            what = record.problem or f"{len(record.fields)} fields, but {len(names)} columns"
            raise ValueError(
                f"{path}, line {record.line}: {what} ({', '.join(names)}). Quote fields that hold "
                "a comma"
            )
        yield {**dict(zip(names, record.fields, strict=True)), ROW: record.line}


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
    starts = _RecordStarts(read_lines(path))
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
    for number, line in enumerate(read_lines(path), start=1):
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
        raise ValueError(f"{path} holds no examples. Give a file with at least one row")


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
