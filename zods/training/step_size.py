"""Measure the step size of a run whose configuration has `"lr": "auto"`, before its first step.

The losses of some training examples are evaluated at points along random directions. The
mathematics is that of `zods.core.step_size`. Called by the engine.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from zods.comm.communicator import Communicator
from zods.config.schema import ZerothOrderConfig
from zods.core.example_groups import Group, group_starts
from zods.core.points import Point, pair
from zods.core.step_size import Surroundings, curvature, rounded, suggest
from zods.core.update_rule import StepRule
from zods.data.loader import TrainingLoader
from zods.data.order import anchor_order
from zods.forward.evaluator import Evaluator, PassDifferences
from zods.selection.loaders import SelectingLoader
from zods.trajectory.records import StepSize

NUM_DIRECTIONS = 16
NUM_EXAMPLES = 16
MICRO_BATCH = 8  # over all ranks, at most; the losses of its parts give the spread of examples
# For the curvature, the distance from the parameters is doubled until the loss of few examples has
# risen by this share along two of some directions. At smaller distances the curvature of few
# examples varies by more than its mean, and in 16 bits it is lost in rounding.
RISE = 0.02
NUM_CURVED, NUM_FEW = 8, 8
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
    rule, population = StepRule(config), len(loader.dataset)
    # Each direction has examples of its own. The mean gradients of two small sets differ by more
    # than two directional derivatives of one of them.
    seeds = rule.seeds("step_size", step, NUM_DIRECTIONS)

    def losses(seed: int, examples: int, distance: float) -> PassDifferences:
        def pair_of(group: Group) -> list[Point]:
            return pair(seed, distance, rows=group.rows)

        return evaluator.differences_over(
            loader.dataset,
            anchor_order(
                population, examples=examples, shuffled=True, seed=seed, mixture=loader.mixture
            ),
            [0],
            [pair_of],
            loader.collate_fn,
            title="step size",
            micro_batch=max(1, min(micro_batch, MICRO_BATCH // comm.world_size)),
            split=(comm.rank, comm.world_size),
            total=comm.sum_over_ranks,
            **how,
        )

    def loss_at(distance: float, along: Sequence[int]) -> list[float]:
        return [losses(seed, NUM_FEW, distance).means[0] for seed in along]

    loss, distance, rises = _rise(loss_at, seeds[:NUM_CURVED], config.eps)
    found = [losses(seed, NUM_EXAMPLES, config.eps) for seed in seeds]
    found = [part for part in found if math.isfinite(part.values[0]) and part.squares[0] > 0.0]
    if math.isinf(rises[0]) or not found:
        raise RuntimeError(
            f"zeroth_order.eps ({config.eps:g}): too large for this model, the losses at its points "
            "are not finite; or too small, and they are all the same. Give another one."
        )
    examples = min(NUM_EXAMPLES, population)
    around = Surroundings(
        curvature(RISE * abs(loss) or rises[-1], distance, rises),
        [part.values[0] / (2.0 * config.eps) for part in found],
        [examples * part.squares[0] / (2.0 * config.eps) ** 2 for part in found],
        found[0].units,
        examples,
    )
    lr = min(
        suggest(around, *estimate, normalize=config.normalize)
        for estimate in _estimates(config, batch_size, population)
    )
    return StepSize(step, rounded(lr), loss, distance, around.trace, around.size, around.share)


def _rise(
    loss_at: Callable[[float, Sequence[int]], list[float]], seeds: Sequence[int], eps: float
) -> tuple[float, float, list[float]]:
    """Find the distance from the parameters at which the loss has risen by the share RISE.

    loss_at: the loss at a distance, along each of some directions. Returns (loss at the parameters,
    distance, rises at it and before it at its halves down to eps).
    """
    # some examples may have no label that counts
    known = dict(zip(seeds, loss_at(0.0, seeds), strict=True))
    known = {seed: loss for seed, loss in known.items() if math.isfinite(loss)}
    if len(known) < 2:
        raise RuntimeError(
            'zeroth_order.lr: "auto" cannot be measured: the loss is not finite. Look at the data.'
        )
    loss, rises = statistics.mean(known.values()), list[float]()
    for k in range(MOST_DOUBLINGS):
        distance = eps * 2**k
        there = map(operator.sub, loss_at(distance, list(known)), known.values())
        rises.append(sorted(math.inf if math.isnan(rise) else rise for rise in there)[-2])
        if rises[-1] >= RISE * abs(loss) and rises[-1] > 0.0:
            return loss, distance, rises
    raise RuntimeError(
        f'zeroth_order.lr: "auto" cannot be measured: the loss is {loss:.4g}, and rises by '
        f"{rises[-1]:.4g} at a distance of {distance:g} along random directions; {RISE:.0%} are "
        "needed. Give a number."
    )


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
