"""A label column's values, and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from zods.tasks.task import TEXT_DTYPES, check_columns


@dataclass(frozen=True)
class Labels:
    """The labels of a column; a label's id is its position.

    Attributes:
        column: where they stand.
        values: as the data has them: text, integers or booleans.
        names: as they are shown, and as the prompted task asks for them.
    """

    column: str
    values: tuple[Any, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, dataset: datasets.Dataset, column: str, words: Sequence[str] | None = None) -> Labels:
        """The labels of the training data.

        A ClassLabel column brings its names in its order. Of other columns the distinct values are taken, sorted.
        `words` rename integer labels: label i is words[i], and the labels are 0 to len(words) - 1.

        Raises:
            ValueError: no such column, a column of another type, a row without label, fewer than two labels, words for
                text labels, or a label that has no word.
        """
        check_columns(dataset, [column])
        feature = dataset.features[column]
        dtype = getattr(feature, "dtype", "")
        is_integer = dtype.startswith(("int", "uint"))
        if not is_integer and dtype not in (*TEXT_DTYPES, "bool"):
            raise ValueError(f"label column {column!r} must hold integers, booleans or text; it holds {feature}")
        distinct = dataset.unique(column)
        if None in distinct or "" in distinct:
            missing = next(row for row, value in enumerate(dataset[column]) if value in (None, ""))
            raise ValueError(f"row {missing}: column {column!r} has no label; remove the row or fill it")
        if words is not None:
            if not is_integer:
                raise ValueError(f"label words rename integer labels; column {column!r} holds {dtype}: leave them out")
            labels = cls(column, tuple(range(len(words))), tuple(words))
            labels.ids(dataset[column], range(len(dataset)))
        elif isinstance(feature, datasets.ClassLabel):
            labels = cls(column, tuple(range(feature.num_classes)), tuple(feature.names))
        else:
            values = tuple(sorted(distinct))
            labels = cls(column, values, tuple(map(str, values)))
        if len(labels.values) < 2:
            raise ValueError(f"column {column!r} needs at least two labels; the training data has only {labels.values}")
        return labels

    def ids(self, values: Sequence[Any], rows: Sequence[int]) -> list[int]:
        """The ids of these rows' labels.

        Raises:
            ValueError: a label that is not among them; names the row and the value.
        """
        ids = dict(zip(self.values, range(len(self.values)), strict=True))
        for row, value in zip(rows, values, strict=True):
            if value not in ids:
                known = ", ".join(f"{value!r} ({name})" for value, name in zip(self.values, self.names, strict=True))
                raise ValueError(
                    f"row {row}: column {self.column!r} has the label {value!r}; "
                    f"the {len(ids)} labels of the training data are {known[:500]}"
                )
        return [ids[value] for value in values]
