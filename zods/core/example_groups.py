"""Groups of examples that share a direction.

The examples of a step's batch, or of a refresh, stand in a fixed order. Consecutive examples form a
group, and each group has directions of its own. The directions of an example follow from its
position alone. They depend neither on the number of ranks nor on the size of micro-batches.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """The part of a micro-batch that is in one group.

    index: of the group, from 0. rows: of the micro-batch, ascending; None: all of them.
    """

    index: int
    rows: tuple[int, ...] | None


def group_starts(num_examples: int, examples_per_direction: int | str) -> range:
    """The position of the first example of each group.

    examples_per_direction: the size of a group; the last one may be smaller. "all": one group.

    >>> list(group_starts(10, 4))
    [0, 4, 8]
    """
    whole = examples_per_direction == "all"
    return range(0, num_examples, num_examples if whole else int(examples_per_direction))


def part_starts(num_examples: int, num_parts: int) -> list[int]:
    """The position of the first example of each part, of parts that differ by one example at most.

    The first parts are the larger ones, as in torch.tensor_split.

    >>> part_starts(10, 4)
    [0, 3, 6, 8]
    """
    size, larger = divmod(num_examples, num_parts)
    return [k * size + min(k, larger) for k in range(num_parts)]


def divide(positions: Sequence[int], starts: Sequence[int]) -> list[Group]:
    """Divide the rows of a micro-batch into groups.

    positions: of the rows, in their order. starts: the position of the first example of each group.

    >>> divide([3, 4, 5], starts=[0, 4, 8])
    [Group(index=0, rows=(0,)), Group(index=1, rows=(1, 2))]
    """
    rows: dict[int, list[int]] = {}
    for row, position in enumerate(positions):
        rows.setdefault(bisect.bisect_right(starts, position) - 1, []).append(row)
    if len(rows) == 1:
        return [Group(next(iter(rows)), None)]
    return [Group(index, tuple(of_group)) for index, of_group in sorted(rows.items())]


def positions_of(batch_size: int, accumulation: int, micro: int, split: tuple[int, int]) -> range:
    """The positions, in a step's batch, of the examples of one rank's micro-batch.

    micro: number of the micro-batch in the step. split: (index of the rank, number of ranks).
    """
    index, number = split
    size = batch_size // accumulation
    bounds = [*part_starts(size, number), size]
    return range(micro * size + bounds[index], micro * size + bounds[index + 1])
