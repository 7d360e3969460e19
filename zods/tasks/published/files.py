"""Load the data of a declared task: from a file, from a folder of published files, or the hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from zods.tasks.prompts import Template
from zods.tasks.published.declaration import PublishedTask, Row
from zods.tasks.sources import draw, load_examples, name_of_rows
from zods.tasks.tables import ROW
from zods.tasks.task import Columns, check_columns, code_digest
from zods.tasks.text_lines import read_lines

logger = logging.getLogger(__name__)

Part = tuple[datasets.Dataset, str]  # examples, and the text before a row's number in messages


def load_published(
    task: PublishedTask,
    *,
    held_out: bool,
    file: str | Path | None,
    folder: str | Path | None,
    column_names: Sequence[str] | None,
    max_examples: int | None,
    seed: int,
    source_column: str | None = None,
) -> Part | None:
    """Load a part of a task's data, as the rows that its template needs.

    Args:
        held_out: load the held-out part, not the training data.
        file: a file in one of the task's published forms; comes before `folder`.
        folder: a folder with the published files, or with a folder of the task's name that has
            them. Without it the hub is asked.
        column_names: the columns of a .csv or .tsv file without a header.
        max_examples: number of examples to draw at random by `seed`.
        source_column: a column of the published rows that the task's rows keep.

    Returns:
        The examples, with the column ROW, and the text before a row's number in
        messages. None where no held-out data are published, or the folder has none.

    Raises:
        FileNotFoundError: the folder has no training file; the message names those expected.
        ValueError: a file that cannot be read, a missing column, or a hub that cannot be reached.
    """
    names = task.eval_files if held_out else task.train_files
    if file is None and folder is not None:
        file = _published_file(Path(folder), task, names)
        if file is None and held_out:
            return None
    if file is not None:
        dataset, row_name = _read_file(task, Path(file), column_names, seed)
        source = str(file)
    else:
        split = task.eval_split if held_out else "train"
        if held_out and not split:
            return None
        dataset, row_name = _read_hub(task, split, seed)
        source = str(task.hub)
    try:
        return draw(shaped(task, dataset, source_column), max_examples, seed), row_name
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _published_file(folder: Path, task: PublishedTask, names: Sequence[str]) -> Path | None:
    """The first of these files in the folder; None where there is none of the held-out files."""
    for name in names:
        for path in (folder / name, folder / task.name / name):
            for written in (path, path.with_name(f"{path.name}.gz")):
                if written.is_file():
                    return written
    if names != task.train_files:
        return None
    raise FileNotFoundError(
        f"--data_dir {folder}: neither it nor its folder {task.name} has {' or '.join(names)}. Put "
        f"the published files there: {task.files}; or give --train_file"
    )


def _read_hub(task: PublishedTask, split: str, seed: int) -> Part:
    if task.hub is None:
        raise ValueError(
            f"--task {task.name}: it has no data on the hub. Give --train_file, or --data_dir with "
            f"{task.files}"
        )
    source: dict[str, Any] = {
        "dataset_name": task.hub,
        "dataset_config": task.hub_config,
        "split": split,
    }
    try:
        dataset = load_examples(**source, seed=seed, keep_rows=True)
    except ValueError as error:
        raise ValueError(
            f"{error}, or --data_dir with the published files of {task.name}: {task.files}"
        ) from None
    return dataset, name_of_rows(**source)


def _read_file(
    task: PublishedTask, path: Path, column_names: Sequence[str] | None, seed: int
) -> Part:
    if task.document is not None and path.suffix == ".json" and path.is_file():
        rows = _rows_of_document(path, task.document)
        if rows:
            numbered = [{**row, ROW: number} for number, row in enumerate(rows)]
            return datasets.Dataset.from_list(numbered), f"{path}, question"
    if column_names is None and task.file_columns and not _has_header(path, task):
        column_names = task.file_columns
    dataset = load_examples(file=path, column_names=column_names, seed=seed, keep_rows=True)
    return dataset, name_of_rows(file=path)


def _rows_of_document(path: Path, document: Callable[[Any], Iterator[Row]]) -> list[Row]:
    """The rows of a file that is one JSON object; [] where it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return []  # JSON lines, or an error that the reader of rows reports
    if not isinstance(content, dict):
        return []
    try:
        rows = list(document(content))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: one JSON object, but not in the published form: "
            f"{type(error).__name__}: {error}. Give the file as it was published"
        ) from None
    if not rows:
        raise ValueError(f"{path} holds no questions. Give a file with at least one")
    return rows


def _has_header(path: Path, task: PublishedTask) -> bool:
    """Whether the first line of a .csv or .tsv file names columns; True for other files."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind not in ("csv", "tsv") or not path.is_file():
        return True
    first = next(iter(read_lines(path)), "").strip()
    cells = [cell.strip('"') for cell in first.split("\t" if kind == "tsv" else ",")]
    known = {task.label_column, *task.columns, *task.renamed}
    return bool(known & set(cells))


def shaped(
    task: PublishedTask, dataset: datasets.Dataset, source_column: str | None = None
) -> datasets.Dataset:
    """Rename columns, leave rows without a label out, and make the rows of the task.

    source_column: a column of the published rows that the task's rows keep, where it is there.

    Raises ValueError for a missing column, which lists those that exist.
    """
    there = set(dataset.column_names)
    dataset = dataset.rename_columns(
        {old: new for old, new in task.renamed.items() if old in there and new not in there}
    )
    if task.unlabelled and task.label_column in dataset.column_names:
        labels = dataset[task.label_column][:]
        kept = [i for i, label in enumerate(labels) if label not in task.unlabelled]
        if len(kept) < len(labels):
            logger.info("%d rows without a label are left out", len(labels) - len(kept))
            dataset = dataset.select(kept)
    if task.rows is None:
        return dataset
    check_columns(dataset, task.columns)
    names = _row_columns(task)
    beside = [ROW] if source_column is None else [ROW, source_column]
    beside = [name for name in beside if name in dataset.column_names and name not in names]
    return dataset.map(
        _rows_of_task,
        batched=True,
        remove_columns=dataset.column_names,
        fn_kwargs={
            "rows": task.rows,
            "names": names,
            "beside": beside,
            "code": code_digest(),
        },
    )


def _row_columns(task: PublishedTask) -> list[str]:
    """The columns that `PublishedTask.rows` makes."""
    template = Template.parse(task.template)
    names = list(template.columns)
    if task.words:
        return [*names, task.label_column]
    if task.options:
        scores = ["f1", "exact"] if task.metric == "f1" else []
        return [*names, template.answer, "answer", *scores]
    return [*names, template.answer, "references"]


def _rows_of_task(
    batch: Columns,
    rows: Callable[[Row], Iterator[Row]],
    names: Sequence[str],
    beside: Sequence[str],
    code: str,
) -> Columns:
    """Map a batch of published rows to rows with the columns `names`, and `beside` as published.

    A row in another form than the published one has None in their place, which the task reports. A
    line of the log names the first error of `rows`.
    """
    failed = False
    made: Columns = {name: [] for name in (*names, *beside)}
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        try:
            of_row = list(rows(row))
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            if not failed:
                logger.warning("rows: %s: %s, for the row %s", type(error).__name__, error, row)
            of_row, failed = [{}], True
        for of_task in of_row:
            for name in names:
                made[name].append(of_task.get(name))
            for name in beside:
                made[name].append(row[name])
    return made
