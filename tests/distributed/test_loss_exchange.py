"""A step's losses over many ranks: the sums, the flags, and the bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_ranks
from zods.comm import rank_groups
from zods.comm.communicator import Communicator
from zods.training.loss_exchange import LossExchange
from zods.training.step_points import StepSums

RANKS, BATCH, PAIRS = 7, 14, 3
MOST = 2  # ranks of a group: three levels
ASKED, LEFT = {2, 3}, {5}  # ranks with these flags, in a step of their own


def difference(group: int, pair: int) -> float:
    return (group + 1) / 8 + pair


def rank_of_three_steps(per_direction: int | str, most: int) -> dict[str, Any]:
    """Reduce the sums of three steps: without flags, with stop requests, with a rank that left."""
    rank_groups.MOST_RANKS = most
    comm = Communicator(torch.device("cpu"))
    exchange = LossExchange(
        comm,
        None,
        batch_size=BATCH,
        accumulation=1,
        examples_per_direction=per_direction,
        in_order=True,
    )
    examples = BATCH // RANKS
    first = comm.rank * examples
    groups = range(first, first + examples) if per_direction == 1 else [0]
    differences = {g: [difference(g, pair) for pair in range(PAIRS)] for g in groups}
    sums = StepSums(differences, 2.0 * comm.rank, examples, 1.0, 1, examples)
    steps = []
    for asked, left in ([set(), set()], [ASKED, set()], [set(), LEFT]):
        before = comm.scalar_bytes
        steps.append(
            exchange.step_losses(
                sums,
                pairs=PAIRS,
                step=0,
                head="",
                rows=BATCH,
                asked=comm.rank in asked,
                left_form=comm.rank in left,
            )
        )
    return {"steps": steps, "bytes": comm.scalar_bytes - before}


def means(groups: Iterable[int], num_ranks: int) -> list[list[float]]:
    """The differences over the share of a group; `num_ranks` ranks send each of them."""
    groups = list(groups)
    share = BATCH / len(groups)
    return [[num_ranks * difference(g, p) / share for p in range(PAIRS)] for g in groups]


@pytest.mark.parametrize("most", [16, MOST], ids=["one group of ranks", "three levels"])
@pytest.mark.parametrize("per_direction", [1, "all"])
def test_all_ranks_get_the_sums_and_the_flags_of_all(per_direction, most):
    found = run_ranks(RANKS, rank_of_three_steps, per_direction, most)
    assert all(rank["steps"] == found[0]["steps"] for rank in found)
    several = per_direction == 1
    expected = means(range(BATCH), 1) if several else means([0], RANKS)
    plain, stopped, left = found[0]["steps"]
    for step in (plain, stopped, left):
        torch.testing.assert_close(torch.tensor(step.differences), torch.tensor(expected))
        assert (step.loss, step.examples) == (2.0 * sum(range(RANKS)) / BATCH, BATCH)
    assert [(of.should_stop, of.left_form) for of in (plain, stopped, left)] == [
        (False, False),
        (True, False),
        (False, True),
    ]


def test_only_where_the_batch_has_several_groups_a_rank_sends_to_all_others(monkeypatch):
    monkeypatch.setattr(rank_groups, "MOST_RANKS", MOST)
    receivers = rank_groups.receivers(RANKS)
    assert receivers < RANKS - 1
    for per_direction, groups, others in ((1, BATCH // RANKS, RANKS - 1), ("all", 1, receivers)):
        found = run_ranks(RANKS, rank_of_three_steps, per_direction, MOST)
        assert found[0]["bytes"] == 8 * (groups * PAIRS + 6) * others
        assert max(rank["bytes"] for rank in found) == found[0]["bytes"]
