"""Division of a number of examples by weights, in exact arithmetic, so that all ranks agree."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def largest_remainder(sizes: Sequence[int] | Sequence[Fraction], budget: int) -> list[int]:
    """Share `budget` in proportion to `sizes`, by the method of the largest remainder.

    Each share is the integer part of its proportion. The rest of the budget goes, one each, to the
    largest remainders; of equals, to the earlier. No share exceeds its size, where the sizes are
    whole numbers whose sum is at least `budget`.

    >>> largest_remainder([5, 3, 2], budget=4)
    [2, 1, 1]
    """
    total = sum(sizes) or 1
    shares = [int(budget * size // total) for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(budget * sizes[i] % total), i))
    for i in by_remainder[: budget - sum(shares)]:
        shares[i] += 1
    return shares
