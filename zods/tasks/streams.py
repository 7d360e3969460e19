"""Files and hub datasets that are read while the run trains on them, row by row.

A stream yields raw rows: of a JSON lines file, the lines as they are. `StreamedTask` parses, checks
and tokenises the rows of a micro-batch, so that each rank does this for its own rows only. Caller:
`zods.cli.prepared_data`.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from zods.data.objectives import IGNORE_INDEX
from zods.data.stream import BadRow
from zods.files import check_regular
from zods.tasks.column_types import (
    NULL,
    becomes_text,
    json_value,
    merged,
    type_of_value,
    without_null,
)
from zods.tasks.csv_files import stream_csv
from zods.tasks.instruction import Instruction
from zods.tasks.json_files import parse_line
from zods.tasks.sequences import Chat, PlainText
from zods.tasks.sources import extension_of
from zods.tasks.tables import NOT_TEXT, ROW
from zods.tasks.task import Row, Task, check_rows, make_rows
from zods.tasks.text_lines import read_lines

logger = logging.getLogger(__name__)

HEAD = 1000  # first rows that are checked at the start, and whose columns are those of the data
LINE = "__line__"  # key of a raw row of a JSON lines file with the line's text
STREAMED = (".jsonl", ".csv", ".parquet")  # also .jsonl.gz and .csv.gz
REASONS = {
    ".json": "a list of objects ends where its bracket closes. Write one object per line, as .jsonl",
    ".tsv": "its quotes can be understood only when all rows are known. Write it as .csv or .jsonl",
}
PLAIN = (str, int, float, bool, list, dict, type(None))


@dataclass(frozen=True)
class RowStream:
    """The rows of a file or a hub dataset.

    rows: raw rows, each with its number in the column ROW. head: the first rows, as
    `zods.tasks.load_examples` has all rows. types: of the columns in the head.
    """

    rows: datasets.IterableDataset
    head: datasets.Dataset
    types: dict[str, pa.DataType]

    @classmethod
    def open(
        cls,
        *,
        file: str | None = None,
        dataset_name: str | None = None,
        dataset_config: str | None = None,
        split: str | None = None,
        column_names: Sequence[str] | None = None,
    ) -> RowStream:
        """Begin to read. The arguments are those of `load_examples`.

        Raises FileNotFoundError or ValueError where there is no such file or dataset, where its kind
        cannot be streamed, or where one of the first rows cannot be read.
        """
        if file is not None:
            rows = _stream_of_file(Path(file), column_names)
        else:
            name, split = str(dataset_name), split or "train"
            rows = _numbered(_load(name, dataset_config, split=split, what=name))
        values = [_values(raw, str(file)) for raw in islice(iter(rows), HEAD)]
        if not values:
            raise ValueError(f"{file or dataset_name}: no rows. Give data with at least one row")
        names = dict.fromkeys(name for _, row in values for name in row)
        types = dict.fromkeys(
            (n for n in names if all(isinstance(row.get(n), PLAIN) for _, row in values)), NULL
        )
        return cls(rows, *_table(types, values))

    def shuffled(self, buffer_size: int | None, seed: int) -> datasets.IterableDataset:
        """The raw rows, in their order, or drawn from a buffer of the next `buffer_size` rows."""
        if buffer_size is None:
            return self.rows
        return self.rows.shuffle(seed=seed, buffer_size=buffer_size)


@dataclass
class StreamedTask:
    """Makes prepared rows of the raw rows of a micro-batch.

    A row keeps its place in the batch where a task leaves out rows with nothing to learn: it has no
    label then, and so no effect.

    task: a task that can be streamed, see `check_streamable`. stream: the rows are its. row_name:
    the text before a row's number in messages.
    """

    task: Instruction | Chat | PlainText
    stream: RowStream
    row_name: str
    num_embeddings: int | None
    _said: set[str] = field(default_factory=set)

    def prepare(self, raw_rows: Sequence[Row]) -> list[Row]:
        """Parse, check and tokenise rows. Raises BadRow where one cannot be used."""
        try:
            values = [_values(raw, self.row_name.rpartition(",")[0]) for raw in raw_rows]
            dataset, _ = _table(self.stream.types, values)
            check_rows(self.task, [(dataset, self.row_name)])
        except ValueError as error:
            raise BadRow(f"--streaming: {error}") from None
        rows = []
        for value in values:  # alone: the text of a row must not follow from others of its batch
            made = make_rows(_table(self.stream.types, [value])[0], self.task.make_rows)
            rows.append({name: of_row for name, (of_row,) in made.items()})
        return [self._checked(row, line) for row, (line, _) in zip(rows, values, strict=True)]

    def collated_by(
        self, collate: Callable[[Sequence[Row]], dict[str, Any]]
    ) -> Callable[[Sequence[Row]], dict[str, Any]]:
        """A function that makes a batch of raw rows. collate: it makes one of prepared rows."""
        return lambda raw_rows: collate(self.prepare(raw_rows))

    def _checked(self, row: Row, number: int) -> Row:
        wrong, skipped = row.pop("unusable", ""), row.pop("skipped", "")
        row.pop("truncated")
        row.pop("answer_cut", None)
        if self.num_embeddings is not None and max(row["input_ids"], default=0) >= (
            self.num_embeddings
        ):
            wrong = f"a token of which the model, with {self.num_embeddings} tokens, has no vector"
        if wrong:
            raise BadRow(f"--streaming: {self.row_name} {number}: {wrong}")
        if skipped:
            if skipped not in self._said:
                self._said.add(skipped)
                logger.warning(
                    "%s %d has %s: it has no effect, as others like it",
                    self.row_name,
                    number,
                    skipped,
                )
            if "labels" in row:
                row["labels"] = [IGNORE_INDEX] * len(row["labels"])
            else:
                row["num_answer_tokens"] = 0
        return row


def check_streamable(task: Task) -> None:
    """Raise ValueError for a task that must know all rows before the first step."""
    if not isinstance(task, (Instruction, Chat, PlainText)):
        raise ValueError(
            f"--streaming: --task {task.name} has to read all labels before the first step. Leave "
            "--streaming out, or use --task instruction."
        )


def _stream_of_file(path: Path, column_names: Sequence[str] | None) -> datasets.IterableDataset:
    extension = extension_of(path)
    if extension not in STREAMED:
        reason = REASONS.get(extension, "its extension is not known")
        raise ValueError(
            f"--streaming: {path}: {reason}. Streamed are {', '.join(STREAMED)}; or leave "
            "--streaming out"
        )
    check_regular(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}. Correct the path")
    if extension == ".parquet":
        return _numbered(_load("parquet", data_files=glob.escape(str(path)), what=str(path)))
    if extension == ".csv":
        return datasets.IterableDataset.from_generator(
            stream_csv,
            gen_kwargs={
                "path": path,
                # of a list, datasets would make shards
                "column_names": None if column_names is None else tuple(column_names),
            },
        )
    return datasets.IterableDataset.from_generator(_json_rows, gen_kwargs={"path": path})


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            yield {ROW: number, LINE: line}


def _load(*args: Any, what: str, split: str = "train", **kwargs: Any) -> datasets.IterableDataset:
    try:
        return datasets.load_dataset(*args, split=split, streaming=True, **kwargs)
    # pyarrow, datasets and the hub's client raise exceptions of many types
    except Exception as error:
        raise ValueError(
            f"--streaming: cannot read {what}: {type(error).__name__}: {error}. Correct the name"
        ) from error


def _numbered(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    return rows.map(_with_number, with_indices=True)


def _with_number(row: Row, number: int) -> Row:
    return {ROW: number}


def _values(raw: Row, source: str) -> tuple[int, Row]:
    """The number and the values of a raw row. Raises ValueError where its line is malformed."""
    number = raw[ROW]
    if LINE not in raw:
        return number, {name: value for name, value in raw.items() if name != ROW}
    try:
        return number, parse_line(raw[LINE])
    except ValueError as error:
        raise ValueError(
            f"{source}, line {number}: {error}. Each row must be one JSON object of column: value"
        ) from None


def _table(
    types: dict[str, pa.DataType], rows: Sequence[tuple[int, Row]]
) -> tuple[datasets.Dataset, dict[str, pa.DataType]]:
    """A dataset of these columns, with ROW and NOT_TEXT, and the columns' types.

    types: of earlier rows; a column becomes text where its values here have another type.
    """
    types = dict(types)
    for _, row in rows:
        for name in types:
            types[name] = merged(types[name], type_of_value(row.get(name)))
    types = {name: without_null(dtype) for name, dtype in types.items()}
    columns = {
        name: pa.array([json_value(row.get(name), dtype) for _, row in rows], dtype)
        for name, dtype in types.items()
    }
    odd = [
        ", ".join(name for name, dtype in types.items() if becomes_text(row.get(name), dtype))
        for _, row in rows
    ]
    numbers = pa.array([number for number, _ in rows])
    table = pa.table({**columns, ROW: numbers, NOT_TEXT: pa.array(odd)})
    # without a fingerprint, `datasets` would make one of the rows
    return datasets.Dataset(table, fingerprint="streamed"), types
