"""The zeroth-order engine, with the interface of DeepSpeed's engine.

`engine(batch)` evaluates the loss at the step's points. `engine.backward(loss)` reduces the loss
scalars over the ranks. `engine.step()` combines them into a record, logs the record, and applies it
to this rank's shards.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from zods.comm.communicator import Communicator
from zods.comm.stop_request import StopRequest, StopRequested
from zods.comm.watchdog import Watchdog
from zods.config.deepspeed_json import RunConfig
from zods.config.schedules import ZerothOrderOptimizer
from zods.core.update_rule import StepRule
from zods.data.loader import TrainingLoader
from zods.data.scores import find_score
from zods.data.text_scores import TextObjective
from zods.forward.cached_generation import NextTokens
from zods.forward.evaluator import Evaluator
from zods.forward.fused_norms import FusedNorms
from zods.forward.model_forwards import ModelForwards
from zods.params.shards import ShardedParameters
from zods.selection.loaders import SelectingLoader
from zods.training import checkpoint, resume
from zods.training.engine_interface import EngineInterface
from zods.training.loss_exchange import LossExchange, ReducedLosses
from zods.training.noise_meter import NoiseMeter
from zods.training.refresh import measure_refresh
from zods.training.replica_steps import ReplicaSteps
from zods.training.replicas import LeftOut, Replicas
from zods.training.state import StepInFlight
from zods.training.step_outputs import StepLoss, StepReport
from zods.training.step_points import StepPoints
from zods.training.step_reporter import StepReporter
from zods.training.step_size import measure_step_size
from zods.training.training_run import TrainingRun
from zods.trajectory.records import Refresh, Step

logger = logging.getLogger(__name__)


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
        self,
        deepspeed_engine: Any,
        config: RunConfig,
        *,
        comm: Communicator,
        parameters: ShardedParameters,
        optimizer: ZerothOrderOptimizer,
        lr_scheduler: Any,
        training_loader: TrainingLoader | SelectingLoader | None,
        watchdog: Watchdog,
        fused_norms: FusedNorms,
        texts: TextObjective | None,
    ) -> None:
        """texts: scores generated texts in place of losses."""
        self.deepspeed = deepspeed_engine
        self.module: torch.nn.Module = deepspeed_engine.module
        self.config = config
        self.comm = comm
        self.sharded_parameters = parameters
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.training_dataloader = training_loader
        self.selection = (
            training_loader.selection if isinstance(training_loader, SelectingLoader) else None
        )
        self.monitor = deepspeed_engine.monitor
        self.training = True
        self.last_step: StepReport | None = None
        zo = config.zeroth_order
        self.run = TrainingRun.build(
            config,
            deepspeed_engine,
            comm,
            parameters,
            optimizer,
            lr_scheduler,
            training_loader,
            watchdog,
        )
        self.anchor = self.run.anchor
        self.recorder = self.run.recorder
        self.trajectory = self.recorder.trajectory
        self.stop = StopRequest()
        self.should_stop = False
        self.replicas = None if zo.replicas is None else Replicas(zo.replicas, comm)
        self._replica_steps: ReplicaSteps | None = None
        if self.replicas is not None:
            self.replicas.stop_where(lambda: self.stop.reason is not None)
            self._replica_steps = ReplicaSteps(self.run, self.replicas, watchdog)
        self._zo = zo
        self._rule = StepRule(zo)
        sizes = {
            "batch_size": self.train_batch_size(),
            "accumulation": self.gradient_accumulation_steps(),
        }
        self._points = StepPoints(zo, self.anchor, **sizes)
        self.noise = NoiseMeter(
            zo,
            batch_size=self.train_batch_size(),
            population=None if training_loader is None else training_loader.num_examples,
            selects=self.selection is not None,
        )
        self._exchange = LossExchange(
            comm,
            self.replicas,
            **sizes,
            examples_per_direction=zo.examples_per_direction,
            in_order=self.selection is None,
        )
        self._reporter = StepReporter(self.monitor, zo, comm)
        self._watchdog = watchdog
        self._evaluator = self._make_evaluator(fused_norms, texts)
        self._next_tokens = NextTokens(deepspeed_engine, comm)
        self._own_batches: Iterator[Any] | None = None
        self._is_closed = False
        self._is_logged = False  # whether `resume` was called
        self._in_flight: StepInFlight | None = None
        self._loader_state: dict[str, Any] = {}  # after the last step
        self._remember_loader()
        deepspeed_engine.eval()

    # --- modes ------------------------------------------------------------------------------------

    @property
    def _rows(self) -> int:
        """Examples of a micro-batch, over all ranks."""
        return self.train_batch_size() // self.gradient_accumulation_steps()

    def _make_evaluator(self, fused_norms: FusedNorms, texts: TextObjective | None) -> Evaluator:
        zo = self._zo
        of_logits = zo.objective != "loss" and texts is None
        forwards = ModelForwards(
            self.deepspeed,
            self.comm,
            self.sharded_parameters,
            self.run.deferred,
            self.run.direction,
            zo.averages,
            fused_norms.functions,
            scores=zo.objective != "loss",
        )
        return Evaluator(
            forwards,
            eps=zo.eps,
            evaluation=zo.evaluation,
            stream_memory_gb=zo.stream_memory_gb,
            micro_batch=self.train_micro_batch_size_per_gpu(),
            most_points=zo.most_points,
            grouped=zo.has_groups,
            beat=lambda: self._watchdog.beat(f"step {self.global_steps}, forward"),
            score=find_score(zo.objective) if of_logits else None,
            texts=texts,
        )

    def get_lr(self) -> list[float]:
        """The current step size: the scheduler's, divided by the divisor of annealing.

        With an lr of "auto" the optimizer and the scheduler hold a factor of the measured step
        size. It is NaN before the first forward of the first step, which measures it.
        """
        measured = 1.0
        if self._zo.lr == "auto":
            found = self.recorder.step_size
            measured = math.nan if found is None else found.lr
        divisor = self.annealing.divisor
        return [measured * group["lr"] / divisor for group in self.optimizer.param_groups]

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
        """Stop the watchdog, leave the replicas, unwrap the model and release the log. Call it
        before any rank ends.
        """
        self._watchdog.close()
        self.restart_loader()  # ends the workers of its iterator, for which an exit would wait
        self._evaluator.close()
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
        rechecks, self._in_flight.rechecks = self._in_flight.rechecks, False
        ranks = (self.comm.rank, self.comm.world_size)
        split = ranks if self.replicas is None else self.replicas.split
        groups = self._points.groups(batch, len(self._in_flight.sums), split)
        sums = self._evaluator.pair_sums(
            groups, self._points.pairs(self.global_steps), batch, rechecks=rechecks
        )
        self._record_evaluation()
        mean = self._points.loss_at_parameters(sums) / sums.count
        loss = mean.float().as_subclass(StepLoss)
        self._in_flight.pending = (loss, sums)
        self._watchdog.rest()
        return loss

    def _record_evaluation(self) -> None:
        self.recorder.record_evaluation(
            self.global_steps, self.evaluation, self._evaluator.streams_per_forward
        )

    def _begin_step(self) -> StepInFlight:
        """Refresh the anchor if it is due, and begin a step."""
        began, bytes_before = time.perf_counter(), self.comm.scalar_bytes
        zo, step = self._zo, self.global_steps
        if self.replicas is not None and self.recorder.is_new:
            raise RuntimeError(
                "zeroth_order.replicas: call engine.resume(folder) before the first step; they "
                "share its log."
            )
        self.recorder.record_run(step)
        self._measure_step_size()
        in_flight = StepInFlight(began, bytes_before, rechecks=step > 0 and step.bit_count() == 1)
        if self._replica_steps is not None:
            in_flight.left_out = self._replica_steps.left_out
        if (
            self.anchor is not None
            and in_flight.left_out is None
            and (self.anchor_step is None or step - self.anchor_step >= zo.anchor_interval)
        ):
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
                self._reduce(step)
            except LeftOut as left:
                step.left_out = str(left)
        return loss

    def _reduce(self, step: StepInFlight) -> None:
        reduced = self._exchange.step_losses(
            self._points.total([sums for sums in step.sums if sums is not None], self.comm),
            pairs=self._points.num_pairs,
            step=self.global_steps,
            head=self.trajectory.head,
            rows=self._rows,
            asked=self.stop.reason is not None,
            left_form=self._evaluator.left_form,
        )
        step.reduced, self.should_stop = reduced, reduced.should_stop
        if reduced.left_form:
            self._evaluator.leave_form()

    # --- phases 3 to 5: combine, log, apply -------------------------------------------------------

    def step(self) -> None:
        """At an accumulation boundary, combine the losses into an estimate, log the estimate, and
        apply it to this rank's shards.

        If the run has a log, the step is on the disk when this returns. A step with a non-finite
        loss is skipped and counted. A replica that was left out makes the leader's steps instead,
        until it takes part again; `global_steps` and the training loader then stand after the last
        of them, and `should_stop` is set where the leader has ended. Raises OSError where the log cannot be written, and
        RuntimeError after `max_nonfinite_steps` skipped steps in a row.
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
        loss = in_flight.reduced.loss
        record, projected_grad = self._combine(in_flight.reduced)
        try:
            self._commit(record)
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
        selecting = 0.0 if self.selection is None else self.selection.take_seconds()
        self.last_step = self._reporter.report(
            self.run.state,
            record,
            in_flight,
            loss,
            projected_grad,
            selecting,
            self.noise.report(self.global_steps),
        )
        self._remember_loader()
        self._watchdog.rest()
        self._reporter.warn(self.run.state, record, loss, projected_grad)

    def _combine(self, reduced: ReducedLosses) -> tuple[Step, float]:
        """Make the record of this step. Returns it with the mean projected gradient around the
        parameters.
        """
        weight = self.run.anchor_weight
        terms, projected_grad, products = self._rule.estimate(
            self.global_steps, reduced.differences, weight
        )
        coefficients = tuple(term.coefficient for term in terms)
        epoch_and_step = (
            None if self.training_dataloader is None else self.training_dataloader.epoch_and_step
        )
        logged = reduced.loss if coefficients else None
        lr, sub_batch = self.get_lr()[0], self.recorder.sub_batch()
        normalizes = self._zo.normalize and bool(coefficients)
        rms = self.run.scale_with(coefficients, weight).rms if normalizes else None
        measured = self._zo.anchor_weight == "auto" and bool(coefficients)
        step = Step(
            *(self.global_steps, logged, lr, coefficients, epoch_and_step, sub_batch),
            rms=rms,
            weight=weight,
            products=products if measured else None,
            in_16_bits=self._rule.logs_16_bits,
        )
        return step, projected_grad

    def _commit(self, record: Step | Refresh) -> None:
        """Log and apply a record, in all replicas the same one."""
        (self._replica_steps or self.run).commit(record)

    def _catch_up(self, reason: str) -> None:
        """Drop the step under way, and make the leader's steps until this replica takes part
        again.
        """
        assert self._replica_steps is not None
        self._in_flight = self.last_step = None
        if not self._replica_steps.catch_up(reason, self._loader_state):
            self.should_stop = True
        self.restart_loader()
        self._remember_loader()
        self._watchdog.rest()

    # --- the anchor -------------------------------------------------------------------------------

    @torch.no_grad()
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
        assert self.anchor is not None
        assert self.training_dataloader is not None
        self.flush()
        self._measure_step_size()
        zo, lr = self._zo, self.get_lr()[0]
        if zo.anchor_lr is not None:  # it follows the schedule, too
            # with an lr of 0 the anchor's steps alone move the weights
            scheduled = self.optimizer.param_groups[0]["lr"] / zo.peak_lr if zo.peak_lr else 1.0
            lr = zo.anchor_lr * scheduled / self.annealing.divisor
        split, total = self._exchange.refresh_split(self.global_steps, self.trajectory)
        with self._pass_before_step() as poll:
            record, noise = measure_refresh(
                zo,
                self._evaluator,
                self.training_dataloader,
                self.global_steps,
                lr,
                micro_batch=self._rows // split[1],
                split=split,
                total=total,
                before_each=poll,
            )
        if not record.coefficients:
            if self.anchor_step is None:
                raise RuntimeError(
                    "the first anchor: the loss over the training set is not finite. Look at the "
                    "data."
                )
            logger.warning(
                "anchor at step %d: losses are not finite; the last anchor stays", self.global_steps
            )
        self._commit(record)
        self.noise.add_refresh(noise)

    def _measure_step_size(self) -> None:
        """Measure and record the step size, where the configuration asks for it and it is not known.

        A replica that follows knows it from the log: it joins after the leader's first step.
        """
        if self._zo.lr != "auto" or self.recorder.step_size is not None:
            return
        assert self.training_dataloader is not None
        assert not self.recorder.follows
        self.flush()
        with self._pass_before_step() as poll:
            record = measure_step_size(
                self._zo,
                self._evaluator,
                self.training_dataloader,
                self.comm,
                self.global_steps,
                batch_size=self.train_batch_size(),
                micro_batch=self.train_micro_batch_size_per_gpu(),
                before_each=poll,
            )
        self.run.commit(record)
        if self.comm.rank == 0:
            logger.info("step %d: measured lr: %g", self.global_steps, record.lr)

    @contextlib.contextmanager
    def _pass_before_step(self) -> Iterator[Callable[[], None]]:
        """Evaluate training examples between two steps. Yields a function to call before each
        micro-batch, which raises StopRequested.
        """
        assert self.training_dataloader is not None
        try:
            with self._polled() as poll:
                yield poll
        except StopRequested:
            # the step's first batch may be loaded
            self.training_dataloader.load_state_dict(self._loader_state)
            self.restart_loader()
            self._watchdog.rest()
            raise
        self._record_evaluation()

    # --- resume, load -----------------------------------------------------------------------------

    def _adopt_evaluation(self) -> None:
        """Use the log's form of evaluation if it was chosen under the same conditions, so that the
        losses have the same bits.
        """
        self._evaluator.adopt(self.recorder.chosen_evaluation())

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
            self._adopt_evaluation()
        if self._replica_steps is not None:
            self._replica_steps.join()
        self.restart_loader()
        self._remember_loader()
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
        self.restart_loader()
        with self._watchdog.watching("load_checkpoint", limit=self._zo.load_timeout):
            loaded = checkpoint.load_checkpoint(self.run, load_dir, tag, wanted)
        if loaded[0] is not None and not load_module_only:
            self._adopt_evaluation()
        self._in_flight = None
        self._remember_loader()
        return loaded

    # --- whole batches ----------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> float:
        """Make one whole step on micro-batches from `data_iter` (default: the engine's own loader).

        Returns the mean loss of the global batch; NaN where this replica was left out of the step.
        """
        if data_iter is None:
            if self.training_dataloader is None:
                raise ValueError(
                    "engine.train_batch(): give an iterator, or training_data to zods.initialize."
                )
            self._own_batches = data_iter = self._own_batches or self.training_dataloader.forever()
        self.train()
        for _ in range(self.gradient_accumulation_steps()):
            self.backward(self.forward(next(data_iter)))
            self.step()
        return math.nan if self.last_step is None else self.last_step.loss

    def _remember_loader(self) -> None:
        """Keep the loader's state at the end of a step, for a pass that is abandoned."""
        measures = self._zo.lr == "auto" and self.recorder.step_size is None
        may_drop = self.anchor is not None or measures
        may_drop = may_drop or (self._replica_steps is not None and self._replica_steps.selects)
        if may_drop and self.training_dataloader is not None:
            self._loader_state = self.training_dataloader.state_dict()

    def restart_loader(self) -> None:
        """Let `train_batch` continue at the loader's current position. Iterators that were made
        earlier keep their own.
        """
        self._own_batches = None
