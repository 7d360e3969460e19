"""A sum of floats with the same bits in every version of Python.

Ranks compute updates from the same numbers, and must get the same bits. From Python 3.12 on, `sum`
compensates rounding errors, and so differs from earlier versions.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable


def ordered_sum(values: Iterable[float]) -> float:
    """Add float64 numbers one after the other.

    >>> ordered_sum([1e16, 1.0, -1e16])
    0.0
    """
    return functools.reduce(operator.add, values, 0.0)
