"""Losses and outputs of a sharded model on batches, at given points, in the form of evaluation that
fits the model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
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
    """Runs a model under DeepSpeed.

    `micro_batch`: examples per forward and rank of a pass over a whole dataset.
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
        """eps: distance of a step's points. most_points: that are ever evaluated together. beat:
        called before each batch of losses, so that the watchdog can name a rank that hangs in it.
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
        # whether a batch did not fit the form chosen, which the other ranks do not know yet
        self.left_form = False

    @property
    def evaluation(self) -> str | None:
        """The name of the form of evaluation; None before the first batch, on which it is chosen."""
        return None if self._form is None else self._form.name

    def adopt(self, known: tuple[str, int] | None) -> None:
        """Evaluate as (form, points per forward) that were chosen before, under the same
        conditions; None: choose.
        """
        self._known, self._form = known, None

    def close(self) -> None:
        """Give the model its own forwards back."""
        self._forwards.perturbed.remove()

    def inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any] | Inputs:
        """A batch on the device, as the model's forward is given it; see
        `zods.data.batch.Signature.bind`.
        """
        return self._forwards.inputs(*args, **kwargs)

    def outputs(self, batch: Any) -> Any:
        """The model's outputs at the parameters for what `inputs` gave, or for a batch that it
        would take.
        """
        return self._forwards.outputs(batch)

    def losses(
        self, points: Sequence[Point | None], batch: Any, *, rechecks: bool = False
    ) -> torch.Tensor:
        """Mean losses of a batch on the device, (number of points,) in float64; None is the
        parameters as they are.

        Before the first: does the model give a loss, which modules use which parameters, and does
        one forward give what separate ones do? Raises ValueError where the model gives no loss, or
        cannot be evaluated as was asked.

        rechecks: compare a stack with a separate forward, on all ranks together; see `_rechecked`.
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
        if form is self._forms.stacked and not (
            isinstance(batch, dict) and isinstance(batch.get("labels"), torch.Tensor)
        ):
            # a separate forward reports what the batch lacks, or gives a loss without labels
            form = self._forms.sequential
        size = self.streams_per_forward
        parts = [points[k : k + size] for k in range(0, len(points), size)]
        return torch.cat([form.losses(part, batch) for part in parts])

    # --- how to evaluate --------------------------------------------------------------------------

    def _choose(self, batch: Any) -> Form:
        """The form that is known from before, or the first that fits."""
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
        """A later batch does not fit the form that was chosen: it is evaluated separately.

        The other ranks learn it with the sums of the step (`left_form`), and all leave the form
        then (`leave_form`). Raises RuntimeError where another rank may be in the middle of the same
        forward, and wait for this one.
        """
        if self._forwards.is_sharded and self._comm.world_size > 1:
            raise RuntimeError(
                f'zeroth_order.evaluation: "{self.evaluation}" fitted the first batch, but not '
                f"this one: {error}. Set it to "
                '"sequential".'
            ) from error
        release_gathered(self._forwards.deepspeed)
        if not self.left_form:
            logger.warning(
                "evaluation: sequential from now on, no longer %s: %s", self.evaluation, error
            )
        self.left_form = True

    def leave_form(self) -> None:
        """Evaluate separately from now on, on all ranks."""
        self._form, self.left_form = self._forms.sequential, False

    def _rechecked(self, losses: torch.Tensor, points: Sequence[Point], batch: Any) -> torch.Tensor:
        """`losses`, or those of another form where a stack does not give the model's own loss on
        this batch.

        What is special about a loss or a router may show on later batches only. All ranks call it
        together.
        """
        f = self._forwards
        outputs, differ = None, [False, False]
        if float(loss_count(batch, f.objective)):  # else there is nothing to compare, on this rank
            tolerance = 1e-3 if f.dtype == torch.float32 else 3e-2
            outputs = f.outputs_at(points[0], batch)
            pairs = (f.own_and_logits_loss(outputs, batch), (losses[0], f.mean_of(outputs, batch)))
            differ = [
                not torch.allclose(a, b, rtol=tolerance, atol=1e-2 * tolerance, equal_nan=True)
                for a, b in pairs
            ]
        elif f.is_sharded:
            f.outputs_at(points[0], batch)  # the other ranks gather
        misfits = self._comm.sum_over_ranks(list(map(float, differ)))
        if not any(misfits):
            return losses
        if misfits[0]:
            f.take_own_loss(batch)
        fits = self._chooser.misfit(self._forms.lockstep, batch) is None
        form = self._form = self._forms.lockstep if fits else self._forms.sequential
        logger.warning(
            "evaluation: %s from now on, no longer stacked: %s",
            form.name,
            "it does not give the model's own loss on a later batch"
            if outputs is None
            else f"on this batch the model's loss is {float(f.own_and_logits_loss(outputs, batch)[0]):.6g}, from a stack "
            f"{float(losses[0]):.6g}",
        )
        return self._losses_together(form, points, batch)

    def loss_sums(
        self, points: Sequence[Point | None], batch: Any, *, rechecks: bool = False
    ) -> torch.Tensor:
        """Return losses times their denominators, then the denominator: (number of points + 1,) in
        float64. All are 0 if no label counts.
        """
        self._beat()
        losses = self.losses(points, batch, rechecks=rechecks)
        count = loss_count(batch, self._forwards.objective).to(losses.device)
        return torch.cat([torch.where(count > 0, losses * count, 0.0), count[None]])

    def whole_set_losses(
        self,
        points: Sequence[Point],
        dataset: Any,
        collate_fn: Callable | None,
        *,
        title: str,
        micro_batch: int,
        split: tuple[int, int],
        total: Callable[[Sequence[float]], Sequence[float]],
    ) -> list[float]:
        """Mean losses over a whole dataset under the objective; NaN where no label counts.

        split: (index, number) of this rank among those that divide the dataset, in micro-batches of
        one size. total: sums over them.
        """
        rounds = WholePass(dataset, micro_batch, *split, collate_fn)
        sums = torch.zeros(len(points) + 1, dtype=torch.float64, device=self._comm.device)
        for batch, counted in tqdm(rounds, desc=title, leave=False, disable=self._comm.rank != 0):
            found = self.loss_sums(points, self.inputs(batch))
            if counted:
                sums += found
        *totals, count = total(sums.tolist())
        return [of_point / count if count else math.nan for of_point in totals]

    def mean_loss(self, batches: Iterator[Any]) -> float:
        """Mean loss at the parameters under the objective, over `batches` and all ranks; NaN where
        no label counts.

        batches: the same number of them on every rank.
        """
        sums = torch.stack([self.loss_sums([None], self.inputs(batch)) for batch in batches]).sum(0)
        total, count = self._comm.sum_over_ranks(sums.tolist())
        return total / count if count else math.nan
