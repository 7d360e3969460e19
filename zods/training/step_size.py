"""Measure the step size of a run whose configuration has `"lr": "auto"`, before its first step.

The losses of some training examples are evaluated at points along random directions. The
mathematics is that of `zods.core.step_size`. The step size that follows is tried on other examples,
and halved where it is too large for several steps. The parameters are never changed. Called by the
engine.
"""

from __future__ import annotations

import itertools
import math
import operator
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zods.comm.communicator import Communicator
from zods.config.schema import ZerothOrderConfig
from zods.core.example_groups import Group, group_starts
from zods.core.points import Center, Point, pair
from zods.core.step_size import Surroundings, curvature, rounded, suggest, tried
from zods.core.update_rule import StepRule
from zods.data.loader import TrainingLoader
from zods.data.order import anchor_order
from zods.forward.evaluator import Evaluator
from zods.forward.loss_sums import PassDifferences
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
NUM_HELD_OUT = 64  # examples with which the step size is tried


class _Probes:
    """Losses of training examples at points around the parameters, the same on all ranks.

    seeds: of the directions. held_out, others: indices of examples, a random order of the training
    set, or draws from the mixture. Each direction has some of `others` of its own: the mean
    gradients of two small sets differ by more than two directional derivatives of one of them.
    """

    def __init__(
        self,
        config: ZerothOrderConfig,
        evaluator: Evaluator,
        loader: TrainingLoader | SelectingLoader,
        comm: Communicator,
        step: int,
        micro_batch: int,
        how: dict[str, Any],
    ) -> None:
        """The arguments are those of `measure_step_size`."""
        self.seeds = StepRule(config).seeds("step_size", step, NUM_DIRECTIONS)
        size = len(loader.dataset)
        order = anchor_order(
            size, examples=None, shuffled=True, seed=self.seeds[0], mixture=loader.mixture
        )
        number = min(NUM_HELD_OUT, size // 4)
        self.held_out, self.others = order[: number or size], order[number:]
        self._evaluator, self._loader = evaluator, loader
        self._how = {
            "title": "step size",
            "micro_batch": max(1, min(micro_batch, MICRO_BATCH // comm.world_size)),
            "split": (comm.rank, comm.world_size),
            "total": comm.sum_over_ranks,
            **how,
        }

    def along(self, k: int, number: int, distance: float) -> PassDifferences:
        """Evaluate `number` of the examples of direction k at a distance on both sides."""
        at = torch.arange(min(number, len(self.others))) + k * NUM_EXAMPLES

        def pair_of(group: Group) -> list[Point]:
            return pair(self.seeds[k], distance, rows=group.rows)

        return self._differences(self.others[at % len(self.others)], pair_of)

    def rise(self, coefficients: Sequence[float]) -> float:
        """The loss of the held-out examples at parameters + sum_k coefficients[k] z_k, less that at
        the parameters.
        """
        seeds, moves = tuple(self.seeds), tuple(coefficients)

        def moved(_: Any, live: torch.Tensor) -> Center:
            return Center(live, 1.0, seeds, moves)

        def pair_of(group: Group) -> list[Point]:
            return [
                Point(seeds[0], 0.0, moved, rows=group.rows),
                Point(seeds[0], 0.0, rows=group.rows),
            ]

        return self._differences(self.held_out, pair_of).values[0]

    def _differences(
        self, examples: torch.Tensor, pair_of: Callable[[Group], list[Point]]
    ) -> PassDifferences:
        dataset, collate_fn = self._loader.dataset, self._loader.collate_fn
        return self._evaluator.differences_over(
            dataset, examples, [0], [pair_of], collate_fn, **self._how
        )


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
    probes = _Probes(config, evaluator, loader, comm, step, micro_batch, how)

    def loss_at(distance: float, directions: Sequence[int]) -> list[float]:
        return [probes.along(k, NUM_FEW, distance).means[0] for k in directions]

    loss, distance, rises = _rise(loss_at, range(NUM_CURVED), config.eps)
    found = [probes.along(k, NUM_EXAMPLES, config.eps) for k in range(NUM_DIRECTIONS)]
    means = [part.values[0] / (2.0 * config.eps) for part in found]
    # some examples may have no label that counts
    known = [math.isfinite(part.values[0]) and part.squares[0] > 0.0 for part in found]
    if math.isinf(rises[0]) or not any(known):
        raise RuntimeError(
            f"zeroth_order.eps ({config.eps:g}): too large for this model, the losses at its points "
            "are not finite; or too small, and they are all the same. Give another one."
        )
    examples = min(NUM_EXAMPLES, len(probes.others))
    around = Surroundings(
        curvature(RISE * abs(loss) or rises[-1], distance, rises),
        list(itertools.compress(means, known)),
        [
            examples * part.squares[0] / (2.0 * config.eps) ** 2
            for part in itertools.compress(found, known)
        ],
        found[known.index(True)].units,
        examples,
    )
    estimates = _estimates(config, batch_size, len(loader.dataset))
    gradient = [mean if finite else 0.0 for mean, finite in zip(means, known, strict=True)]
    size = math.sqrt(math.fsum(c * c for c in gradient))

    def rise(change: float) -> float:
        return probes.rise([-change / size * c for c in gradient])

    change = suggest(around, *estimates[0], normalize=True)
    factor = tried(rise, change, RISE * abs(loss))
    lr = factor * min(suggest(around, *of, normalize=config.normalize) for of in estimates)
    found_at = (loss, distance, around.trace, around.size, around.share)
    return StepSize(step, rounded(lr), *found_at, factor=factor)


def _rise(
    loss_at: Callable[[float, Sequence[int]], list[float]], directions: Sequence[int], eps: float
) -> tuple[float, float, list[float]]:
    """Find the distance from the parameters at which the loss has risen by the share RISE.

    loss_at: the loss at a distance, along each of some directions. Returns (loss at the parameters,
    distance, rises at it and before it at its halves down to eps).
    """
    # some examples may have no label that counts
    known = dict(zip(directions, loss_at(0.0, directions), strict=True))
    known = {k: loss for k, loss in known.items() if math.isfinite(loss)}
    if len(known) < 2:
        raise RuntimeError(
            'zeroth_order.lr: "auto" cannot be measured: the loss is not finite. Look at the data.'
        )
    loss, rises = statistics.mean(known.values()), list[float]()
    for doublings in range(MOST_DOUBLINGS):
        distance = eps * 2**doublings
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
