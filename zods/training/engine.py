"""The zeroth-order engine, with the interface of DeepSpeed's engine.

`engine(batch)` evaluates the loss at the step's points. `engine.backward(loss)` reduces the loss
scalars over the ranks. `engine.step()` combines them into a record, logs the record, and applies it
to this rank's shards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from zods.comm.stop_request import StopRequest
from zods.core.update_rule import StepRule
from zods.data.text_scores import TextObjective
from zods.forward.cached_generation import NextTokens
from zods.forward.fused_norms import FusedNorms
from zods.forward.labelled_logits import LabelledLogits
from zods.params.zero3_adapter import remove_hooks
from zods.selection.loaders import SelectingLoader
from zods.training import checkpoint, resume
from zods.training.batch_position import BatchPosition
from zods.training.dataset_passes import DatasetPasses
from zods.training.engine_interface import EngineInterface
from zods.training.noise_meter import NoiseMeter
from zods.training.replica_steps import ReplicaSteps
from zods.training.replicas import LeftOut, Replicas
from zods.training.state import StepInFlight
from zods.training.step_losses import StepLosses, make_evaluator
from zods.training.step_outputs import StepLoss, StepReport
from zods.training.step_record import combine
from zods.training.step_reporter import StepReporter
from zods.training.training_run import TrainingRun
from zods.trajectory.records import Step


class ZerothOrderEngine(EngineInterface):
    """A model under DeepSpeed with zeroth-order steps. Made by `zods.initialize`.

    module: the model. deepspeed: the DeepSpeedEngine that shards it. comm: the ranks, with counters
    of the bytes sent. anchor: the anchor of MeZO-SVRG, else None. sharded_parameters: this rank's
    shards of the trainable parameters. run: the parts that steps change and that a checkpoint
    stores; its counters (`global_steps`, ...) are read-only attributes of the engine, too.
    last_step: the report of the last step; None before the first, and where a replica was left
    out. trajectory: the chain of records, and their log
    (`resume`). stop: the request to end after a step; should_stop: whether some rank was asked.
    replicas: the worlds that train together, else None. selection: the choice of sub-batches, with
    the ids and the report of the last one; None without a selector. noise: the noise of the
    estimates, measured since the engine was made.

    In training the model stays in eval mode: both losses of a pair need the same function, so
    dropout is off.
    """

    def __init__(
        self, run: TrainingRun, fused_norms: FusedNorms, texts: TextObjective | None
    ) -> None:
        """texts: scores generated texts in place of losses."""
        self.run, self.config, self.comm = run, run.config, run.comm
        self.deepspeed = run.deepspeed
        self.module: torch.nn.Module = run.deepspeed.module
        self.sharded_parameters = run.parameters
        self.optimizer, self.lr_scheduler = run.optimizer, run.lr_scheduler
        self.training_dataloader = run.loader
        self.selection = run.loader.selection if isinstance(run.loader, SelectingLoader) else None
        self.monitor = run.deepspeed.monitor
        self.training = True
        self.last_step: StepReport | None = None
        self.anchor, self.recorder = run.anchor, run.recorder
        self.trajectory = run.recorder.trajectory
        self.stop = StopRequest()
        self.should_stop = False
        zo = run.config.zeroth_order
        self.replicas = None if zo.replicas is None else Replicas(zo.replicas, run.comm)
        self._replica_steps: ReplicaSteps | None = None
        if self.replicas is not None:
            self.replicas.stop_where(lambda: self.stop.reason is not None)
            self._replica_steps = ReplicaSteps(run, self.replicas, run.watchdog)
        self._zo, self._rule, self._watchdog = zo, StepRule(zo), run.watchdog
        self.noise = NoiseMeter(
            zo,
            batch_size=self.train_batch_size(),
            loader=run.loader,
            selects=self.selection is not None,
        )
        self._evaluator = make_evaluator(run, fused_norms, texts)
        self._losses = StepLosses(run, self._evaluator, self.replicas)
        self._position = BatchPosition(run, self._replica_steps)
        self._passes = DatasetPasses(
            *(run, self._evaluator, self._losses, self.noise, self._position),
            replica_steps=self._replica_steps,
            polled=self._polled,
        )
        self._reporter = StepReporter(self.monitor, zo, run.comm)
        self._next_tokens = NextTokens(run.deepspeed, run.comm)
        self._labelled_logits = LabelledLogits(run.deepspeed, run.comm)
        self._is_closed = False
        self._is_logged = False  # whether `resume` was called
        self._in_flight: StepInFlight | None = None
        run.deepspeed.eval()

    # --- modes ------------------------------------------------------------------------------------

    def get_lr(self) -> list[float]:
        """The current step size: the scheduler's, divided by the divisor of annealing.

        With an lr of "auto" the optimizer and the scheduler hold a factor of the measured step
        size. It is NaN before the first forward of the first step, which measures it.
        """
        return self.run.lrs()

    def train(self, mode: bool = True) -> ZerothOrderEngine:
        """Set the mode. In training mode `engine(batch)` evaluates a step's losses; otherwise it
        returns the model's outputs.
        """
        if not mode:
            self.flush()
        self.module.eval()  # in training too: both losses of a pair need the same function
        self.training = mode
        return self

    def eval(self) -> ZerothOrderEngine:
        return self.train(False)

    @property
    def evaluation(self) -> str | None:
        """The form of evaluation: stacked, lockstep or sequential; None before the first batch, on
        which it is chosen.
        """
        return self._evaluator.evaluation

    def stop_on(self, request: StopRequest) -> None:
        """Use `request` in place of the engine's own request to stop."""
        self.stop = request

    def close(self) -> None:
        """Stop the watchdog, leave the replicas, take the wrappers and DeepSpeed's hooks off the
        model, and release the log. Call it before any rank ends.

        The model can be given to another engine then; call `flush` before, where parameters are
        offloaded. At stage 3 its parameters stay sharded: it runs no forward without an engine.
        """
        self._watchdog.close()
        self._position.restart()  # ends the workers of its iterator, for which an exit would wait
        try:
            self._evaluator.close()
            remove_hooks(self.deepspeed)
        finally:  # others wait for this replica, and another engine for the log
            self._is_closed = True
            if self.replicas is not None:
                self.replicas.close()
            if self.trajectory.file is not None:
                self.trajectory.file.close()

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.forward(*inputs, **kwargs)

    # --- phase 1: evaluate ------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Evaluate a micro-batch.

        Takes the inputs of the model's forward, or one batch of them (`zods.data.batch`). In
        training mode, returns a `StepLoss`: the mean loss of this rank's micro-batch at the points
        around the parameters, NaN if no label counts. Otherwise returns the model's outputs.

        A loss becomes part of the step when it is given to `backward`. Without that, the forward
        was a probe and has no effect. Examples have directions by their position in the step's
        batch: the first micro-batch has the first positions. If the anchor is due, it is refreshed
        before the first of them. Raises ValueError where the model gives no loss, and StopRequested
        as `refresh_anchor` does.
        """
        if self._is_closed:
            raise RuntimeError(
                "the engine is closed: its model is no longer evaluated at a step's points."
            )
        batch = self._evaluator.inputs(*inputs, **kwargs)
        if not self.training:
            self.flush()
            return self._evaluator.outputs(batch)
        if self._in_flight is None:
            self._in_flight = self._begin_step()
        if self._in_flight.left_out is not None:
            loss = torch.full((), math.nan).as_subclass(StepLoss)
            self._in_flight.pending = (loss, None)
            return loss
        loss, sums = self._losses.evaluate(batch, self._in_flight)
        self._in_flight.pending = (loss, sums)
        self._watchdog.rest()
        return loss

    def _begin_step(self) -> StepInFlight:
        """Refresh the anchor if it is due, and begin a step."""
        began, bytes_before = time.perf_counter(), self.comm.scalar_bytes
        step = self.global_steps
        if self.replicas is not None and self.recorder.is_new:
            raise RuntimeError(
                "zeroth_order.replicas: call engine.resume(folder) before the first step; they "
                "share its log."
            )
        self.recorder.record_run(step)
        self._passes.measure_step_size()
        in_flight = StepInFlight(began, bytes_before, rechecks=step > 0 and step.bit_count() == 1)
        if self._replica_steps is not None:
            in_flight.left_out = self._replica_steps.left_out
        if in_flight.left_out is None and self._passes.anchor_is_due:
            try:
                self.refresh_anchor()
            except LeftOut as left:
                in_flight.left_out = str(left)
        return in_flight

    # --- phase 2: reduce the scalars --------------------------------------------------------------

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Make the forward that returned `loss` part of the step. At an accumulation boundary, sum
        losses and counts over all ranks.

        See `zods.training.loss_exchange`. Raises ValueError where the last `engine(batch)` did not
        return `loss`: another loss, such as a scaled one, would have no effect, because the losses
        at the points are already known. For another loss, wrap the model so that its forward
        returns it.
        """
        step = self._in_flight
        if step is None or step.pending is None or loss is not step.pending[0]:
            raise ValueError(
                "engine.backward(loss): this is not the loss that the last engine(batch) "
                "returned, or it was given before. A zeroth-order step uses the losses of the "
                "forward itself; for another loss (a scaled one, a sum with other terms) wrap the "
                "model so that its forward returns it."
            )
        step.sums.append(step.pending[1])
        step.pending = None
        if self.is_gradient_accumulation_boundary() and step.left_out is None:
            self._watchdog.beat(f"step {self.global_steps}, backward")
            try:
                step.reduced = self._losses.reduce(step, asked=self.stop.reason is not None)
                self.should_stop = step.reduced.should_stop
            except LeftOut as left:
                step.left_out = str(left)
        return loss

    # --- phases 3 to 5: combine, log, apply -------------------------------------------------------

    def step(self) -> None:
        """At an accumulation boundary, combine the losses into an estimate, log the estimate, and
        apply it to this rank's shards.

        If the run has a log, the step is on the disk when this returns. A step with a non-finite
        loss is skipped and counted. A replica that was left out makes the leader's steps instead,
        until it takes part again; `global_steps` and the training loader then stand after the last
        of them, and `should_stop` is set where the leader has ended. Raises OSError where the log
        cannot be written, and RuntimeError after `max_nonfinite_steps` skipped steps in a row.
        """
        in_flight = self._in_flight
        if in_flight is None or len(in_flight.sums) <= in_flight.micro_steps:
            raise RuntimeError("engine.step() was called without engine.backward(loss) before it.")
        if not self.is_gradient_accumulation_boundary():
            in_flight.micro_steps += 1
            return
        self._watchdog.beat(f"step {self.global_steps}, step")
        if in_flight.left_out is not None:
            self._catch_up(in_flight.left_out)
            return
        assert in_flight.reduced is not None
        record, projected_grad = combine(self.run, self._rule, in_flight.reduced)
        try:
            (self._replica_steps or self.run).commit(record)  # logged while it is applied
        except LeftOut as left:
            self._catch_up(str(left))
            return
        self._in_flight = None
        self.run.advance(record)
        if not record.skipped:
            self.noise.add_step(in_flight.reduced, record, self.recorder.gradient)
        self.trajectory.wait()
        if self._replica_steps is not None and not self.should_stop:
            self._replica_steps.split_batches()
        self.run.check_agreement()
        self._report(in_flight, record, in_flight.reduced.loss, projected_grad)

    def _report(
        self, in_flight: StepInFlight, record: Step, loss: float, projected_grad: float
    ) -> None:
        """Report a step that was applied, and warn where it went wrong."""
        selecting = 0.0 if self.selection is None else self.selection.take_seconds()
        noise = self.noise.report(self.global_steps)
        self.last_step = self._reporter.report(
            self.run.state, record, in_flight, loss, projected_grad, selecting, noise
        )
        self._position.remember()
        self._watchdog.rest()
        self._reporter.warn(self.run.state, record, loss, projected_grad)

    def _catch_up(self, reason: str) -> None:
        """Drop the step under way, and make the leader's steps until this replica takes part
        again.
        """
        assert self._replica_steps is not None
        self._in_flight = self.last_step = None
        if not self._replica_steps.catch_up(reason, self._position.at_last_step):
            self.should_stop = True
        self._position.restart()
        self._position.remember()
        self._watchdog.rest()

    # --- the anchor -------------------------------------------------------------------------------

    def refresh_anchor(self) -> None:
        """Make the current parameters the anchor, estimate the gradient there over the training
        set, or over `anchor_examples` of it, and step along it.

        With `anchor_split`, each direction is evaluated on its own part of the examples.

        The step is theta <- theta - anchor_lr * g, as in algorithm 2 of Gautam et al. 2024. There
        it replaces a mini-batch step; here the mini-batch step follows it. With "normalize" it is
        divided by the root mean square of g alone. Raises StopRequested, on all ranks, where one is
        asked to stop meanwhile, and LeftOut where this replica is left out. Nothing of the refresh is
        then left, and the training loader stands after the last step.
        """
        self._passes.refresh_anchor()

    # --- resume, load -----------------------------------------------------------------------------

    def resume(
        self,
        folder: str | Path,
        *,
        checkpoints: str | Path | None = None,
        new: Collection[str] = (),
        must_be_new: bool = False,
    ) -> None:
        """Log every step in `folder`. If the log there has steps, restore the run to its end first.

        Call it before the first step. See `zods.training.resume.resume`.
        """
        self._in_flight = None
        with self._watchdog.watching("the start, resume", limit=self._zo.load_timeout):
            was_logged = resume.resume(
                self.run,
                folder,
                self.replicas,
                checkpoints=checkpoints,
                new=new,
                must_be_new=must_be_new,
            )
        if was_logged:
            self._evaluator.adopt(self.recorder.chosen_evaluation())
        if self._replica_steps is not None:
            self._replica_steps.join()
        self._position.restart()
        self._position.remember()
        self._is_logged = True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[Path | None, dict[str, Any] | None]:
        """Load a checkpoint, with the keywords of DeepSpeed's method; see
        `zods.training.checkpoint.load_checkpoint`.

        The micro-batches of a step under way are dropped.
        """
        if custom_load_fn is not None:
            raise ValueError(
                "custom_load_fn: must be None; no other code loads a checkpoint of zods."
            )
        self.flush()
        wanted = checkpoint.Wanted(
            module_only=load_module_only,
            strict=load_module_strict,
            optimizer=load_optimizer_states,
            scheduler=load_lr_scheduler_states,
        )
        if self._is_logged:
            raise ValueError(
                "load_checkpoint: this run writes a log since engine.resume(), which would not "
                "replay over a load. Load before engine.resume(), or begin another run's folder."
            )
        self._position.restart()
        with self._watchdog.watching("load_checkpoint", limit=self._zo.load_timeout):
            loaded = checkpoint.load_checkpoint(self.run, load_dir, tag, wanted)
        if loaded[0] is not None and not load_module_only:
            self._evaluator.adopt(self.recorder.chosen_evaluation())
        self._in_flight = None
        self._position.remember()
        return loaded

    # --- whole batches ----------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> float:
        """Make one whole step on micro-batches from `data_iter` (default: the engine's own loader).

        Returns the mean loss of the global batch; NaN where this replica was left out of the step.
        """
        if data_iter is None:
            data_iter = self._position.batches()
        self.train()
        for _ in range(self.gradient_accumulation_steps()):
            self.backward(self.forward(next(data_iter)))
            self.step()
        return math.nan if self.last_step is None else self.last_step.loss

    def restart_loader(self) -> None:
        """Let `train_batch` continue at the loader's current position. Iterators that were made
        earlier keep their own.
        """
        self._position.restart()
