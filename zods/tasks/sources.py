"""Read examples from local files and from the hub, as one `datasets.Dataset`.

`zods.tasks.csv_files` and `zods.tasks.json_files` read the text formats. Caller: `zods.finetune`.
"""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError

from zods.files import check_regular
from zods.tasks.csv_files import read_csv
from zods.tasks.json_files import read_json
from zods.tasks.tables import NOT_TEXT, ROW, Table
from zods.tasks.task import code_digest

logger = logging.getLogger(__name__)

TEXT_FORMATS = (".json", ".jsonl", ".csv", ".tsv")
FORMATS = (*TEXT_FORMATS, ".parquet")
ROWS_PER_TABLE = 1000


def load_examples(
    *,
    file: str | Path | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    split: str | None = None,
    column_names: Sequence[str] | None = None,
    max_examples: int | None = None,
    seed: int,
    keep_rows: bool = False,
) -> datasets.Dataset:
    """Read examples from a local file or from a dataset of the hub.

    Ranks may call it at the same time: `datasets` builds its cache under a file lock.

    A .json file holds a list of objects, or one object per line; a file that is one object is
    refused. In a CSV file fields are quoted as in RFC 4180. In a TSV file a field that is quoted as
    a whole is unquoted, and any other quote is a character. Every row has as many fields as the
    header has names. Files of R's write.table are the exception: their quoted row names have no
    name in the header and are left out. A column's type holds for all its rows: integers, floats or
    booleans where each row has one or is blank, text otherwise.

    Args:
        file: a .jsonl, .json, .csv, .tsv or .parquet file; the text formats also as .gz. In UTF-8.
        dataset_name: a dataset's name on the hub, or a folder that `datasets` can load.
        dataset_config: the hub dataset's configuration.
        split: the hub dataset's split, "train" by default.
        column_names: the columns of a .csv or .tsv file that has no header.
        max_examples: number of examples to draw at random; all are kept where there are no more.
        seed: seed of this draw.
        keep_rows: keep the columns ROW and NOT_TEXT, by which `Task.prepare` names rows. ROW is an
            example's first line in a text file, or its row from 0 in other formats. NOT_TEXT names
            the text columns in which a row's value is no text.

    Returns:
        The examples, in the order of the source, or in the drawn order where `max_examples` drew
            some.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: arguments that exclude each other, an unknown extension, a malformed or empty
            file, or a hub dataset that cannot be loaded.
    """
    if (file is None) == (dataset_name is None):
        raise ValueError(
            f"pass either a file or the name of a hub dataset; got {file!r} and {dataset_name!r}"
        )
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be at least 1; it is {max_examples}")
    dataset = _load_source(file, dataset_name, dataset_config, split, column_names)
    if keep_rows and ROW not in dataset.column_names:
        dataset = dataset.add_column(ROW, range(len(dataset)))
    if not keep_rows:
        dataset = dataset.remove_columns(
            [name for name in (ROW, NOT_TEXT) if name in dataset.column_names]
        )
    return draw(dataset, max_examples, seed)


def draw(dataset: datasets.Dataset, most: int | None, seed: int) -> datasets.Dataset:
    """Draw `most` examples at random; all are kept where there are no more, or `most` is None."""
    if most is None or most >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(most))


def _load_source(
    file: str | Path | None,
    dataset_name: str | None,
    dataset_config: str | None,
    split: str | None,
    column_names: Sequence[str] | None,
) -> datasets.Dataset:
    """Load a file, or a dataset of the hub where `file` is None."""
    if file is None:
        if column_names is not None:
            raise ValueError(
                f"column_names is for .csv and .tsv files without a header, not for {dataset_name}"
            )
        return _load_hub(dataset_name, dataset_config, split or "train")
    if dataset_config is not None or split is not None:
        raise ValueError(
            f"a configuration or split belongs to a hub dataset, not to the file {file}"
        )
    return _load_file(Path(file), column_names)


def name_of_rows(
    *,
    file: str | Path | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    split: str | None = None,
) -> str:
    """The text before the number of a row in messages.

    For example "train.csv, line", or "glue (sst2, train), row".
    """
    if file is not None:
        return f"{file}, {'line' if extension_of(Path(file)) in TEXT_FORMATS else 'row'}"
    return f"{dataset_name} ({', '.join(filter(None, (dataset_config, split or 'train')))}), row"


def split_held_out(
    dataset: datasets.Dataset, fraction_or_count: float | int, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Draw held-out examples at random by `seed`.

    Returns (the other examples, the held-out examples).

    Args:
        fraction_or_count: a float is the held-out share, in (0, 1); an int is the number of
            held-out examples, from 1 to len(dataset) - 1.

    Raises:
        ValueError: the size is outside its range, or leaves one side empty.
    """
    if isinstance(fraction_or_count, float):
        allowed = 0 < fraction_or_count < 1 and len(dataset) > 1
    else:
        allowed = 1 <= fraction_or_count < len(dataset)
    if not allowed:
        raise ValueError(
            f"cannot hold out {fraction_or_count} of {len(dataset)} examples; allowed are a "
            "fraction between 0 and 1, or a count that leaves an example to train on"
        )
    parts = dataset.train_test_split(test_size=fraction_or_count, seed=seed)
    return parts["train"], parts["test"]


def _load_hub(name: str | None, config: str | None, split: str) -> datasets.Dataset:
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise ValueError(
            f"cannot load the dataset {name!r} (configuration {config!r}, split {split!r}): "
            f"{type(error).__name__}: {error}; correct the name, or pass --train_file with a local "
            "file"
        ) from error
    if len(dataset) == 0:
        raise ValueError(
            f"the dataset {name!r} (configuration {config!r}, split {split!r}) has no examples"
        )
    return dataset


def extension_of(path: Path) -> str:
    """The extension of a file, without a final .gz."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _load_file(path: Path, column_names: Sequence[str] | None) -> datasets.Dataset:
    extension = extension_of(path)
    if extension not in FORMATS:
        raise ValueError(
            f"{path}: unknown extension {extension!r}; allowed are {', '.join(FORMATS)}, also with "
            ".gz"
        )
    check_regular(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}. Correct the path")
    if column_names is not None and set(column_names) & {ROW, NOT_TEXT}:
        raise ValueError(f"column_names: {ROW} and {NOT_TEXT} are reserved. Give other names")
    if column_names is not None and extension not in (".csv", ".tsv"):
        raise ValueError(
            f"column_names is for .csv and .tsv files without a header, not for {path}"
        )
    if extension == ".parquet":
        try:
            dataset = datasets.load_dataset(
                "parquet", data_files=glob.escape(str(path)), split="train"
            )
        # pyarrow and datasets raise exceptions of many types, some without a message.
        except Exception as error:
            reason = str(error.__cause__ or error).strip()
            raise ValueError(
                f"{path} holds no examples that can be read as .parquet. {reason}".strip()
            ) from error
    else:
        dataset = _build_from_text(path, extension, column_names)
    if len(dataset) == 0:
        raise ValueError(f"{path} holds no examples. Give a file with at least one row")
    return dataset


@dataclass
class _TextFileConfig(datasets.BuilderConfig):
    """The configuration of `_TextFile`.

    content: a digest of the file, by which `datasets` knows whether it has built the file before.
    """

    path: str = ""
    extension: str = ""
    names: tuple[str, ...] | None = None
    content: str = ""


class _TextFile(datasets.ArrowBasedBuilder):
    """A builder for a CSV, TSV or JSON file.

    It writes a memory-mapped table, with the column ROW, to the cache of `datasets`.
    """

    BUILDER_CONFIG_CLASS = _TextFileConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train")]

    def _generate_tables(self) -> Iterator[tuple[int, pa.Table]]:
        config = self.config
        table = _read_table(Path(config.path), config.extension, config.names)
        self.info.description = table.note
        schema = pa.schema([*table.types.items(), (ROW, pa.int64()), (NOT_TEXT, pa.string())])
        rows: list[tuple[Any, ...]] = []
        for number, (line, values, not_text) in enumerate(table.rows()):
            rows.append((*values, line, ", ".join(not_text)))
            if len(rows) == ROWS_PER_TABLE:
                yield number, _arrow_table(rows, schema)
                rows = []
        if rows:
            yield -1, _arrow_table(rows, schema)


def _read_table(path: Path, extension: str, column_names: Sequence[str] | None) -> Table:
    """Check a .csv, .tsv, .json or .jsonl file (also .gz).

    Raises:
        ValueError: with all mistakes, by line.
    """
    if extension in (".csv", ".tsv"):
        return read_csv(path, "," if extension == ".csv" else "\t", column_names)
    return read_json(path, extension)


def _arrow_table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)],
        schema,
    )


def _build_from_text(
    path: Path, extension: str, column_names: Sequence[str] | None
) -> datasets.Dataset:
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "blake2b").hexdigest()
    names = None if column_names is None else tuple(column_names)
    builder = _TextFile(
        dataset_name="text_file",
        hash=code_digest(),
        path=str(path),
        extension=extension,
        names=names,
        content=content,
    )
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise
    dataset = builder.as_dataset("train")
    if dataset.info.description:
        logger.warning("%s, %s.", path, dataset.info.description)
    return dataset
