"""The parts of a training run that its records change: parameters, anchor, schedules, loader,
counters.

The engine makes a record of each step; a resume reads records from a log. Both apply them through
`TrainingRun`. A checkpoint stores and restores these parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zods.comm.communicator import Communicator, Disagreement
from zods.comm.watchdog import Watchdog
from zods.config.deepspeed_json import RunConfig
from zods.core import annealing
from zods.core.anchor_weight import AnchorWeight, record_products
from zods.core.directions import Direction
from zods.core.estimators import Update
from zods.core.step_scale import StepScale, record_estimate
from zods.data.loader import TrainingLoader
from zods.params.anchor import Anchor
from zods.params.deferred_update import DeferredUpdate
from zods.params.shards import ShardedParameters
from zods.params.zero3_adapter import release_gathered
from zods.selection.loaders import SelectingLoader
from zods.training.recorder import Recorder
from zods.training.state import TrainState
from zods.trajectory.records import Record, Refresh, Step, StepSize
from zods.trajectory.updates import direction_of


@dataclass(frozen=True)
class TrainingRun:
    """One rank's parts of a run. All ranks call its methods together.

    deepspeed: the DeepSpeedEngine that shards the model. parameters: this rank's shards of the
    trainable parameters. anchor: None unless the method is MeZO-SVRG. deferred: the update of
    parameters that are not loaded; None unless parameters are offloaded. lr_scheduler, loader: may
    be None.
    """

    config: RunConfig
    comm: Communicator
    deepspeed: Any
    parameters: ShardedParameters
    direction: Direction
    anchor: Anchor | None
    deferred: DeferredUpdate | None
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    loader: TrainingLoader | SelectingLoader | None
    recorder: Recorder
    state: TrainState
    watchdog: Watchdog

    @classmethod
    def build(
        cls,
        config: RunConfig,
        deepspeed_engine: Any,
        comm: Communicator,
        parameters: ShardedParameters,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        loader: TrainingLoader | SelectingLoader | None,
        watchdog: Watchdog,
    ) -> TrainingRun:
        """A run at step 0, with the anchor, the deferred update and the recorder that `config` asks
        for.
        """
        zo, zero = config.zeroth_order, config.deepspeed.get("zero_optimization", {})
        direction = direction_of(zo)
        anchor = None
        if zo.is_svrg:
            aio = config.deepspeed.get("aio", {})
            anchor = Anchor(zo.anchor, parameters, comm, direction=direction, aio=aio)
        offloads = zero.get("offload_param", {}).get("device", "none") != "none"
        micro_batch = config.deepspeed["train_micro_batch_size_per_gpu"]
        return cls(
            config=config,
            comm=comm,
            deepspeed=deepspeed_engine,
            parameters=parameters,
            direction=direction,
            anchor=anchor,
            deferred=DeferredUpdate(parameters, direction) if offloads else None,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            loader=loader,
            recorder=Recorder(config, comm.world_size, loader, micro_batch),
            state=TrainState(),
            watchdog=watchdog,
        )

    def commit(self, record: Record) -> None:
        """Log a record, and apply it to the parameters and the anchor.

        The record is written while it is applied. This is safe: parameters are in memory, so a run
        that ends in between resumes from the log.
        """
        change = self.recorder.add(record)
        self.begin(record)
        if change is None:
            return
        if isinstance(record, Refresh):
            assert self.anchor is not None
            release_gathered(self.deepspeed)
            self.anchor.set_point()
            self.anchor.set_gradient(self.recorder.gradient)
        self.apply(change.update)

    def apply(self, update: Update) -> None:
        """Apply an update to this rank's shards, or defer it where they are offloaded.

        Gathered copies are released first, because they would be out of date.
        """
        release_gathered(self.deepspeed)
        dense = None
        if update.anchor_grad_coefficient != 0.0:
            assert self.anchor is not None
            assert self.anchor.gradient is not None
            dense = self.anchor.gradient.read
        if self.deferred is not None and dense is None:
            self.deferred.defer(update)
        else:
            if self.deferred is not None:
                self.deferred.flush()
            self.parameters.apply_(update, direction=self.direction, dense=dense)
        if self.anchor is not None:
            self.anchor.record(update)

    def restore_selections(self, steps: Sequence[Step]) -> None:
        """Restore the selector to the end of these steps, which were made elsewhere or before."""
        chosen = [step for step in steps if step.sub_batch is not None]
        if not isinstance(self.loader, SelectingLoader) or not chosen:
            return
        for step in chosen[:-1]:
            assert step.sub_batch is not None
            self.loader.selection.selector.restore(step.sub_batch.mean)
        last, at = chosen[-1].sub_batch, chosen[-1].at
        assert last is not None
        assert at is not None
        candidates = self.loader.candidates(at)
        ids = [candidates[i] for i in last.indices]
        self.loader.restore_selection(at, ids, last.weights or [1.0] * len(ids), last.mean)
        self.recorder.note_selections()

    def flush(self) -> None:
        """Apply the deferred update, so that the stored parameters are up to date."""
        if self.deferred is not None:
            release_gathered(self.deepspeed)
            self.deferred.flush()

    def begin(self, record: Record) -> None:
        """Begin anew what a record of another kind than a step replaces.

        A refresh: count from it; the next step takes the new anchor whole. A measured step size: it
        is not divided.
        """
        if isinstance(record, StepSize):
            self.state.annealing = annealing.Annealing()
        if isinstance(record, Refresh):
            self.state.anchor_step = record.step
            if record.coefficients:
                self.state.anchor_weight = AnchorWeight()

    def advance(self, record: Step) -> None:
        """Count a step, and advance the schedules."""
        state = self.state
        state.global_steps = record.step + 1
        state.global_samples += self.config.deepspeed["train_batch_size"]
        state.nonfinite_in_a_row = state.nonfinite_in_a_row + 1 if record.skipped else 0
        state.skipped_steps += record.skipped
        if not record.skipped:
            assert record.loss is not None
            state.scale = self.scale_with(record.coefficients or (), record.weight)
            if record.products is not None:
                state.anchor_weight = record_products(state.anchor_weight, record.products)
            state.annealing = annealing.record_loss(state.annealing, record.loss)
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
        anneal = self.config.zeroth_order.anneal
        if anneal is None and self.config.zeroth_order.lr == "auto":
            state.annealing = annealing.back_off(state.annealing)
            if self._ends_warmup(record):
                state.annealing = annealing.compare_anew(state.annealing)
        if anneal is not None and self._ends_epoch(record):
            state.annealing = annealing.end_epoch(
                state.annealing, alpha=anneal.alpha, threshold=anneal.threshold
            )

    def _ends_warmup(self, record: Step) -> bool:
        """Whether the selector chooses from the next step on, after random sub-batches."""
        selector = self.config.zeroth_order.selector
        if selector is None or not selector.warmup_steps:
            return False
        return record.step + 1 == -(-selector.warmup_steps // selector.interval) * selector.interval

    def scale_with(self, coefficients: Sequence[float], anchor_weight: float) -> StepScale:
        """The running size of the estimates with that of one more step, whose terms have these
        coefficients besides those of the anchor gradient.
        """
        anchor = (anchor_weight * term.coefficient for term in self.recorder.gradient)
        return record_estimate(self.state.scale, (*coefficients, *anchor))

    def lrs(self) -> list[float]:
        """The current step size of each parameter group: the scheduler's, divided by the divisor of
        annealing.

        With an lr of "auto" the optimizer and the scheduler hold a factor of the measured step
        size. It is NaN until it is measured, before the first step.
        """
        measured = 1.0
        if self.config.zeroth_order.lr == "auto":
            found = self.recorder.step_size
            measured = math.nan if found is None else found.lr
        divisor = self.state.annealing.divisor
        return [measured * group["lr"] / divisor for group in self.optimizer.param_groups]

    def anchor_lr(self) -> float:
        """The step size of a refresh of the anchor now."""
        zo = self.config.zeroth_order
        if zo.anchor_lr is None:
            return self.lrs()[0]
        # it follows the schedule, too; with an lr of 0 the anchor's steps alone move the weights
        scheduled = self.optimizer.param_groups[0]["lr"] / zo.peak_lr if zo.peak_lr else 1.0
        return zo.anchor_lr * scheduled / self.state.annealing.divisor

    @property
    def anchor_weight(self) -> float:
        """The weight of the anchor in the next step."""
        given = self.config.zeroth_order.anchor_weight
        return self.state.anchor_weight.value if given == "auto" else given

    def check_agreement(self) -> None:
        """Every `agreement_interval` steps, check that all ranks have applied the same updates and
        were given the same examples.

        Raises Disagreement where they have not. The log then ends at the last agreement, because
        the steps since then were made on weights that differ.
        """
        step, trajectory, loader = self.state.global_steps, self.recorder.trajectory, self.loader
        if step % self.config.zeroth_order.agreement_interval:
            return
        examples = ""
        if loader is not None and loader.examples.repeatable:
            examples = loader.digest_of_last_step()
        try:
            self.comm.check_agreement(
                trajectory.head.encode(), f"what was applied up to step {step}"
            )
            self.comm.check_agreement(examples.encode(), f"the training data of step {step}")
        except Disagreement:
            trajectory.cut_to_agreement()
            raise
        trajectory.agree(step)

    def _ends_epoch(self, record: Step) -> bool:
        return (
            self.loader is not None
            and record.at is not None
            and record.at[1] == self.loader.steps_per_epoch
        )
