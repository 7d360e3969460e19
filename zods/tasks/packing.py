"""Rows that hold several examples: texts that are concatenated and cut, or whole examples.

Caller: `zods.cli.prepared_data`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import datasets
from torch import Tensor

from zods.data.objectives import IGNORE_INDEX
from zods.tasks.instruction import Instruction
from zods.tasks.sequences import Chat, PlainText
from zods.tasks.task import Columns, Row, Task, pad_right

AT_ONCE = 1000  # examples among which rows are filled
POSITION_IDS = (
    "position_ids"  # the column, and the model's argument, that separate the examples of a row
)


def prepare_packed(task: Task, dataset: datasets.Dataset, row_name: str) -> datasets.Dataset:
    """Tokenise a dataset, and put several examples into a row.

    A row is one example of the run: it has one loss, and with `examples_per_direction` 1 one
    direction. AT_ONCE examples are packed at a time.

    Plain texts are concatenated and cut into rows of exactly `max_length` tokens. No text is
    truncated, and each ends with the end-of-sequence token. A row may hold the end of one text and
    the start of the next, which attends to it, as in usual pretraining. The tokens that do not fill
    the last of the rows are dropped.

    Conversations, and prompts with responses, stay whole, with their labels. They are prepared as
    without packing. Each is put into the first row in which it has room, and rows hold at most
    `max_length` tokens. The column POSITION_IDS begins again at 0 with each of them. Models of
    transformers that read it keep the examples of a row apart; see
    `zods.cli.model_checks.check_packing`.

    Raises ValueError for a task on other data, and where not one row of plain text is filled.
    """
    if isinstance(task, PlainText):
        return _cut_texts(task, dataset, row_name)
    if not isinstance(task, (Chat, Instruction)):
        raise ValueError(
            f"--packing: an example of --task {task.name} has a prediction of its own, and a row has "
            "one. Leave --packing out, or use --task instruction."
        )
    prepared = task.prepare(dataset, row_name)
    return prepared.map(
        _fill_rows,
        batched=True,
        batch_size=AT_ONCE,
        remove_columns=prepared.column_names,
        fn_kwargs={"length": task.max_length},
    )


def _cut_texts(task: PlainText, dataset: datasets.Dataset, row_name: str) -> datasets.Dataset:
    whole = replace(task, max_length=sys.maxsize).prepare(dataset, row_name)
    packed = whole.map(
        _concatenate_and_cut,
        batched=True,
        batch_size=AT_ONCE,
        fn_kwargs={"length": task.max_length},
    )
    if len(packed) == 0:
        raise ValueError(
            f"--packing: the {len(whole)} texts do not fill one row of {task.max_length} tokens. "
            "Lower --max_length, or give more data."
        )
    return packed


def _concatenate_and_cut(batch: Columns, length: int) -> Columns:
    """Concatenate the lists of each column, and cut them into parts of `length`."""
    columns: Columns = {}
    for name, lists in batch.items():
        values = list(chain.from_iterable(lists))
        starts = range(0, len(values) - length + 1, length)
        columns[name] = [values[start : start + length] for start in starts]
    return columns


def _fill_rows(batch: Columns, length: int) -> Columns:
    """Put each example into the first row in which it has room."""
    packed: Columns = {"input_ids": [], "labels": [], POSITION_IDS: []}
    for example, ids in enumerate(batch["input_ids"]):
        if "labels" in batch:
            labels = batch["labels"][example]
        else:
            start = len(ids) - batch["num_answer_tokens"][example]
            labels = [IGNORE_INDEX] * start + ids[start:]
        # the last token of the example before must not predict the first one of this
        labels = [IGNORE_INDEX, *labels[1:]]
        rows = packed["input_ids"]
        row = next((i for i, of_row in enumerate(rows) if len(of_row) + len(ids) <= length), None)
        values = {"input_ids": ids, "labels": labels, POSITION_IDS: range(len(ids))}
        for name, column in packed.items():
            if row is None:
                column.append(list(values[name]))
            else:
                column[row] += values[name]
    return packed


class PackedCollator:
    """Collates packed rows: `input_ids`, `labels` and POSITION_IDS, all (B, L), and no attention mask.

    transformers looks for several examples in a row only where there is no mask. A token of padding
    is an example of its own.
    """

    def __init__(self, pad_id: int) -> None:
        self._pads = {"input_ids": pad_id, "labels": IGNORE_INDEX, POSITION_IDS: 0}

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return {
            name: pad_right([row[name] for row in rows], pad) for name, pad in self._pads.items()
        }
