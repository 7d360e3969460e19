"""The values of a label column, their names and their ids.

Callers: the tasks `Classification` and `Prompted`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from zods.tasks.task import TEXT_DTYPES, check_columns

logger = logging.getLogger(__name__)

SHOWN = 20  # number of classes that the log lists by name


@dataclass(frozen=True)
class Labels:
    """The labels of a column. A label's id is its position.

    Attributes:
        column: name of the column.
        values: the labels as the data have them: text, integers or booleans.
        names: the labels as messages show them, and as the prompted task asks for them.
        texts: other spellings of the labels in the data, in the order of the ids; or empty.
    """

    column: str
    values: tuple[Any, ...]
    names: tuple[str, ...]
    texts: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, dataset: datasets.Dataset, column: str, words: Sequence[str] | None = None
    ) -> Labels:
        """Find the labels of the training data.

        The labels of a ClassLabel column are its names, in its order. The labels of another column
        are its distinct values, sorted. `words` rename integer labels: label i is words[i], and the
        labels are 0 to len(words) - 1.

        Raises:
            ValueError: the column is missing, has another type or has fewer than two labels, or
                words are given for text labels.
        """
        check_columns(dataset, [column])
        feature = dataset.features[column]
        dtype = getattr(feature, "dtype", "")
        is_integer = dtype.startswith(("int", "uint"))
        if not is_integer and dtype not in (*TEXT_DTYPES, "bool"):
            raise ValueError(
                f"label column {column!r} must hold integers, booleans or text; it holds {feature}"
            )
        counts = Counter(dataset[column][:])
        num_missing = sum(counts.pop(value) for value in list(counts) if _is_missing(value))
        if words is not None:
            if not is_integer:
                raise ValueError(
                    f"label words rename integer labels; column {column!r} holds {dtype}: leave "
                    "them out"
                )
            labels = cls(column, tuple(range(len(words))), tuple(words))
        elif isinstance(feature, datasets.ClassLabel):
            labels = cls(column, tuple(range(feature.num_classes)), tuple(feature.names))
        else:
            values = tuple(sorted(counts))
            labels = cls(column, values, tuple(map(str, values)))
        if len(labels.values) < 2 and words is not None:
            raise ValueError(
                f"label_words gives {len(words)} word; give one for each of the labels 0, 1, ..."
            )
        if len(labels.values) < 2:
            without = f", and {num_missing} rows without a label" if num_missing else ""
            raise ValueError(
                f"column {column!r} needs at least two labels; the training data has only "
                f"{labels.values}{without}"
            )
        shown = [
            f"{name} ({counts[value]})"
            for value, name in zip(labels.values, labels.names, strict=True)
        ]
        more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
        logger.info(
            "%d classes in column %r: %s%s", len(shown), column, ", ".join(shown[:SHOWN]), more
        )
        return labels

    @classmethod
    def declared(
        cls,
        dataset: datasets.Dataset,
        column: str,
        names: Sequence[str],
        texts: Sequence[str] = (),
    ) -> Labels:
        """The labels that a published task declares, in the order of their ids.

        names: their names. texts: their spellings in published files. Integers count from 0, or
        from 1 where the training data have no 0 and have the largest label from 1. False and true
        are 0 and 1.

        Raises ValueError where the column is missing, or has another type.
        """
        check_columns(dataset, [column])
        feature = dataset.features[column]
        dtype = getattr(feature, "dtype", "")
        if not dtype.startswith(("int", "uint")) and dtype not in (*TEXT_DTYPES, "bool"):
            raise ValueError(
                f"label column {column!r} must hold integers, booleans or text; it holds {feature}"
            )
        found = {str(value) for value in set(dataset[column][:])}
        first = 1 if str(len(names)) in found and "0" not in found else 0
        return cls(
            column, tuple(range(first, first + len(names))), tuple(names), tuple(texts) or ()
        )

    def in_order_of(self, names: Sequence[str]) -> Labels:
        """Reorder the ids by `names`; the same labels where `names` are other names."""
        if sorted(names) != sorted(self.names):
            return self
        values = dict(zip(self.names, self.values, strict=True))
        texts = dict(zip(self.names, self.texts or self.names, strict=True))
        return Labels(
            self.column,
            tuple(values[name] for name in names),
            tuple(names),
            tuple(texts[name] for name in names) if self.texts else (),
        )

    def mistakes(self, dataset: datasets.Dataset) -> Iterator[tuple[int, str]]:
        """Yield (position, mistake) of each row that has no label or an unknown label."""
        ids = self._ids()
        for position, value in enumerate(dataset[self.column][:]):
            if _is_missing(value):
                yield position, f"no label in column {self.column!r}"
            elif value not in ids and str(value) not in ids:
                known = ", ".join(
                    f"{value!r} ({name})"
                    for value, name in zip(self.values, self.names, strict=True)
                )
                yield (
                    position,
                    f"column {self.column!r} has the label {value!r:.100}; the {len(self.values)} "
                    f"labels of the training data are {known[:500]}",
                )

    def ids(self, values: Sequence[Any]) -> list[int]:
        """The ids of labels, which must all be known."""
        ids = self._ids()
        return [ids[value if value in ids else str(value)] for value in values]

    def _ids(self) -> dict[Any, int]:
        """Ids by value and by the text of the value.

        In a file with one text among its labels, integers become text, too.
        """
        texts = {str(value): label_id for label_id, value in enumerate(self.values)}
        texts |= {text: label_id for label_id, text in enumerate(self.texts)}
        return texts | dict(zip(self.values, range(len(self.values)), strict=True))


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())
