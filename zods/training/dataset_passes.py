"""Passes over training examples between two steps: the refresh of the anchor, and the measurement
of the step size.

The engine owns one `DatasetPasses`. `zods.training.refresh` and `zods.training.step_size` evaluate
the losses and make the records. A request to stop abandons a pass: nothing of it is left then.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from zods.comm.stop_request import StopRequested
from zods.forward.evaluator import Evaluator
from zods.training.batch_position import BatchPosition
from zods.training.noise_meter import NoiseMeter
from zods.training.refresh import measure_refresh
from zods.training.replica_steps import ReplicaSteps
from zods.training.step_losses import StepLosses
from zods.training.step_size import measure_step_size
from zods.training.training_run import TrainingRun

logger = logging.getLogger(__name__)


class DatasetPasses:
    """Makes the records that precede a step, and commits them."""

    def __init__(
        self,
        run: TrainingRun,
        evaluator: Evaluator,
        losses: StepLosses,
        noise: NoiseMeter,
        position: BatchPosition,
        replica_steps: ReplicaSteps | None,
        polled: Callable[[], AbstractContextManager[Callable[[], None]]],
    ) -> None:
        """polled: a context in which requests to stop end a pass; it gives a function to call before
        each micro-batch, which raises StopRequested.
        """
        self._run, self._evaluator, self._losses = run, evaluator, losses
        self._noise, self._position, self._polled = noise, position, polled
        self._replica_steps = replica_steps
        self._zo = run.config.zeroth_order

    @property
    def anchor_is_due(self) -> bool:
        """Whether the anchor is refreshed before the next step."""
        state = self._run.state
        return self._run.anchor is not None and (
            state.anchor_step is None
            or state.global_steps - state.anchor_step >= self._zo.anchor_interval
        )

    @torch.no_grad()
    def refresh_anchor(self) -> None:
        """See `ZerothOrderEngine.refresh_anchor`."""
        run, zo = self._run, self._zo
        assert run.anchor is not None
        assert run.loader is not None
        run.flush()
        self.measure_step_size()
        split, total = self._losses.refresh_split()
        with self._pass_before_step() as poll:
            record, noise = measure_refresh(
                zo,
                self._evaluator,
                run.loader,
                run.state.global_steps,
                run.anchor_lr(),
                micro_batch=self._losses.rows // split[1],
                split=split,
                total=total,
                before_each=poll,
            )
        if not record.coefficients:
            if run.state.anchor_step is None:
                raise RuntimeError(
                    "the first anchor: the loss over the training set is not finite. Look at the "
                    "data."
                )
            logger.warning(
                "anchor at step %d: losses are not finite; the last anchor stays",
                run.state.global_steps,
            )
        (self._replica_steps or run).commit(record)
        self._noise.add_refresh(noise)

    @torch.no_grad()
    def measure_step_size(self) -> None:
        """Measure and record the step size, where the configuration asks for it and it is not known.

        A replica that follows knows it from the log: it joins after the leader's first step.
        """
        run = self._run
        if self._zo.lr != "auto" or run.recorder.step_size is not None:
            return
        assert run.loader is not None
        assert not run.recorder.follows
        run.flush()
        with self._pass_before_step() as poll:
            record = measure_step_size(
                self._zo,
                self._evaluator,
                run.loader,
                run.comm,
                run.state.global_steps,
                batch_size=run.config.deepspeed["train_batch_size"],
                micro_batch=run.config.deepspeed["train_micro_batch_size_per_gpu"],
                before_each=poll,
            )
        run.commit(record)
        if run.comm.rank == 0:
            logger.info("step %d: measured lr: %g", run.state.global_steps, record.lr)

    @contextlib.contextmanager
    def _pass_before_step(self) -> Iterator[Callable[[], None]]:
        """Evaluate training examples between two steps. Yields a function to call before each
        micro-batch, which raises StopRequested.
        """
        try:
            with self._polled() as poll:
                yield poll
        except StopRequested:
            self._position.go_back()
            self._run.watchdog.rest()
            raise
        self._losses.record_evaluation()
