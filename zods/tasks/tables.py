"""The checked rows of a text file, as the readers of CSV and JSON files hand them over.

Filled by `zods.tasks.csv_files` and `zods.tasks.json_files`, and written to the cache by
`zods.tasks.sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

ROW = "__row__"  # column with the row's number in its source
# Column that names the columns in which the row's value, or a part of it, became text
NOT_TEXT = "__not_text__"
RESERVED = (ROW, NOT_TEXT)


@dataclass(frozen=True)
class Table:
    """A checked file.

    Attributes:
        types: {column: type}, in order.
        rows: starts to read the file again. It yields (line, values in the order of the columns,
            names of the columns in which a JSON value of this row that is no text became text).
        note: one line on how the file was understood; empty where there was no choice.
    """

    types: dict[str, pa.DataType]
    rows: Callable[[], Iterator[tuple[int, list[Any], list[str]]]]
    note: str = ""
