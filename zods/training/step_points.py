"""The points at which the examples of a step are evaluated, and the sums of their losses.

A group of examples has `num_directions` directions of its own, and a pair of points along each: at
the parameters, and for MeZO-SVRG another at the anchor. Called by the engine.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zods.comm.communicator import Communicator
from zods.config.schema import ZerothOrderConfig
from zods.core.example_groups import Group, divide, group_starts, positions_of
from zods.core.points import Point, pair
from zods.core.update_rule import StepRule
from zods.data.batch import POSITIONS, num_examples, positions_in
from zods.forward.loss_sums import PairSums
from zods.params.anchor import Anchor

logger = logging.getLogger(__name__)

MANY_TERMS = 1000  # of a point that is not stored; each is a pass over the parameters per forward


@dataclass(frozen=True)
class StepSums:
    """The sums of a step over the micro-batches of this rank, of losses and of their differences.

    differences: for each group, one per pair of points. loss_sum: at the parameters. count: what
    the loss is a mean over. squares, units: see `PairSums`; along the directions at the parameters.
    examples: number of rows.
    """

    differences: dict[int, list[float]]
    loss_sum: float
    count: float
    squares: float
    units: int
    examples: int


class StepPoints:
    """The points of a run's steps.

    num_pairs: pairs of points of each group of examples.
    """

    def __init__(
        self,
        config: ZerothOrderConfig,
        anchor: Anchor | None,
        *,
        batch_size: int,
        accumulation: int,
    ) -> None:
        """batch_size: examples of a step. accumulation: micro-batches of a step, on each rank."""
        self._config, self._rule, self._anchor = config, StepRule(config), anchor
        self._batch_size, self._accumulation = batch_size, accumulation
        self._starts = group_starts(batch_size, config.examples_per_direction)
        self.num_pairs = config.num_directions * (1 if anchor is None else 2)
        most_terms = len(self._starts) * config.num_directions * config.anchor_interval
        if anchor is not None and anchor.point is None and most_terms > MANY_TERMS:
            logger.warning(
                'zeroth_order.anchor.point: "terms" takes back every step since the refresh in each '
                "forward, up to %d directions here. Use cpu or nvme, a smaller anchor_interval or "
                "larger groups (examples_per_direction).",
                most_terms,
            )

    def groups(self, batch: Any, micro: int, split: tuple[int, int]) -> list[Group]:
        """The groups of a micro-batch's rows that share directions.

        micro: its number in the step. split: (index of this rank, number of ranks) that share a
        batch. Raises ValueError where it has more rows than a micro-batch of this configuration.
        """
        if len(self._starts) == 1:
            return [Group(0, None)]
        rows, given = num_examples(batch), positions_in(batch)
        if given is not None:
            if len(given) != rows or not all(0 <= one < self._batch_size for one in given):
                raise ValueError(
                    f"the batch: {POSITIONS} has {given}; expected one position from 0 to "
                    f"{self._batch_size - 1} for each of {rows} examples."
                )
            return divide(given, self._starts)
        own = positions_of(self._batch_size, self._accumulation, micro, split)
        if rows > len(own):
            raise ValueError(
                f"the batch: it has {rows} examples, and train_micro_batch_size_per_gpu is "
                f"{len(own)}. With examples_per_direction {self._config.examples_per_direction} "
                "give as many or fewer: an example's direction follows from its position."
            )
        return divide(own[:rows], self._starts)

    def pairs(self, step: int) -> list[Callable[[Group], list[Point]]]:
        """Functions that map a group of rows to one of its pairs of points: at the parameters, then
        at the anchor.
        """

        seeds_of = functools.cache(functools.partial(self._rule.step_seeds, step))

        def pair_of(group: Group, k: int, at_anchor: bool) -> list[Point]:
            seed = seeds_of(group.index)[at_anchor][k]
            center = {"center": self._anchor.center} if self._anchor and at_anchor else {}
            return pair(seed, self._config.eps, rows=group.rows, **center)

        return [
            functools.partial(pair_of, k=k, at_anchor=at_anchor)
            for at_anchor in (False, True)[: 1 if self._anchor is None else 2]
            for k in range(self._config.num_directions)
        ]

    def loss_at_parameters(self, sums: PairSums) -> torch.Tensor:
        """The sum of a micro-batch's losses, mean over the points around the parameters, 0-d."""
        return sums.sums[: self._config.num_directions].mean()

    def total(self, sums: Sequence[PairSums], comm: Communicator) -> StepSums:
        """Add up the micro-batches of a step."""
        differences = torch.cat([s.differences.flatten() for s in sums])
        at_parameters = torch.stack([self.loss_at_parameters(s) for s in sums]).sum()
        count = torch.stack([s.count for s in sums]).sum()
        squares = torch.stack([s.squares[: self._config.num_directions].sum() for s in sums]).sum()
        *values, loss_sum, total, of_units = comm.numbers(
            torch.cat([differences, torch.stack([at_parameters, count, squares])])
        )
        by_group: dict[int, list[float]] = {}
        for slot, group in enumerate(group for s in sums for group in s.groups):
            of_group = values[slot * self.num_pairs : (slot + 1) * self.num_pairs]
            before = by_group.get(group, [0.0] * self.num_pairs)
            by_group[group] = [a + b for a, b in zip(before, of_group, strict=True)]
        units = sum(s.units for s in sums)
        examples = sum(s.examples for s in sums)
        return StepSums(by_group, loss_sum, total, of_units, units, examples)
