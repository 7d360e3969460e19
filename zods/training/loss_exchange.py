"""Sum a step's losses over the ranks of this world, or over the ranks of all replicas.

With the losses travel two flags: a rank was asked to stop, and a rank could not evaluate in the
form of evaluation that was chosen. The engine owns one `LossExchange`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from zods.comm.communicator import Communicator
from zods.training.replicas import Replicas
from zods.trajectory.log import Trajectory


class ReducedLosses(NamedTuple):
    """The losses of a step over all ranks, the same on each.

    losses: per set of directions (one set, or one per rank), the losses at its points, weighted so
    that their mean over the sets is the loss of the global batch; NaN where nothing was counted.
    should_stop: some rank was asked to stop. left_form: some rank left the form of evaluation.
    """

    losses: list[list[float]]
    should_stop: bool
    left_form: bool


class LossExchange:
    """Sends 8 bytes per point and rank."""

    def __init__(self, comm: Communicator, replicas: Replicas | None, *, per_rank: bool) -> None:
        """per_rank: each rank has directions of its own, so its losses are not added to others'."""
        self._comm, self._replicas, self._per_rank = comm, replicas, per_rank

    def step_losses(
        self,
        sums: Sequence[float],
        *,
        step: int,
        head: str,
        rows: int,
        asked: bool,
        left_form: bool,
    ) -> ReducedLosses:
        """Reduce a step's sums: a loss sum per point, then what the loss is a mean over.

        head: of the chain of records, which all replicas must have. rows: examples of a micro-batch
        over all ranks. asked, left_form: this rank's flags.
        """
        if self._replicas is not None:
            left = self._comm.sum_over_ranks([float(left_form)])[0] > 0
            total, should_stop = self._replicas.sum(sums, str(step), head, asked=asked, rows=rows)
            return ReducedLosses(_weighted([total]), should_stop, left)
        own = [*sums, float(left_form), float(asked)]
        rows_of_all = (
            self._comm.gather_scalars(own) if self._per_rank else [self._comm.sum_over_ranks(own)]
        )
        return ReducedLosses(
            _weighted([row[:-2] for row in rows_of_all]),
            should_stop=any(row[-1] for row in rows_of_all),
            left_form=any(row[-2] for row in rows_of_all),
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


def _weighted(sums: Sequence[Sequence[float]]) -> list[list[float]]:
    """Mean losses from (loss sums, count) of each set of directions.

    An estimate is linear in its losses. So the losses of a rank with directions of its own are
    weighted by the rank's share of what the loss is a mean over: then the mean over the ranks is
    that of the global batch.
    """
    mean_count = sum(count for *_, count in sums) / len(sums)
    return [
        [total / mean_count if mean_count else math.nan for total in totals] for *totals, _ in sums
    ]
