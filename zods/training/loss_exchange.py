"""Sum a step's losses over the ranks of this world, or over the ranks of all replicas.

With the losses travel two flags: a rank was asked to stop, and a rank could not evaluate in the
form of evaluation that was chosen. The engine owns one `LossExchange`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from zods.comm.communicator import Communicator
from zods.core.example_groups import divide, group_starts, positions_of
from zods.core.noise_scale import Spread
from zods.training.replicas import Replicas
from zods.training.step_points import StepSums
from zods.trajectory.log import Trajectory

_STOP, _LEFT = 1, 2**26  # a rank's flags in one number, whose sum over ranks counts both


class ReducedLosses(NamedTuple):
    """The losses of a step over all ranks, the same on each.

    differences: see `StepRule.estimate`. loss: the mean over the global batch and the points around
    the parameters. Both are NaN where nothing was counted. spread: of the differences, in their
    unit. examples: the number that was evaluated. should_stop: some rank was asked to stop.
    left_form: some rank left the form of evaluation.
    """

    differences: list[list[float]]
    loss: float
    spread: Spread
    examples: int
    should_stop: bool
    left_form: bool


class LossExchange:
    """Sends 8 bytes per pair of points of each group of examples, and 48 bytes.

    Where the batch has several groups, a rank sends the numbers of those that its examples belong to
    to all other ranks, because each rank needs the coefficients of all groups. Of other numbers
    only the sums over the ranks are needed; with more than 16 ranks they go to few others, see
    `zods.comm.rank_groups`. With replicas, or where any rank may be given any example, these are
    the numbers of all groups of the batch.
    """

    def __init__(
        self,
        comm: Communicator,
        replicas: Replicas | None,
        *,
        batch_size: int,
        accumulation: int,
        examples_per_direction: int | str,
        in_order: bool,
    ) -> None:
        """in_order: ranks are given the examples of a batch in the order of their positions."""
        self._comm, self._replicas = comm, replicas
        starts = group_starts(batch_size, examples_per_direction)
        self._num_groups = len(starts)
        self._sends_own_groups = in_order and replicas is None and len(starts) > 1
        self._groups_of_ranks = [
            sorted(
                {
                    group.index
                    for micro in range(accumulation)
                    for group in divide(
                        positions_of(batch_size, accumulation, micro, (rank, comm.world_size)),
                        starts,
                    )
                }
            )
            if self._sends_own_groups
            else list(range(len(starts)))
            for rank in range(comm.world_size)
        ]

    def step_losses(
        self,
        sums: StepSums,
        *,
        pairs: int,
        step: int,
        head: str,
        rows: int,
        asked: bool,
        left_form: bool,
    ) -> ReducedLosses:
        """Reduce a step's sums.

        sums: of this rank. pairs: of points per group. head: of the chain of records, which all
        replicas must have. rows: examples of a micro-batch over all ranks. asked, left_form: this
        rank's flags.
        """
        nothing = [0.0] * pairs
        most = max(map(len, self._groups_of_ranks))
        groups = self._groups_of_ranks[self._comm.rank]
        own = [sums.differences.get(group, nothing) for group in groups]
        own += [nothing] * (most - len(own))
        of_groups = [value for of_group in own for value in of_group]
        rest = [sums.loss_sum, sums.count, sums.squares, sums.units, sums.examples]
        if self._replicas is not None:
            left = self._comm.sum_over_ranks([float(left_form)])[0] > 0
            total, should_stop = self._replicas.sum(
                [*of_groups, *rest], str(step), head, asked=asked, rows=rows
            )
            return self._reduced(*_split(total, len(rest)), pairs, should_stop, left)
        rest.append(_STOP * asked + _LEFT * left_form)
        if self._sends_own_groups:
            received, totals = self._comm.gather_and_sum(of_groups, rest)
        else:
            received, totals = _split(self._comm.sum_over_ranks([*of_groups, *rest]), len(rest))
        num_left, num_asked = divmod(int(totals.pop()), _LEFT)
        return self._reduced(received, totals, pairs, num_asked > 0, num_left > 0)

    def _reduced(
        self,
        received: Sequence[Sequence[float]],
        totals: Sequence[float],
        pairs: int,
        should_stop: bool,
        left_form: bool,
    ) -> ReducedLosses:
        """Make the losses of a step.

        received: the differences of each rank's groups, in rank order, or one row of their sums over
        the ranks. totals: the sums of the other numbers.
        """
        differences = [[0.0] * pairs for _ in range(self._num_groups)]
        senders = self._groups_of_ranks[: len(received)]
        for groups, values in zip(senders, received, strict=True):
            for slot, group in enumerate(groups):
                of_group = values[slot * pairs : (slot + 1) * pairs]
                differences[group] = [
                    a + b for a, b in zip(differences[group], of_group, strict=True)
                ]
        loss_sum, count, squares, units, examples = totals
        # an estimate is the mean over the groups
        share = count / self._num_groups if count else math.nan
        return ReducedLosses(
            [[value / share for value in of_group] for of_group in differences],
            loss_sum / count if count else math.nan,
            Spread(squares / share**2, round(units)),
            round(examples),
            should_stop,
            left_form,
        )

    def refresh_split(
        self, step: int, trajectory: Trajectory
    ) -> tuple[tuple[int, int], Callable[[Sequence[float]], list[float]]]:
        """How a refresh of the anchor divides the training set: ((index of this rank's part, number
        of parts), a function that sums numbers over the parts).
        """
        replicas = self._replicas
        if replicas is None:
            return (self._comm.rank, self._comm.world_size), self._comm.sum_over_ranks
        tag = f"{step}, refresh"
        return replicas.split, lambda values: replicas.sum(values, tag, trajectory.head)[0]


def _split(total: list[float], num_last: int) -> tuple[list[list[float]], list[float]]:
    """The sums of the groups' numbers, as one row, and those of the others."""
    return [total[:-num_last]], total[-num_last:]
