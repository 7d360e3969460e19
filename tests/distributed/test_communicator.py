"""Numbers that are combined over many ranks: the same bits on every rank, and few bytes of each."""

from __future__ import annotations

import functools
import math
import random
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_ranks
from zods.comm import rank_groups
from zods.comm.communicator import Communicator, Disagreement

MANY = 19  # more than one group, and the last one has fewer ranks


def values_of(rank: int) -> list[float]:
    """Numbers whose sum depends on the order of the additions."""
    draw = random.Random(rank)
    return [draw.gauss(0.0, 10.0**magnitude) for magnitude in (0, 8, -8)]


def added(rows: list[list[float]]) -> list[float]:
    return [functools.reduce(lambda a, b: a + b, column, 0.0) for column in zip(*rows, strict=True)]


def rank_that_combines(most: int) -> dict[str, Any]:
    """Combine numbers in groups of at most `most` ranks, and let two ranks disagree."""
    rank_groups.MOST_RANKS = most
    comm = Communicator(torch.device("cpu"))
    found: dict[str, Any] = {"sums": comm.sum_over_ranks(values_of(comm.rank))}
    found["bytes"] = comm.scalar_bytes
    before = comm.scalar_bytes
    found["largest"] = comm.max_over_ranks(float(-comm.rank))
    comm.check_agreement(b"the same", "what all have")
    found["bytes of agreement"] = comm.scalar_bytes - before
    try:
        odd = comm.rank in (comm.world_size - 1, comm.world_size - 2)
        comm.check_agreement(b"another" if odd else b"the same", "a thing")
    except Disagreement as error:
        found["said"] = str(error)
    return found


@pytest.mark.parametrize(
    ("ranks", "most"),
    [(3, 16), (7, 2), (MANY, 16)],
    ids=["one group", "three levels", "two levels of the real size"],
)
def test_many_ranks_combine_numbers_in_groups_and_all_get_the_same_bits(ranks, most):
    found = run_ranks(ranks, rank_that_combines, most)
    for rank in found:
        assert rank["sums"] == found[0]["sums"]
        assert rank["largest"] == 0.0
        assert rank["said"].startswith(f"rank {ranks - 2}, {ranks - 1}: a thing differs")
    exact = [math.fsum(column) for column in zip(*map(values_of, range(ranks)), strict=True)]
    assert found[0]["sums"] == pytest.approx(exact, rel=1e-12)


def test_up_to_16_ranks_are_added_in_rank_order():
    (sums,) = {tuple(rank["sums"]) for rank in run_ranks(5, rank_that_combines, 16)}
    assert list(sums) == added([values_of(rank) for rank in range(5)])


def test_no_rank_sends_more_than_is_planned(monkeypatch):
    monkeypatch.setattr(rank_groups, "MOST_RANKS", 2)
    receivers = rank_groups.receivers(7)
    found = run_ranks(7, rank_that_combines, 2)
    assert max(rank["bytes"] for rank in found) == found[0]["bytes"] == 8 * 3 * receivers
    assert found[0]["bytes of agreement"] == 8 * 2 * receivers
