"""Groups of ranks: all ranks are in them, and none sends to many."""

from __future__ import annotations

import doctest
import math

import pytest

from zods.comm import rank_groups
from zods.comm.rank_groups import MOST_RANKS, receivers

SIZES = [*range(1, 70), 255, 256, 257, 4096, 4097, 10_000]


@pytest.mark.parametrize("world_size", SIZES)
def test_each_level_has_the_first_ranks_of_the_groups_below_and_the_last_has_one_group(world_size):
    levels = rank_groups.rank_groups(world_size)
    expected = list(range(world_size))
    for groups in levels:
        assert [rank for group in groups for rank in group] == expected
        assert all(1 <= len(group) <= MOST_RANKS for group in groups)
        expected = [group[0] for group in groups]
    assert expected == [0]


def test_a_rank_sends_to_all_others_up_to_16_ranks_and_to_few_above():
    assert [receivers(n) for n in range(1, MOST_RANKS + 1)] == list(range(MOST_RANKS))
    for world_size in SIZES[MOST_RANKS:]:
        depth = math.ceil(math.log(world_size, MOST_RANKS) - 1e-9)
        assert receivers(world_size) <= min(world_size, (2 * depth - 1) * (MOST_RANKS - 1))


def test_the_examples_of_its_docstrings_are_right():
    assert doctest.testmod(rank_groups).failed == 0
