"""The noise that an engine measures, against the losses of single examples in the dense reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import zods
from tests.distributed.models import configuration
from tests.distributed.ranks import run_ranks
from tests.distributed.zoo import zoo_batch, zoo_model
from tests.reference.dense import DenseReference, loss_of_module, named_parameters_of
from zods.core.directions import derive_seed
from zods.core.example_groups import group_starts, part_starts
from zods.core.noise_scale import NoiseScale, Spread, measure, precision
from zods.data.order import anchor_order

BATCH, LENGTH = 8, 6
SECTION = {"method": "mezo", "eps": 1e-2, "lr": 1e-3, "seed": 5}
# name -> (keys of the section and of the configuration, rows of the units of a step)
SINGLE = [[row] for row in range(BATCH)]
CASES: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
    "all": ({"examples_per_direction": "all"}, SINGLE),
    "two directions": ({"examples_per_direction": 4, "num_directions": 2}, SINGLE),
    "uneven": ({"examples_per_direction": 3}, SINGLE),
    "accumulation": ({"examples_per_direction": "all", "accumulation": 2}, SINGLE),
    # the losses of rows are not computed: a unit is a rank's part of a micro-batch
    "sequential": (
        {"examples_per_direction": "all", "evaluation": "sequential", "accumulation": 2},
        [[0, 1], [2, 3], [4, 5], [6, 7]],
    ),
    "sequential, groups": (
        {"examples_per_direction": 6, "evaluation": "sequential"},
        [[0, 1, 2, 3], [4, 5], [6, 7]],
    ),
}
REFRESHES = {
    "in parts": {"anchor_directions": 3},
    "whole": {"anchor_directions": 2, "anchor_split": False},
    "of some examples": {"anchor_directions": 2, "anchor_examples": 5},
}


def the_batch() -> dict[str, torch.Tensor]:
    """The batch of a step, and the training set. Rows have different numbers of tokens."""
    return zoo_batch("opt", BATCH, LENGTH, padded=True, seed=3)


def rank_of_measures() -> dict[str, tuple[float, float]]:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batch = the_batch()
    found = {}
    for name, (keys, _) in CASES.items():
        engine = zods.initialize(
            model=zoo_model("opt"), config=configuration(BATCH, **{**SECTION, **keys})
        )[0]
        accumulation = keys.get("accumulation", 1)
        size = BATCH // (ranks * accumulation)
        for micro in range(accumulation):
            start = (micro * ranks + rank) * size
            rows = {key: value[start : start + size] for key, value in batch.items()}
            engine.backward(engine(rows))
            engine.step()
        found[name] = (engine.noise.noise.noise, engine.noise.noise.signal)
        engine.close()
    examples = [{key: value[i] for key, value in batch.items()} for i in range(BATCH)]
    for name, keys in REFRESHES.items():
        section = {**SECTION, "method": "mezo_svrg", **keys}
        engine = zods.initialize(
            model=zoo_model("opt"), config=configuration(BATCH, **section), training_data=examples
        )[0]
        engine.refresh_anchor()
        found[name] = (engine.noise.noise.noise, engine.noise.noise.signal)
        engine.close()
    return found


class Dense:
    """Differences of the losses of single examples."""

    def __init__(self) -> None:
        model = zoo_model("opt")
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self.reference = DenseReference(
            named_parameters_of(model),
            loss_of_module(model.double(), lambda outputs, _: outputs["loss"]),
            trainable=trainable,
            eps=SECTION["eps"],
        )
        self.batch = the_batch()
        self.tokens = (self.batch["labels"][:, 1:] != -100).sum(1).tolist()

    def difference(self, row: int, seed: int) -> float:
        """Of the sums over the row's tokens."""
        one = {key: value[row : row + 1] for key, value in self.batch.items()}
        grad = self.reference.projected_grad(self.reference.params, seed, one, [])
        return grad * 2 * SECTION["eps"] * self.tokens[row]

    def measured(
        self,
        groups: list[list[int]],
        units: list[list[int]],
        seeds: list[list[int]],
        population: int | None,
    ) -> NoiseScale:
        """groups, units: rows. seeds: of each group."""
        rows = [row for group in groups for row in group]
        scale = len(rows) / sum(self.tokens[row] for row in rows)
        sums, squares = [], 0.0
        for group, of_group in zip(groups, seeds, strict=True):
            x = {(r, s): scale * self.difference(r, s) for r in group for s in of_group}
            sums.append([sum(x[row, seed] for row in group) for seed in of_group])
            for unit in units:
                if unit[0] in group:
                    squares += sum(sum(x[r, s] for r in unit) ** 2 for s in of_group) / len(unit)
        spread = Spread(squares, len(units))
        found = measure(sums, [len(group) for group in groups], spread, population)
        weight = precision(len(rows) / len(groups), population)
        return NoiseScale(weight * found.noise, weight * found.signal)


@pytest.fixture(scope="module")
def dense() -> Dense:
    return Dense()


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, tuple[float, float]]]:
    return run_ranks(2, rank_of_measures)


def assert_equal(found: tuple[float, float], expected: NoiseScale) -> None:
    """Float32 losses of about 4 have errors of some 2^-22, differences along a direction are near
    0.05: the relative error of a square is below 1e-3.
    """
    assert expected.noise > 0.0
    assert found == pytest.approx((expected.noise, expected.signal), rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_a_step_measures_the_spread_of_examples_that_share_a_direction(ranks, dense, name):
    keys, units = CASES[name]
    starts = [*group_starts(BATCH, keys["examples_per_direction"]), BATCH]
    groups = [list(range(a, b)) for a, b in itertools.pairwise(starts)]
    number = keys.get("num_directions", 1)
    seeds = [
        [derive_seed(SECTION["seed"], "step", 0, g * number + k) for k in range(number)]
        for g in range(len(groups))
    ]
    expected = dense.measured(groups, units, seeds, None)
    for found in ranks:
        assert_equal(found[name], expected)


@pytest.mark.parametrize("name", REFRESHES)
def test_a_refresh_measures_the_spread_of_examples_that_share_a_direction(ranks, dense, name):
    keys = REFRESHES[name]
    number, splits = keys["anchor_directions"], keys.get("anchor_split", True)
    order = anchor_order(
        BATCH,
        examples=keys.get("anchor_examples"),
        shuffled=splits,
        seed=derive_seed(SECTION["seed"], "anchor_examples", 0, 0),
    ).tolist()
    seeds = [derive_seed(SECTION["seed"], "anchor", 0, k) for k in range(number)]
    parts = number if splits else 1
    starts = [*part_starts(len(order), parts), len(order)]
    groups = [order[a:b] for a, b in itertools.pairwise(starts)]
    of_groups = [[seed] for seed in seeds] if splits else [seeds]
    expected = dense.measured(groups, [[row] for row in order], of_groups, BATCH)
    for found in ranks:
        assert_equal(found[name], expected)
