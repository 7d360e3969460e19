"""Examples from local files and from the hub, as one `datasets.Dataset`."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import datasets

# A TSV has no quoting: a quote is a character like any other. "NA" and "null" are words, not missing values.
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "delimiter": "\t", "quoting": csv.QUOTE_NONE}),
    ".parquet": ("parquet", {}),
}


def load_examples(
    *,
    file: str | Path | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    split: str | None = None,
    column_names: Sequence[str] | None = None,
    max_examples: int | None = None,
    seed: int,
) -> datasets.Dataset:
    """Read examples from a local file or from a dataset of the hub.

    Ranks may call it at the same time: `datasets` builds its cache under a file lock.

    Args:
        file: a .jsonl, .json, .csv, .tsv or .parquet file; the text formats also as .gz.
        dataset_name: a dataset's name on the hub, or a folder that `datasets` can load.
        dataset_config: the hub dataset's configuration.
        split: the hub dataset's split, "train" by default.
        column_names: the columns of a .csv or .tsv file that has no header.
        max_examples: keep this many, drawn at random by `seed`; all where there are no more.

    Returns:
        The examples, in the order of the source, or in the drawn order where `max_examples` drew some.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: arguments that exclude each other, an unknown extension, a malformed or empty file, a hub dataset
            that cannot be loaded.
    """
    if (file is None) == (dataset_name is None):
        raise ValueError(f"pass either a file or the name of a hub dataset; got {file!r} and {dataset_name!r}")
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be at least 1; it is {max_examples}")
    if file is not None:
        if dataset_config is not None or split is not None:
            raise ValueError(f"a configuration or split belongs to a hub dataset, not to the file {file}")
        dataset = _load_file(Path(file), column_names)
    else:
        if column_names is not None:
            raise ValueError(f"column_names is for .csv and .tsv files without a header, not for {dataset_name}")
        dataset = _load_hub(dataset_name, dataset_config, split or "train")
    if max_examples is not None and max_examples < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(max_examples))
    return dataset


def split_held_out(
    dataset: datasets.Dataset, fraction_or_count: float | int, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Draw held-out examples at random by `seed`: (the rest, the held-out ones).

    Args:
        fraction_or_count: a float is the held-out share, in (0, 1); an int their number, from 1 to len(dataset) - 1.

    Raises:
        ValueError: the size is outside its range, or leaves one side empty.
    """
    if isinstance(fraction_or_count, float):
        allowed = 0 < fraction_or_count < 1 and len(dataset) > 1
    else:
        allowed = 1 <= fraction_or_count < len(dataset)
    if not allowed:
        raise ValueError(
            f"cannot hold out {fraction_or_count} of {len(dataset)} examples; "
            "allowed are a fraction between 0 and 1, or a count that leaves an example to train on"
        )
    parts = dataset.train_test_split(test_size=fraction_or_count, seed=seed)
    return parts["train"], parts["test"]


def _load_hub(name: str | None, config: str | None, split: str) -> datasets.Dataset:
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise ValueError(
            f"cannot load the dataset {name!r} (configuration {config!r}, split {split!r}): "
            f"{type(error).__name__}: {error}; correct the name, or pass --train_file with a local file"
        ) from error
    if len(dataset) == 0:
        raise ValueError(f"the dataset {name!r} (configuration {config!r}, split {split!r}) has no examples")
    return dataset


def _load_file(path: Path, column_names: Sequence[str] | None) -> datasets.Dataset:
    extension = Path(path.name.removesuffix(".gz")).suffix.lower()
    if extension not in _BUILDERS:
        raise ValueError(f"{path}: unknown extension {extension!r}; allowed are {', '.join(_BUILDERS)}, also with .gz")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    builder, options = _BUILDERS[extension]
    if column_names is not None:
        if builder != "csv":
            raise ValueError(f"column_names is for .csv and .tsv files without a header, not for {path}")
        _check_column_names(path, column_names, options)
        options = {**options, "column_names": list(column_names)}
    try:
        dataset = datasets.load_dataset(builder, data_files=str(path), split="train", **options)
    except Exception as error:  # pyarrow's, pandas' and datasets' own, some without a message
        if builder == "json":
            _check_json(path)
        reason = str(error.__cause__ or error).strip()
        raise ValueError(f"{path} holds no examples that can be read as {extension}. {reason}".strip()) from error
    if len(dataset) == 0:
        raise ValueError(f"{path} holds no examples")
    return dataset


def _open(path: Path) -> TextIO:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _check_column_names(path: Path, column_names: Sequence[str], options: dict[str, Any]) -> None:
    """Raise unless the first line has a field per name: pandas would take spare fields for an index, and not say so."""
    with _open(path) as file:
        fields = next(
            csv.reader(
                file, delimiter=options.get("delimiter", ","), quoting=options.get("quoting", csv.QUOTE_MINIMAL)
            ),
            [],
        )
    if len(fields) != len(column_names):
        raise ValueError(
            f"{path}, line 1 has {len(fields)} columns; "
            f"column_names names {len(column_names)}: {', '.join(column_names)}"
        )


def _check_json(path: Path) -> None:
    """Raise for the first line of a JSON lines file that is no object, or the first mistake in a JSON array."""
    with _open(path) as file:
        text = file.read()
    if text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: malformed JSON: {error.msg}") from None
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: malformed JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number}: must be a JSON object of column: value; it is {type(row).__name__}"
            )
