"""The losses of several points, in the form that "auto" chooses, are those of separate forwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.forms import POINTS, compare, engine_of
from tests.distributed.models import stored_digest
from tests.distributed.ranks import run_ranks
from tests.distributed.zoo import ZOO, with_adapters, zoo_batch, zoo_model
from tests.helpers import asked_for, sampled

DIRECTIONS: dict[str, Any] = {
    "gaussian": "gaussian",
    "rademacher": "rademacher",
    "rank 1": {"distribution": "low_rank", "rank": 1},
    "rank 3": {"distribution": "low_rank", "rank": 3},
}
BATCHES: dict[str, Callable[[str], Any]] = {  # The form is chosen on the first batch.
    "first": zoo_batch,
    "padded": functools.partial(zoo_batch, padded=True, seed=1),
    "longer": functools.partial(zoo_batch, size=3, length=23, padded=True, seed=2),
    "last, of one": functools.partial(zoo_batch, size=1, length=7, seed=3),
}
ASKED = {  # By the number of ranks, because a forward under ZeRO-3 takes long.
    1: [
        ("first", "two pairs"),
        ("first", "drifted"),
        ("padded", "drifted"),
        ("padded", "stored elsewhere"),
        ("longer", "stored elsewhere"),
        ("last, of one", "two pairs"),
    ],
    2: [("first", "two pairs"), ("longer", "drifted"), ("last, of one", "stored elsewhere")],
}
# By the number of ranks. On 2 ranks the models are sharded.
LOCKSTEP = {1: {"t5"}, 2: {"t5", "bert, masked", "mamba"}}


@torch.no_grad()
def evaluations(
    make: Callable[[], nn.Module], asked: Sequence[tuple[Any, str]], **arguments: Any
) -> dict[str, Any]:
    """Evaluate several points together and separately.

    asked: (batch, key of POINTS) of each evaluation. Returns the comparisons, and whether all
    stored weights kept their bits.
    """
    engine = engine_of(make(), **arguments)
    before = stored_digest(engine)
    found = [compare(engine._evaluator, POINTS[what], batch) for batch, what in asked]
    return {"found": found, "kept": stored_digest(engine) == before}


# (name, direction, LoRA, bf16) by the number of ranks. Most cases run on one rank, where a forward
# is cheap.
CASES = {
    1: [
        *((name, direction, False, False) for name in ZOO for direction in DIRECTIONS),
        *(
            (name, direction, True, False)
            for name in ("llama", "gpt2", "bert", "t5")
            for direction in ("gaussian", "rank 1")
        ),
        *((name, direction, False, True) for name in ("llama", "bert") for direction in DIRECTIONS),
    ],
    2: [
        *((name, direction, False, False) for name in ZOO for direction in ("gaussian", "rank 3")),
        ("llama", "rank 1", True, False),
        ("gpt2", "gaussian", True, False),
    ],
}
# The others are slow: every model and every direction, but not each with each.
DEFAULT = {
    1: [
        *(
            (name, direction, False, False)
            for name, direction in zip(ZOO, cycle(DIRECTIONS), strict=False)
        ),
        ("llama", "rank 1", True, False),
        ("bert", "rank 3", False, True),
    ],
    2: [
        *(("opt", "gaussian", False, False), ("bert", "rank 3", False, False)),
        *(("t5", "rank 3", False, False), ("mamba", "gaussian", False, False)),
        ("llama", "rank 1", True, False),
    ],
}


def rank_of_cases(world_size: int, cases: list[tuple[str, str, bool, bool]]) -> dict[Any, Any]:
    found = {}
    for name, direction, lora, bf16 in cases:
        make = functools.partial(with_adapters if lora else zoo_model, name)
        asked = [(BATCHES[kind](name), what) for kind, what in ASKED[world_size]]
        found[name, direction, lora, bf16] = evaluations(
            make, asked, direction=DIRECTIONS[direction], bf16=bf16
        )
    return found


@pytest.fixture(scope="module")
def one_rank(request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    return run_ranks(1, rank_of_cases, 1, asked_for(request, "case", CASES[1], DEFAULT[1]))


@pytest.fixture(scope="module")
def two_ranks(request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    return run_ranks(2, rank_of_cases, 2, asked_for(request, "case", CASES[2], DEFAULT[2]))


def named(case: tuple[str, str, bool, bool]) -> str:
    name, direction, lora, bf16 = case
    return "-".join([name, direction, *["LoRA"] * lora, *["bf16"] * bf16])


def check(ranks: list[dict[Any, Any]], case: tuple[str, str, bool, bool]) -> None:
    """Compare within a tolerance that rounding explains.

    The two differ only in the order of float32 sums: 1e-5 is 80 units in the last digit of a loss.
    In bf16, activations are rounded by up to 2^-9 of their size. A loss is the mean over dozens of
    logits and has their size, so one such rounding is enough. The losses of different points must
    differ by far more than float32's tolerance.
    """
    name, _, _, bf16 = case
    tolerance = 2.0**-9 if bf16 else 1e-5
    for rank in ranks:
        assert rank[case]["kept"], "an evaluation changed the stored weights"
        for what, found in zip(ASKED[len(ranks)], rank[case]["found"], strict=True):
            assert found.form == ("lockstep" if name in LOCKSTEP[len(ranks)] else "stacked"), what
            assert found.error < tolerance, f"{what}: {found}"
            assert found.apart > 1e-4, f"{what}: {found}"


@pytest.mark.parametrize("case", sampled(CASES[1], DEFAULT[1]), ids=named)
def test_losses_of_several_points_at_once_are_those_of_separate_forwards(one_rank, case):
    check(one_rank, case)


@pytest.mark.parametrize("case", sampled(CASES[2], DEFAULT[2]), ids=named)
def test_losses_of_several_points_at_once_are_those_of_separate_forwards_on_two_ranks(
    two_ranks, case
):
    check(two_ranks, case)
