"""Choose the form of evaluation: the first form whose results on a small batch equal those of
separate forwards.

A form is compared with separate forwards at two points far from the parameters, so that the results
at the two points are very different. Some models are chaotic there: rounding errors grow from layer
to layer. They are compared again at the distance of a step's points. There, the error of a stack
may be a few times the change of separate forwards when their weights are rounded in another way.

The evaluator calls `ChooseForm` on its first batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from zods.core.points import Point
from zods.data.batch import num_examples, take_rows
from zods.data.loss_probes import other_labels
from zods.data.objectives import logits_of, loss_count
from zods.forward.forms import CHECK_DISTANCE, Form, Forms
from zods.forward.model_forwards import ModelForwards, logits_in
from zods.forward.peak_memory import peak_memory
from zods.forward.stream_budget import StreamBudget
from zods.forward.trial import failure_of

logger = logging.getLogger(__name__)

CHECK_EXAMPLES = 4  # examples on which losses are compared, if the batch can be cut
# largest error of a chaotic model's logits, as a multiple of the change that rounding makes; both
# are a matter of chance
MOST_ROUNDINGS = 5


class ChooseForm:
    """Choose the form of evaluation of one model.

    eps: distance of a step's points from the center. asked: the configuration's key `evaluation`.
    budget: the memory for the points of one forward; None: their losses are not evaluated later.
    grouped: whether groups of a batch's rows have points of their own. streams_per_forward: how many
    points fit one forward of the chosen form.
    """

    def __init__(
        self,
        forwards: ModelForwards,
        forms: Forms,
        *,
        eps: float,
        asked: str,
        grouped: bool,
        budget: StreamBudget | None,
    ) -> None:
        self._forwards, self._comm = forwards, forwards.comm
        self._forms = forms
        self._eps, self._asked = eps, asked
        self._grouped, self._budget = grouped, budget
        self.streams_per_forward = 2

    def choose(self, batch: Any) -> Form:
        """Return the first form that fits, among the forms that the configuration allows.

        Collective, with the same result on all ranks. Raises ValueError on all ranks if the model
        gives no loss, or if the form that the configuration asks for does not fit.
        """
        f = self._forwards
        small = first_examples(batch, CHECK_EXAMPLES)
        with tqdm(
            desc="choosing the form of evaluation",
            unit=" forwards",
            leave=False,
            disable=self._comm.rank != 0,
        ) as bar:
            before = f.on_forward
            f.on_forward = lambda: (before(), bar.update())
            try:
                return self._choose(small)
            finally:
                f.on_forward = before

    def _choose(self, batch: Any) -> Form:
        f, forms = self._forwards, self._forms
        with f.perturbed.observing():
            outputs = f.outputs(batch)
        f.find_objective(outputs, batch)
        own = f.mean_of(outputs, batch)
        random = self._randomness(own, batch)
        if random is not None:
            logger.warning("%s", random)
        own_loss = self._own_loss_misfit(batch, outputs)
        if self._comm.sum_over_ranks([float(own_loss is not None)])[0]:
            own_loss = own_loss or "its loss is not the cross entropy of its logits on another rank"
            f.take_own_loss(batch)
        else:
            f.find_logits(outputs, batch)
        # scores of examples do not depend on the model's own loss
        if self._grouped and random is None and not (f.scores and f.objective.own):
            self._check_halves(batch, f.mean_of(outputs, batch))
            # labels of the first batch may have equal weights in both halves
            for other in _halved_labels(batch, outputs) if f.objective.own else ():
                self._check_halves(other, f.mean_of(f.outputs(other), other))
        if self._asked == "sequential" or (random is not None and self._asked == "auto"):
            return forms.sequential
        reasons: list[str] = []
        auto: tuple[Form, ...] = (forms.stacked, forms.lockstep)
        for form in auto if self._asked == "auto" else (forms.named(self._asked),):
            reason = own_loss if form is forms.stacked else None
            if reason is None:
                reason = self.misfit(form, batch)
            if reason is None:
                found = f" ({'; '.join(reasons)})" if reasons else ""
                logger.info("evaluation: %s%s", form.name, found)
                return form
            if self._asked != "auto":
                raise ValueError(
                    f'zeroth_order.evaluation: "{form.name}" does not fit this model: {reason}. '
                    'Use "auto".'
                )
            reasons.append(f"not {form.name}: {reason}")
        logger.info("evaluation: sequential (%s)", "; ".join(reasons))
        return forms.sequential

    def _randomness(self, own: torch.Tensor, batch: Any) -> str | None:
        """Return a warning if the model gives another loss for the same weights and batch, or None.

        Collective: None on all ranks, or a warning on all ranks. own: the loss of a first forward.
        """
        f = self._forwards
        again = f.mean_of(f.outputs(batch), batch)
        tolerance = 1e-5 if f.dtype == torch.float32 else 2e-3
        differs = not torch.allclose(own, again, rtol=tolerance, atol=0.0, equal_nan=True)
        if not self._comm.sum_over_ranks([float(differs)])[0]:
            return None
        return (
            "the model is random in eval mode: the same weights and batch gave the losses "
            f"{float(own):.6g} and {float(again):.6g}. The losses of a step's points differ by "
            "chance then: make its forward deterministic."
        )

    def _check_halves(self, batch: Any, mean: torch.Tensor) -> None:
        """Raise ValueError, on all ranks, where a batch's loss is not made of its examples' losses.

        A group of examples is evaluated by itself. A contrastive loss, or one with class weights,
        would be another loss then. Collective.

        mean: the loss of the batch.
        """
        f = self._forwards
        size = num_examples(batch)
        total, count = 0.0, float(loss_count(batch, f.objective))
        for rows in _halves(size):
            part = take_rows(batch, rows)
            of_part = float(loss_count(part, f.objective))
            loss = float(f.mean_of(f.outputs(part), part))
            total += of_part * loss if of_part else 0.0
        found, whole = total / count if count and size > 1 else float(mean), float(mean)
        tolerance = 1e-3 if f.dtype == torch.float32 else 3e-2
        differs = not math.isclose(found, whole, rel_tol=tolerance, abs_tol=1e-2 * tolerance)
        differs &= not (math.isnan(found) and math.isnan(whole))
        if self._comm.sum_over_ranks([float(differs)])[0]:
            raise ValueError(
                "zeroth_order: examples_per_direction and anchor_split evaluate parts of a batch by "
                f"themselves, but this model's loss of a batch is {whole:.6g}, and {found:.6g} from "
                "the two halves of the batch. With class weights or a contrastive loss, set "
                'examples_per_direction to "all" and, for mezo_svrg, anchor_split to false.'
            )

    def misfit(self, form: Form, batch: Any) -> str | None:
        """Return the reason why the losses of `form` are not those of separate forwards, or None.

        Collective: None on all ranks, or a reason on all ranks. Sets `streams_per_forward` if the
        form fits.
        """
        f = self._forwards
        stacked = form is self._forms.stacked
        needed, reason, far = 0.0, None, None
        try:
            if stacked:
                reason, needed, far = self._stacked_misfit(batch)
            else:
                reason, needed = self._lockstep_misfit(batch)
        except Exception as error:  # a model may do anything in a form that it was not written for
            reason = failure_of(error, f.deepspeed)
        any_far = stacked and self._comm.sum_over_ranks([float(far is not None)])[0]
        if any_far and not self._comm.sum_over_ranks([float(reason is not None)])[0]:
            near, rounding = self._error_and_rounding(batch, f.without_loss(batch))
            if far is not None and near > MOST_ROUNDINGS * rounding:
                reason = (
                    f"its logits are {far:.1e} off those of separate forwards (relative); at a "
                    f"step's points {near:.1e}, and rounding makes {rounding:.1e}"
                )
        (failures,) = self._comm.sum_over_ranks([float(reason is not None)])
        if reason is None and not failures and self._budget is not None:
            self.streams_per_forward = self._budget.fitting(needed, num_examples(batch))
        return reason or ("it fails on another rank" if failures else None)

    # --- lockstep ---------------------------------------------------------------------------------

    def _lockstep_misfit(self, batch: Any) -> tuple[str | None, float]:
        """Return the reason against lockstep, or None, and the bytes that one more point takes."""
        f = self._forwards
        self._forms.lockstep.prepare(batch)
        points = _points(CHECK_DISTANCE)
        with peak_memory(self._comm.device) as of_one:
            first = f.loss_at(points[0], batch)
        separate = torch.stack([first, f.loss_at(points[1], batch)])
        copies = f.perturbed.scratch_bytes
        with peak_memory(self._comm.device) as of_two:
            found = self._forms.lockstep.losses(points, batch).means
        copies = f.perturbed.scratch_bytes - copies
        same = torch.allclose(found, separate, rtol=1e-6, atol=0.0, equal_nan=True)
        reason = None if same else "its losses differ from those of separate forwards"
        return reason, of_two.bytes - of_one.bytes - copies

    # --- stacked ----------------------------------------------------------------------------------

    def _stacked_misfit(self, batch: Any) -> tuple[str | None, float, float | None]:
        """Return the reason against a stack, or None; the bytes that one more point takes; and the
        relative error of the logits if it is too large, or None.
        """
        f = self._forwards
        if f.perturbed.branches:
            named = ", ".join(sorted(f.perturbed.branches))
            return (
                f"what it computes next depends on values that its weights make ({named} of a "
                "tensor)",
                0.0,
                None,
            )
        stacked, points = self._forms.stacked, _points(CHECK_DISTANCE)
        with peak_memory(self._comm.device) as of_one:
            outputs = stacked.record(points[0], batch)
        first, alone = logits_in(outputs), f.without_loss(batch)
        separate = [first, f.logits_at(points[1], alone)]
        copies = f.perturbed.scratch_bytes
        with peak_memory(self._comm.device) as of_two:
            found = stacked.logits(points, batch)
        # the buffer for copies serves all points
        needed = of_two.bytes - of_one.bytes - (f.perturbed.scratch_bytes - copies)
        if self._grouped:
            halves = _on_halves(points, num_examples(batch))
            separate += [f.logits_at(point, take_rows(alone, point.rows)) for point in halves]
            found += stacked.logits(halves, batch)
        nested = sorted({type(module).__name__ for module in stacked.nested})
        # ranks whose rows are in different numbers of groups would gather them unequally often
        if nested and f.is_sharded and (self._asked == "auto" or self._grouped):
            named = ", ".join(nested)
            return (
                f"{named} would be gathered once per point, as a part of a module with its own "
                "parameters",
                0.0,
                None,
            )
        return None, needed, _error(found, separate)

    def _error_and_rounding(self, batch: Any, alone: Any) -> tuple[float, float]:
        """Return two relative errors of logits at the distance of a step's points.

        The first is the error of a stack against separate forwards. The second is the change of
        separate forwards when the perturbation changes by less than the rounding of the weights.
        alone: the batch without loss.
        """
        f = self._forwards
        points = _points(self._eps)
        halves = _on_halves(points, num_examples(batch)) if self._grouped else []
        change = torch.finfo(f.dtype).eps * 4 * max(CHECK_DISTANCE, self._eps)
        separate, rounded = [], []
        for point in (*points, *halves):
            part = take_rows(alone, point.rows)
            moved = replace(point, coefficient=point.coefficient + change)
            separate.append(f.logits_at(point, part).float())
            rounded.append(f.logits_at(moved, part))
        found = self._forms.stacked.logits(points, batch)
        if halves:
            found += self._forms.stacked.logits(halves, batch)
        size = sum(float(logits.norm()) for logits in separate)
        return tuple(
            sum(float((a.float() - b).norm()) for a, b in zip(others, separate, strict=True)) / size
            for others in (found, rounded)
        )  # type: ignore[return-value]

    def _own_loss_misfit(self, batch: Any, outputs: Any) -> str | None:
        """Return the reason why the model's own loss is not the loss computed from its logits, or
        None.

        The two are compared also with other labels and padding: these may show a difference that
        the batch does not show (class weights, a loss that counts by the mask).
        """
        f = self._forwards
        if not isinstance(batch, dict) or "labels" not in batch:
            return "the batch is not a dict with labels"
        logits = logits_of(outputs)
        if logits is None:
            return "the model gives no logits"
        others = other_labels(batch, logits)
        # all forwards run before the first comparison: on the other ranks they run too, and ZeRO-3
        # gathers collectively
        for given, of_given in ((batch, outputs), *[(other, f.outputs(other)) for other in others]):
            try:
                own, from_logits = f.own_and_logits_loss(of_given, given)
            except ValueError:
                return "its loss is not the cross entropy of its logits"
            if not torch.allclose(own, from_logits, rtol=1e-5, atol=1e-6, equal_nan=True):
                return (
                    f"its loss is not the cross entropy of its logits: {float(own):.6g}, "
                    f"not {float(from_logits):.6g}"
                )
        return None


def _halved_labels(batch: Any, outputs: Any) -> list[dict[str, Any]]:
    """Copies of a batch whose halves have other labels, if it has labels and the model logits."""
    logits = logits_of(outputs)
    if (
        logits is None
        or not isinstance(batch, dict)
        or not isinstance(batch.get("labels"), torch.Tensor)
    ):
        return []
    others = other_labels(batch, logits)
    return [
        {**other, "labels": other["labels"].sort().values} if other["labels"].ndim == 1 else other
        for other in others
    ]


def _points(distance: float) -> list[Point]:
    """Make two points that have only their distance in common."""
    return [Point(seed, distance) for seed in (1, 2)]


def _on_halves(points: Sequence[Point], num_examples: int) -> list[Point]:
    """Give the first of two points the first half of a batch's rows, and the second the others."""
    halves = _halves(num_examples)
    return [replace(point, rows=rows) for point, rows in zip(points, halves, strict=True)]


def _halves(num_examples: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The rows of the two halves of a batch; of a single row, that row twice."""
    middle = max(1, num_examples // 2)
    others = range(min(middle, num_examples - 1), num_examples)
    return tuple(range(middle)), tuple(others)


def _error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float | None:
    """Return the largest relative error of the logits at two points, or None if another order of
    sums explains it.

    The tolerance is a share of the distance between the two points' logits, and a share of their
    size for rounding errors.
    """
    size, apart = expected[0].float().norm(), (expected[0].float() - expected[1].float()).norm()
    tolerance = (
        1e-4 * apart + 1e-5 * size
        if expected[0].dtype == torch.float32
        else 0.05 * apart + 0.01 * size
    )
    error = torch.stack(
        [(a.float() - b.float()).norm() for a, b in zip(found, expected, strict=True)]
    ).max()
    return None if bool(error <= tolerance) else float(error / size)


def first_examples(batch: Any, number: int) -> Any:
    """Return the first examples of a batch that is a dict of tensors with one row per example.

    Any other batch is returned as it is.
    """
    if not isinstance(batch, dict) or not all(
        isinstance(value, (torch.Tensor, bool, type(None))) for value in batch.values()
    ):
        return batch
    size = num_examples(batch)
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    if any(value.ndim == 0 or value.shape[0] != size for value in tensors):
        return batch
    return {
        key: value[:number] if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
