"""Rows of equal length from plain texts, which are concatenated. Caller: `zods.cli.prepared_data`."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import chain

import datasets

from zods.tasks.sequences import PlainText
from zods.tasks.task import Columns, Task

TEXTS_AT_ONCE = 1000  # texts that are concatenated


def prepare_packed(task: Task, dataset: datasets.Dataset, row_name: str) -> datasets.Dataset:
    """Tokenise texts, and cut their concatenation into rows of exactly `max_length` tokens.

    No text is truncated, and each ends with the end-of-sequence token. A row may hold the end of
    one text and the start of the next, which attends to it, as in usual pretraining. A row is one
    example: it has one loss, and with `examples_per_direction` 1 one direction. TEXTS_AT_ONCE texts
    are concatenated at a time, and the tokens that do not fill their last row are dropped.

    Raises ValueError for a task on other data than plain texts, and where not one row is filled.
    """
    if not isinstance(task, PlainText):
        raise ValueError(
            "--packing: the data have prompts and responses, and examples in one row would attend "
            "to each other: transformers keeps them apart in some models and implementations of "
            "attention only. Leave --packing out, or give plain texts (--data_format text)."
        )
    whole = replace(task, max_length=sys.maxsize).prepare(dataset, row_name)
    packed = whole.map(
        _packed,
        batched=True,
        batch_size=TEXTS_AT_ONCE,
        fn_kwargs={"length": task.max_length},
    )
    if len(packed) == 0:
        raise ValueError(
            f"--packing: the {len(whole)} texts do not fill one row of {task.max_length} tokens. "
            "Lower --max_length, or give more data."
        )
    return packed


def _packed(batch: Columns, length: int) -> Columns:
    """Concatenate the lists of each column, and cut them into parts of `length`."""
    columns: Columns = {}
    for name, lists in batch.items():
        values = list(chain.from_iterable(lists))
        starts = range(0, len(values) - length + 1, length)
        columns[name] = [values[start : start + length] for start in starts]
    return columns
