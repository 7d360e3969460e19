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

    Where the batch has several groups, a rank sends those that its examples belong to, and to all
    other ranks, because each rank needs the coefficients of all groups. With one group, with
    replicas, or where any rank may be given any example, a rank sends all groups of the batch. Only
    the sums over the ranks are needed then, and with more than 16 ranks it sends to few others, see
    `zods.comm.rank_groups`.
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
        sent = [value for of_group in own for value in of_group]
        # counts last: between replicas they take fewer bytes, see `zods.training.replica_messages`
        sent += [sums.loss_sum, sums.squares, sums.count, sums.units, sums.examples]
        if self._replicas is not None:
            left = self._comm.sum_over_ranks([float(left_form)])[0] > 0
            total, should_stop = self._replicas.sum(sent, str(step), head, asked=asked, rows=rows)
            return self._reduced([total], pairs, should_stop, left)
        sent.append(_STOP * asked + _LEFT * left_form)
        received = (
            self._comm.gather_scalars(sent)
            if self._sends_own_groups
            else [self._comm.sum_over_ranks(sent)]
        )
        num_left, num_asked = divmod(int(sum(of_rank[-1] for of_rank in received)), _LEFT)
        return self._reduced(
            [of_rank[:-1] for of_rank in received],
            pairs,
            should_stop=num_asked > 0,
            left_form=num_left > 0,
        )

    def _reduced(
        self, received: Sequence[Sequence[float]], pairs: int, should_stop: bool, left_form: bool
    ) -> ReducedLosses:
        """Add what was received, of each rank in rank order, or the sums over all of them."""
        totals = [[0.0] * pairs for _ in range(self._num_groups)]
        loss_sum = count = squares = units = examples = 0.0
        senders = self._groups_of_ranks[: len(received)]  # sums: all ranks as one
        for groups, of_rank in zip(senders, received, strict=True):
            *values, loss_here, squares_here, count_here, units_here, examples_here = of_rank
            loss_sum, count = loss_sum + loss_here, count + count_here
            squares, units = squares + squares_here, units + units_here
            examples += examples_here
            for slot, group in enumerate(groups):
                of_group = values[slot * pairs : (slot + 1) * pairs]
                totals[group] = [a + b for a, b in zip(totals[group], of_group, strict=True)]
        # an estimate is the mean over the groups
        share = count / self._num_groups if count else math.nan
        return ReducedLosses(
            [[value / share for value in of_group] for of_group in totals],
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
