"""The losses of a step: of each micro-batch at the step's points, and their sums over all ranks.

The engine owns one `StepLosses`. `zods.forward.evaluator` runs the forwards,
`zods.training.loss_exchange` sends the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zods.data.scores import find_score
from zods.data.text_scores import TextObjective
from zods.forward.evaluator import Evaluator
from zods.forward.fused_norms import FusedNorms
from zods.forward.loss_sums import PairSums
from zods.forward.model_forwards import ModelForwards
from zods.forward.stream_budget import StreamBudget
from zods.selection.loaders import SelectingLoader
from zods.training.loss_exchange import LossExchange, ReducedLosses
from zods.training.replicas import Replicas
from zods.training.state import StepInFlight
from zods.training.step_outputs import StepLoss
from zods.training.step_points import StepPoints
from zods.training.training_run import TrainingRun


def make_evaluator(
    run: TrainingRun, fused_norms: FusedNorms, texts: TextObjective | None
) -> Evaluator:
    """The evaluator of a run's model. texts: scores generated texts in place of losses."""
    zo = run.config.zeroth_order
    of_logits = zo.objective != "loss" and texts is None
    forwards = ModelForwards(
        run.deepspeed,
        run.comm,
        run.parameters,
        run.deferred,
        run.direction,
        zo.averages,
        fused_norms.functions,
        on_forward=run.watchdog.renew,
        scores=zo.objective != "loss",
    )
    return Evaluator(
        forwards,
        eps=zo.eps,
        evaluation=zo.evaluation,
        budget=StreamBudget(
            run.comm,
            run.config.deepspeed["train_micro_batch_size_per_gpu"],
            zo.most_points,
            zo.stream_memory_gb,
        ),
        grouped=zo.has_groups,
        beat=lambda: run.watchdog.beat(f"step {run.state.global_steps}, forward"),
        score=find_score(zo.objective) if of_logits else None,
        texts=texts,
    )


class StepLosses:
    """Evaluates and reduces the losses of a step.

    rows: examples of a micro-batch, over all ranks.
    """

    def __init__(self, run: TrainingRun, evaluator: Evaluator, replicas: Replicas | None) -> None:
        self._run, self._evaluator, self._replicas = run, evaluator, replicas
        zo, deepspeed = run.config.zeroth_order, run.config.deepspeed
        sizes = {
            "batch_size": deepspeed["train_batch_size"],
            "accumulation": deepspeed["gradient_accumulation_steps"],
        }
        self.rows = sizes["batch_size"] // sizes["accumulation"]
        self._points = StepPoints(zo, run.anchor, **sizes)
        self._exchange = LossExchange(
            run.comm,
            replicas,
            **sizes,
            examples_per_direction=zo.examples_per_direction,
            in_order=not isinstance(run.loader, SelectingLoader),
        )

    def evaluate(self, batch: Any, in_flight: StepInFlight) -> tuple[StepLoss, PairSums]:
        """Evaluate the step's next micro-batch. Returns the mean loss at the points around the
        parameters, and the losses at pairs of points.
        """
        run = self._run
        rechecks, in_flight.rechecks = in_flight.rechecks, False
        ranks = (run.comm.rank, run.comm.world_size)
        split = ranks if self._replicas is None else self._replicas.split
        groups = self._points.groups(batch, len(in_flight.sums), split)
        sums = self._evaluator.pair_sums(
            groups, self._points.pairs(run.state.global_steps), batch, rechecks=rechecks
        )
        self.record_evaluation()
        mean = self._points.loss_at_parameters(sums) / sums.count
        return mean.float().as_subclass(StepLoss), sums

    def record_evaluation(self) -> None:
        """Record the form of evaluation in the log, where it is new."""
        self._run.recorder.record_evaluation(
            self._run.state.global_steps,
            self._evaluator.evaluation,
            self._evaluator.streams_per_forward,
            self._evaluator.from_logits,
        )

    def reduce(self, in_flight: StepInFlight, *, asked: bool) -> ReducedLosses:
        """Sum the losses of the step's micro-batches over all ranks.

        asked: whether this rank was asked to stop. Raises LeftOut where this replica is left out.
        """
        run = self._run
        reduced = self._exchange.step_losses(
            self._points.total([sums for sums in in_flight.sums if sums is not None], run.comm),
            pairs=self._points.num_pairs,
            step=run.state.global_steps,
            head=run.recorder.trajectory.head,
            rows=self.rows,
            asked=asked,
            left_form=self._evaluator.left_form,
        )
        if reduced.left_form:
            self._evaluator.leave_form()
        return reduced

    def refresh_split(self) -> tuple[tuple[int, int], Callable[[Sequence[float]], list[float]]]:
        """See `LossExchange.refresh_split`; for a refresh before the next step."""
        return self._exchange.refresh_split(
            self._run.state.global_steps, self._run.recorder.trajectory
        )
