"""Values of all examples of a dataset that decide on their order: sources and lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LENGTH = "length"  # the name that transformers has for this column
TOKENS = "input_ids"


def column_names(dataset: Any) -> list[str]:
    """The columns of a dataset, or the keys of its first example."""
    names = getattr(dataset, "column_names", None)
    if names is None:
        first = dataset[0]
        names = list(first) if isinstance(first, Mapping) else []
    return list(names)


def read_column(dataset: Any, column: str) -> list[Any]:
    """The value of each example."""
    if hasattr(dataset, "column_names"):
        return list(dataset[column])
    return [dataset[i][column] for i in range(len(dataset))]


def sources_of(dataset: Any, column: str | None, path: str) -> list[str] | None:
    """Read the source of every example from a column of the dataset.

    column: None: there are no sources, and the result is None. path: key of the configuration in
    messages.

    Raises ValueError if there is no such column.
    """
    if column is None:
        return None
    names = column_names(dataset)
    if column not in names:
        raise ValueError(
            f"{path}.source_column: the training data has no column {column!r}; its columns are "
            f"{', '.join(names) or 'none'}."
        )
    return [str(source) for source in read_column(dataset, column)]


def lengths_of(dataset: Any, path: str) -> Tensor:
    """The length of every example, (size,) int64: its column "length", or its number of "input_ids".

    path: key of the configuration in messages. Raises ValueError where there is neither column.
    """
    names = column_names(dataset)
    if LENGTH in names:
        return torch.tensor(read_column(dataset, LENGTH), dtype=torch.int64)
    if TOKENS in names:
        return torch.tensor([len(tokens) for tokens in read_column(dataset, TOKENS)])
    raise ValueError(
        f"{path}: the training data has no column {LENGTH!r} or {TOKENS!r}; its columns are "
        f"{', '.join(names) or 'none'}. Add a column {LENGTH!r} with the number of tokens."
    )
