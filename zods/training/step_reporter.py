"""Report each step: to the caller, to DeepSpeed's monitor, and as warnings where it went wrong."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from zods.comm.communicator import Communicator
from zods.config.schema import SMOOTH_OBJECTIVES, ZerothOrderConfig
from zods.training.state import StepInFlight, TrainState
from zods.training.step_outputs import StepReport
from zods.trajectory.records import Step

logger = logging.getLogger(__name__)

TIED_STEPS = 100
RISE_STEPS, RISE = 20, 2.0  # a mean loss over so many steps is so many times that of the first ones


class StepReporter:
    def __init__(self, monitor: Any, config: ZerothOrderConfig, comm: Communicator) -> None:
        """monitor: DeepSpeed's."""
        self._monitor, self._config, self._comm = monitor, config, comm
        self._has_warned_of_zero = False
        self._losses: list[float] = []  # of the steps since the last comparison
        self._first_loss: float | None = None  # mean of the first RISE_STEPS steps
        self._divisor = math.inf  # of the step sizes, after the last step; not known at the start
        self._ties: list[bool] = []  # of the last steps with scores: whether all pairs were equal

    def report(
        self,
        state: TrainState,
        record: Step,
        in_flight: StepInFlight,
        loss: float,
        projected_grad: float,
        selection_seconds: float,
        noise: dict[str, float],
    ) -> StepReport:
        """Make the report of a step that was applied, and write it to the monitor.

        state: after the step. noise: figures of the estimates' noise.
        """
        report = StepReport(
            step=state.global_steps,
            loss=loss,
            projected_grad=projected_grad,
            lr=record.lr,
            scalar_bytes=self._comm.scalar_bytes - in_flight.bytes_before,
            seconds=time.perf_counter() - in_flight.began + selection_seconds,
            skipped=record.skipped,
            selection_seconds=selection_seconds,
            measured={**record.measured, **noise},
        )
        if self._monitor.enabled:
            events = {"loss": loss, "lr": record.lr, "projected_grad": projected_grad}
            self._monitor.write_events(
                [
                    (f"Train/Samples/{name}", value, state.global_samples)
                    for name, value in {**events, **report.measured}.items()
                ]
            )
        return report

    def warn(
        self,
        state: TrainState,
        record: Step,
        loss: float,
        projected_grad: float,
    ) -> None:
        """Warn of a step that was skipped, or whose projected gradient is exactly 0; of a loss that
        rises, or has divided the step size; with scores, where most steps tell nothing.

        Raises RuntimeError after `max_nonfinite_steps` skipped steps in a row.
        """
        if self._config.objective in SMOOTH_OBJECTIVES and not record.skipped:
            self._warn_of_rise(state, loss)
            self._tell_of_division(state)
        if record.skipped:
            self._warn_of_skipped(state, loss)
        elif self._config.objective != "loss":
            self._warn_of_ties(state, record)
        elif projected_grad == 0.0 and not self._has_warned_of_zero:
            self._has_warned_of_zero = True
            if self._comm.rank == 0:
                logger.warning(
                    "step %d: the projected gradient is exactly 0, because the losses of a pair of "
                    "points are the same number. Either no parameter that is trained reaches the "
                    "loss, or eps (%g) is lost in rounding. This is said once.",
                    state.global_steps,
                    self._config.eps,
                )

    def _warn_of_rise(self, state: TrainState, loss: float) -> None:
        """Warn once where the loss is RISE times that of the first steps since the run was started or
        resumed.
        """
        self._losses.append(loss)
        if len(self._losses) < RISE_STEPS:
            return
        mean = sum(self._losses) / RISE_STEPS
        self._losses.clear()
        if self._first_loss is None:
            self._first_loss = mean
        elif 0.0 < RISE * self._first_loss < mean:
            self._first_loss = math.inf
            if self._comm.rank == 0:
                logger.warning(
                    "step %d: the mean loss of the last %d steps is %.4g, more than %g times that of "
                    "the first ones. The step size is too large: stop the run, and give a smaller lr or "
                    "a schedule that lowers it. This is said once.",
                    *(state.global_steps, RISE_STEPS, mean, RISE),
                )

    def _tell_of_division(self, state: TrainState) -> None:
        divisor, before = state.annealing.divisor, self._divisor
        self._divisor = divisor
        if divisor > before and self._comm.rank == 0:
            logger.warning(
                "step %d: the loss has risen, to a mean of %.4g. From now on the step size is divided "
                "by %g in place of %g.",
                *(state.global_steps, state.annealing.previous_mean, divisor, before),
            )

    def _warn_of_ties(self, state: TrainState, record: Step) -> None:
        """Warn where most steps of the last TIED_STEPS had equal scores at all pairs of points."""
        self._ties.append(not any(record.coefficients or ()))
        if len(self._ties) == TIED_STEPS:
            if 2 * sum(self._ties) > TIED_STEPS and self._comm.rank == 0:
                logger.warning(
                    "step %d: in %d of the last %d steps all pairs of points had the same score, so "
                    "that they gave no estimate. Raise eps (%g) or the batch, or give more "
                    "num_directions.",
                    *(state.global_steps, sum(self._ties), TIED_STEPS, self._config.eps),
                )
            self._ties.clear()

    def _warn_of_skipped(self, state: TrainState, loss: float) -> None:
        logger.warning(
            "step %d skipped: a loss or a projected gradient is not finite; the mean loss is %s",
            *(state.global_steps, loss),
        )
        if state.nonfinite_in_a_row > self._config.max_nonfinite_steps:
            raise RuntimeError(
                f"{state.nonfinite_in_a_row} steps in a row had non-finite losses "
                f"(max_nonfinite_steps = {self._config.max_nonfinite_steps}). Lower lr or eps, or "
                f"look at the data. The last mean loss: {loss}."
            )
