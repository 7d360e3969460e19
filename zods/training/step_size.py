"""Measure the step size of a run whose configuration has `"lr": "auto"`, before its first step.

The losses of some training examples are evaluated at points along random directions. The
mathematics is that of `zods.core.step_size`. Called by the engine.
"""

from __future__ import annotations

import math
import operator
import statistics
from typing import Any

from zods.comm.communicator import Communicator
from zods.config.schema import ZerothOrderConfig
from zods.core.example_groups import Group, group_starts
from zods.core.points import Point, pair
from zods.core.step_size import Surroundings, curvature, rounded, suggest
from zods.core.update_rule import StepRule
from zods.data.loader import TrainingLoader, anchor_order
from zods.forward.evaluator import Evaluator, PassDifferences
from zods.selection.loaders import SelectingLoader
from zods.trajectory.records import StepSize

NUM_DIRECTIONS = 16
NUM_EXAMPLES = 16
MICRO_BATCH = 8  # at most, so that the spread is known also where the losses of rows are not
# For the curvature, the distance from the parameters is doubled until the loss has risen by this
# share, in the upper quartile of some directions. At smaller distances the curvature of few examples varies
# by more than its mean, and in 16 bits it is lost in rounding.
RISE = 0.02
NUM_CURVED = 8
MOST_DOUBLINGS = 12


def measure_step_size(
    config: ZerothOrderConfig,
    evaluator: Evaluator,
    loader: TrainingLoader | SelectingLoader,
    comm: Communicator,
    step: int,
    *,
    batch_size: int,
    micro_batch: int,
    **how: Any,
) -> StepSize:
    """Measure the step size before `step`, and return its record.

    batch_size: examples of a step. micro_batch: examples per forward and rank. how: the other
    keyword arguments of `Evaluator.differences_over`. Collective, with the same result on all
    ranks. Raises RuntimeError where the loss is not finite, or does not rise.
    """
    rule, population = StepRule(config), len(loader.dataset)  # type: ignore[arg-type]
    # Each direction has examples of its own. The mean gradients of two small sets differ by more
    # than two directional derivatives of one of them.
    seeds = rule.seeds("step_size", step, NUM_DIRECTIONS)

    def losses(seed: int, examples: int, distance: float) -> PassDifferences:
        def pair_of(group: Group) -> list[Point]:
            return pair(seed, distance, rows=group.rows)

        return evaluator.differences_over(
            loader.dataset,
            anchor_order(population, examples=examples, shuffled=True, seed=seed),
            [0],
            [pair_of],
            loader.collate_fn,
            title="step size",
            micro_batch=min(micro_batch, MICRO_BATCH),
            split=(comm.rank, comm.world_size),
            total=comm.sum_over_ranks,
            **how,
        )

    def loss_at(distance: float) -> list[float]:
        return [losses(seed, MICRO_BATCH, distance).means[0] for seed in seeds[:NUM_CURVED]]

    at_parameters, distance = loss_at(0.0), config.eps
    loss, rises = statistics.mean(at_parameters), list[float]()
    for _ in range(MOST_DOUBLINGS):
        excess = sorted(map(operator.sub, loss_at(distance), at_parameters))
        rises.append(excess[NUM_CURVED * 3 // 4])
        if not rises[-1] < RISE * abs(loss):
            break
        distance *= 2.0
    found = [losses(seed, NUM_EXAMPLES, config.eps) for seed in seeds]
    values = [part.values[0] for part in found]
    if not all(map(math.isfinite, (*rises, *values))) or rises[-1] < RISE * abs(loss):
        raise RuntimeError(
            f'zeroth_order.lr: "auto" cannot be measured: the loss is {loss:.4g}, and '
            f"rises by {rises[-1]:.4g} at a distance of {distance:g} along random directions; it should "
            f"rise by {RISE:.0%} at some distance from eps ({config.eps:g}) on. Look at the data, "
            "lower eps, or give a number."
        )
    if not any(part.squares[0] for part in found):
        raise RuntimeError(
            f"zeroth_order.eps ({config.eps:g}): too small for this model; the losses of all pairs of "
            "points are the same numbers. Give a larger one."
        )
    examples = min(NUM_EXAMPLES, population)
    around = Surroundings(
        curvature(RISE * abs(loss), distance, rises),
        [value / (2.0 * config.eps) for value in values],
        [examples * part.squares[0] / (2.0 * config.eps) ** 2 for part in found],
        found[0].units,
        examples,
    )
    lr = min(
        suggest(around, *estimate, normalize=config.normalize)
        for estimate in _estimates(config, batch_size, population)
    )
    return StepSize(step, rounded(lr), loss, distance, around.trace, around.size, around.share)


def num_forwards(found: StepSize, eps: float) -> int:
    """The number of forwards of one example that a measurement took, with enough examples."""
    distances = 2 + round(math.log2(found.distance / eps))
    return 2 * (NUM_DIRECTIONS * NUM_EXAMPLES + NUM_CURVED * MICRO_BATCH * distances)


def _estimates(
    config: ZerothOrderConfig, batch_size: int, population: int
) -> list[tuple[int, float]]:
    """(directions, examples of each) of the estimates that make the run's steps.

    A step of MeZO-SVRG just after a refresh is made along the anchor's gradient alone.
    """
    groups = len(group_starts(batch_size, config.examples_per_direction))
    estimates = [(groups * config.num_directions, batch_size / groups)]
    if config.is_svrg:
        parts = config.anchor_directions if config.anchor_split else 1
        examples = min(config.anchor_examples or population, population)
        estimates.append((config.anchor_directions, examples / parts))
    return estimates
