"""Messages about the size of a run's stack, and about the rank of its directions."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import zods
from tests.distributed.models import configuration, opt_data, tiny_opt, train
from tests.distributed.ranks import run_ranks
from tests.helpers import LogTexts

DIRECTIONS = 4
ROWS = 4  # rows of a micro-batch on each of two ranks


def build(**arguments: Any) -> Any:
    section = {"method": "mezo", "lr": 1e-3, "eps": 1e-2, "num_directions": DIRECTIONS, **arguments}
    return zods.initialize(
        model=tiny_opt(), config=configuration(2 * ROWS, **section), training_data=opt_data()
    )[0]


def rank_of_budgets() -> dict[str, Any]:
    """By budget, the rows of each forward of a step, and the step's loss.

    Also the error message of a budget that is too small.
    """
    found: dict[str, Any] = {}
    engine = build(stream_memory_gb=1e-9)
    try:
        train(engine, opt_data(), range(1))
    except ValueError as error:
        found["refused"] = str(error)
    needed = float(found["refused"].split("takes ")[1].split(" GiB")[0])
    length, vocabulary = len(opt_data()[0]["input_ids"]), engine.module.config.vocab_size
    found["needed"] = (needed * 2**30, 2 * ROWS * length * vocabulary * 4)
    for pairs in (1, 2, 3, 1000):
        engine = build(stream_memory_gb=1.01 * pairs * needed)
        rows: list[int] = []
        hook = engine.module.register_forward_pre_hook(
            lambda _m, _a, kw, rows=rows: rows.append(len(kw["input_ids"])), with_kwargs=True
        )
        # The second and the third step check the form once more.
        train(engine, opt_data(), range(3))
        rows.clear()
        (loss,) = train(engine, opt_data(), [3])
        hook.remove()
        found[pairs] = (rows, loss)
    return found


@pytest.fixture(scope="module")
def budgets() -> list[dict[str, Any]]:
    return run_ranks(2, rank_of_budgets)


def test_points_that_exceed_the_budget_go_through_several_forwards_with_the_same_losses(budgets):
    for rank in budgets:
        assert rank[1][0] == [2 * ROWS] * DIRECTIONS
        assert rank[2][0] == [4 * ROWS] * 2
        assert rank[3][0] == [6 * ROWS, 2 * ROWS]
        assert rank[1000][0] == [2 * DIRECTIONS * ROWS]
        for pairs in (1, 2, 3):
            assert rank[pairs][1] == pytest.approx(rank[1000][1], rel=1e-6)


def test_a_pair_of_points_needs_at_least_its_logits(budgets):
    for rank in budgets:
        needed, logits = rank["needed"]
        assert needed >= 0.99 * logits  # three digits are said


def test_a_budget_too_small_for_a_pair_says_what_a_pair_needs(budgets):
    said = {rank["refused"] for rank in budgets}
    assert len(said) == 1, "all ranks say the same"
    text = said.pop()
    assert "zeroth_order.stream_memory_gb: found 1e-09" in text
    assert "smaller micro-batch" in text


def rank_of_ranks() -> list[str]:
    """The warnings of a run whose rank is above the smaller side of one of its matrices."""
    said = LogTexts(level=logging.WARNING)
    engine = build(direction={"distribution": "low_rank", "rank": 19})
    train(engine, opt_data(), range(2))
    return said.texts


def test_a_rank_above_a_matrix_smaller_side_is_reduced_there_and_said_once():
    first, second = run_ranks(2, rank_of_ranks)
    (text,) = first
    assert (
        "direction.rank 19 is reduced to the smaller side of model.decoder.embed_positions.weight "
        "(18)" in text
    )
    assert second == []
