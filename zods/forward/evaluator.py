"""Losses and outputs of a model under DeepSpeed on batches, at given points.

`Evaluator` chooses a form of evaluation on its first batch (`zods.forward.choose_form`), and leaves
the form on a later batch that does not fit it. The engine owns one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from zods.core.points import Point
from zods.data.batch import Inputs
from zods.data.loader import WholePass
from zods.data.objectives import loss_count
from zods.forward.choose_form import ChooseForm
from zods.forward.forms import Form, Forms
from zods.forward.lockstep import NotInLockstep
from zods.forward.model_forwards import ModelForwards
from zods.forward.stacked import NotStackable
from zods.params.zero3_adapter import release_gathered

logger = logging.getLogger(__name__)


class Evaluator:
    """Compute losses and outputs of one model.

    streams_per_forward: how many points one forward evaluates. left_form: whether a batch on this
    rank did not fit the form of evaluation. The other ranks do not know it yet.
    """

    def __init__(
        self,
        forwards: ModelForwards,
        *,
        eps: float,
        evaluation: str,
        stream_memory_gb: float | None,
        micro_batch: int,
        most_points: int,
        beat: Callable[[], None],
    ) -> None:
        """eps: distance of a step's points from the center. evaluation, stream_memory_gb: the
        configuration's keys. micro_batch: examples per forward and rank. most_points: the largest
        number of points that are evaluated together. beat: called before each batch of losses, so
        that the watchdog can name a rank that hangs in it.
        """
        self.streams_per_forward = 2
        self._forwards, self._comm, self._beat = forwards, forwards.comm, beat
        self._forms = Forms(forwards)
        self._form: Form | None = None  # chosen on the first batch
        self._chooser = ChooseForm(
            forwards,
            self._forms,
            eps=eps,
            asked=evaluation,
            micro_batch=micro_batch,
            most_points=most_points,
            stream_memory_gb=stream_memory_gb,
        )
        self._known: tuple[str, int] | None = None
        self.left_form = False

    @property
    def evaluation(self) -> str | None:
        """Name of the form of evaluation; None before the first batch, on which it is chosen."""
        return None if self._form is None else self._form.name

    def adopt(self, known: tuple[str, int] | None) -> None:
        """Use a form of evaluation that was chosen in an earlier run, under the same conditions.

        known: (name of the form, points per forward); None: choose a form on the next batch.
        """
        self._known, self._form = known, None

    def close(self) -> None:
        """Remove the wrappers of the model's forwards."""
        self._forwards.perturbed.remove()

    def inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any] | Inputs:
        """Return a batch on the device, in the form in which the model's forward takes it; see
        `zods.data.batch.Signature.bind`.
        """
        return self._forwards.inputs(*args, **kwargs)

    def outputs(self, batch: Any) -> Any:
        """Return the model's outputs at the parameters as they are.

        batch: a result of `inputs`, or a batch that `inputs` accepts.
        """
        return self._forwards.outputs(batch)

    def losses(
        self, points: Sequence[Point | None], batch: Any, *, rechecks: bool = False
    ) -> torch.Tensor:
        """Compute the mean losses of a batch at the points: (number of points,), in float64.

        The first call also finds which modules use which parameters, and chooses the form of
        evaluation. Raises ValueError if the model gives no loss, or if the form that the
        configuration asks for does not fit the model.

        points: None is the parameters as they are. batch: on the device. rechecks: compare the
        losses of a stack with a separate forward, on all ranks together; see `_rechecked`.
        """
        batch = self._forwards.without_cache(batch)
        self._forwards.perturbed.move_new_hooks()
        form = self._form = self._form or self._choose(batch)
        at = [point for point in points if point is not None]
        if len(at) < max(len(points), 2):
            return torch.stack([self._forwards.loss_at(point, batch) for point in points])
        try:
            losses = self._losses_together(form, at, batch)
        except (NotStackable, NotInLockstep) as error:
            self._refuse_alone(error)
            losses = self._losses_together(self._forms.sequential, at, batch)
        if rechecks and form is self._forms.stacked:
            return self._rechecked(losses, at, batch)
        return losses

    def _losses_together(self, form: Form, points: Sequence[Point], batch: Any) -> torch.Tensor:
        """Compute losses in a form of evaluation, so many points at a time as fit one forward."""
        if form is self._forms.stacked and not (
            isinstance(batch, dict) and isinstance(batch.get("labels"), torch.Tensor)
        ):
            # a separate forward reports the missing labels, or gives a loss without labels
            form = self._forms.sequential
        size = self.streams_per_forward
        parts = [points[k : k + size] for k in range(0, len(points), size)]
        return torch.cat([form.losses(part, batch) for part in parts])

    # --- how to evaluate --------------------------------------------------------------------------

    def _choose(self, batch: Any) -> Form:
        """Return the form that was chosen in an earlier run, or else the first one that fits."""
        if self._known is None:
            form = self._chooser.choose(batch)
            self.streams_per_forward = self._chooser.streams_per_forward
            return form
        f = self._forwards
        with f.perturbed.observing():
            outputs = f.outputs(batch)
        f.find_objective(outputs, batch)
        name, self.streams_per_forward = self._known
        form = self._forms.named(name)
        form.prepare(batch)
        return form

    def _refuse_alone(self, error: Exception) -> None:
        """Note that a later batch on this rank does not fit the form that was chosen.

        The batch is then evaluated in separate forwards. The engine sends `left_form` to the other
        ranks with the sums of the step, and all ranks call `leave_form`. Raises RuntimeError if
        parameters are sharded over several ranks: another rank may wait for this one in the middle
        of the same forward.
        """
        if self._forwards.is_sharded and self._comm.world_size > 1:
            raise RuntimeError(
                f'zeroth_order.evaluation: "{self.evaluation}" fitted the first batch, but not '
                f'this one: {error}. Set it to "sequential".'
            ) from error
        release_gathered(self._forwards.deepspeed)
        if not self.left_form:
            logger.warning(
                "evaluation: sequential from now on, no longer %s: %s", self.evaluation, error
            )
        self.left_form = True

    def leave_form(self) -> None:
        """Evaluate in separate forwards from now on. All ranks call it together."""
        self._form, self.left_form = self._forms.sequential, False

    def _rechecked(self, losses: torch.Tensor, points: Sequence[Point], batch: Any) -> torch.Tensor:
        """Compare a stack's losses with a separate forward, and return losses that are right.

        If they differ on any rank, all ranks leave the stacked form, and the losses are computed in
        another form. A special term of a loss, or a router, may have an effect on later batches
        only. Collective: all ranks call it together.
        """
        f = self._forwards
        outputs, differ = None, [False, False]
        if float(loss_count(batch, f.objective)):  # else this rank has nothing to compare
            tolerance = 1e-3 if f.dtype == torch.float32 else 3e-2
            outputs = f.outputs_at(points[0], batch)
            pairs = (f.own_and_logits_loss(outputs, batch), (losses[0], f.mean_of(outputs, batch)))
            differ = [
                not torch.allclose(a, b, rtol=tolerance, atol=1e-2 * tolerance, equal_nan=True)
                for a, b in pairs
            ]
        elif f.is_sharded:
            f.outputs_at(points[0], batch)  # take part in the other ranks' all-gathers
        misfits = self._comm.sum_over_ranks(list(map(float, differ)))
        if not any(misfits):
            return losses
        if misfits[0]:
            f.take_own_loss(batch)
        fits = self._chooser.misfit(self._forms.lockstep, batch) is None
        form = self._form = self._forms.lockstep if fits else self._forms.sequential
        reason = "it does not give the model's own loss on a later batch"
        if outputs is not None:
            own, _ = f.own_and_logits_loss(outputs, batch)
            reason = (
                f"on this batch the model's loss is {float(own):.6g}, "
                f"from a stack {float(losses[0]):.6g}"
            )
        logger.warning("evaluation: %s from now on, no longer stacked: %s", form.name, reason)
        return self._losses_together(form, points, batch)

    def loss_sums(
        self, points: Sequence[Point | None], batch: Any, *, rechecks: bool = False
    ) -> torch.Tensor:
        """Compute the sums of losses over a batch at the points, followed by the count.

        The count is the number of tokens or examples of which a loss is the mean. Returns (number
        of points + 1,) in float64. All values are 0 if no label counts.
        """
        self._beat()
        losses = self.losses(points, batch, rechecks=rechecks)
        count = loss_count(batch, self._forwards.objective).to(losses.device)
        return torch.cat([torch.where(count > 0, losses * count, 0.0), count[None]])

    def losses_over(
        self,
        parts: Sequence[tuple[Sequence[Point], torch.Tensor]],
        dataset: Any,
        collate_fn: Callable | None,
        *,
        title: str,
        micro_batch: int,
        split: tuple[int, int],
        total: Callable[[Sequence[float]], Sequence[float]],
        before_each: Callable[[], None],
    ) -> list[float]:
        """Compute the losses of parts of a dataset, each part at its own points.

        A loss is the part's share in the mean over all parts under the objective: the mean itself
        where there is one part. Returns the losses of all parts' points in order; NaN if no label
        counts.

        parts: (points, indices of the examples) of each part. title: of the progress bar.
        micro_batch: examples per forward and rank. split: (index of this rank, number of ranks)
        among the ranks that divide the dataset. All of them use micro-batches of one size. total:
        adds up values over these ranks. before_each: called before each micro-batch.
        """
        passes = [
            WholePass(Subset(dataset, indices.tolist()), micro_batch, *split, collate_fn)
            for _, indices in parts
        ]
        sums: list[float] = []
        count = 0.0
        with tqdm(
            total=sum(map(len, passes)), desc=title, leave=False, disable=self._comm.rank != 0
        ) as bar:
            for (points, _), rounds in zip(parts, passes, strict=True):
                of_part = torch.zeros(
                    len(points) + 1, dtype=torch.float64, device=self._comm.device
                )
                for batch, counted in rounds:
                    before_each()
                    found = self.loss_sums(points, self.inputs(batch))
                    if counted:
                        of_part += found
                    bar.update()
                *losses, counted_here = of_part.tolist()
                sums += losses
                count += counted_here
        *totals, count = total([*sums, count])
        return [loss_sum / count if count else math.nan for loss_sum in totals]

    def mean_loss(self, batches: Iterator[Any]) -> float:
        """Compute the mean loss at the parameters under the objective, over batches of all ranks.

        batches: the same number on every rank. Returns NaN if no label counts.
        """
        sums = torch.stack([self.loss_sums([None], self.inputs(batch)) for batch in batches]).sum(0)
        total, count = self._comm.sum_over_ranks(sums.tolist())
        return total / count if count else math.nan
