"""Groups of ranks in which the numbers of many ranks are combined, level by level.

A rank of a flat all-gather sends its numbers to all others, so its bytes grow with the number of
ranks. Above MOST_RANKS ranks they are combined in groups of consecutive ranks, then the results of
the groups among the groups' first ranks, and so on; the total comes back the same way. A rank then
sends to O(log(world size)) others. `Communicator` does it, and `zods.planning` counts its bytes.
"""

from __future__ import annotations

MOST_RANKS = 16  # of a group


def rank_groups(world_size: int) -> list[list[range]]:
    """The groups of each level, as ranks in ascending order; the last level has one group.

    The ranks of a level are the first ranks of the groups below it. There are as few levels as
    groups of MOST_RANKS allow, and then the groups are as small as these levels allow.

    >>> rank_groups(3)
    [[range(0, 3)]]
    >>> rank_groups(18)
    [[range(0, 5), range(5, 10), range(10, 15), range(15, 18)], [range(0, 20, 5)]]
    """
    depth = next(n for n in range(1, world_size + 1) if MOST_RANKS**n >= world_size)
    size = next(n for n in range(1, MOST_RANKS + 1) if n**depth >= world_size)
    levels, ranks = [], range(world_size)
    for _ in range(depth):
        levels.append([ranks[first : first + size] for first in range(0, len(ranks), size)])
        ranks = ranks[::size]
    return levels


def receivers(world_size: int) -> int:
    """The number of ranks to which rank 0 sends its numbers when those of all ranks are combined.

    No rank sends to more. Up to MOST_RANKS ranks these are all others; above them, with L levels of
    groups of g ranks, (2 L - 1) (g - 1): every level is used on the way up, and all but the last on
    the way down.

    >>> [receivers(ranks) for ranks in (1, 2, 16, 17, 64, 10_000)]
    [0, 1, 15, 11, 21, 63]
    """
    *below, top = [len(groups[0]) - 1 for groups in rank_groups(world_size)]
    return 2 * sum(below) + top
