"""Losses and outputs of a model under DeepSpeed on batches, at given points.

`Evaluator` chooses a form of evaluation on its first batch (`zods.forward.choose_form`), and leaves
the form on a later batch that does not fit it. The engine owns one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from zods.core.example_groups import Group, divide
from zods.core.points import Point
from zods.data.batch import Inputs, num_examples, take_rows, without_references
from zods.data.loader import WholePass
from zods.data.objectives import loss_count
from zods.data.scores import Score
from zods.data.text_scores import TextObjective
from zods.forward.choose_form import CHECK_EXAMPLES, ChooseForm, first_examples
from zods.forward.forms import Form, Forms, PointLosses
from zods.forward.generated_scores import GeneratedScores
from zods.forward.lockstep import NotInLockstep
from zods.forward.loss_sums import LossSums, PairSums, PassDifferences, pair_sums_of
from zods.forward.model_forwards import ModelForwards
from zods.forward.stacked import NotStackable
from zods.forward.stream_budget import StreamBudget
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
        budget: StreamBudget,
        grouped: bool,
        beat: Callable[[], None],
        score: Score | None = None,
        texts: TextObjective | None = None,
    ) -> None:
        """eps: distance of a step's points from the center. evaluation: the configuration's key.
        budget: the memory for the points of one forward. grouped: whether groups of a batch's rows
        have points of their own. beat: called before each batch of losses, so that the watchdog can
        name a rank that hangs in it. score: takes the place of the cross entropy, by which the form
        of evaluation is chosen; texts: so do the scores of generated texts.
        """
        self.streams_per_forward = 2
        self._asked = evaluation
        self._forwards, self._comm, self._beat = forwards, forwards.comm, beat
        self._forms = Forms(forwards)
        self._form: Form | None = None  # chosen on the first batch
        self._chooser = ChooseForm(
            forwards,
            self._forms,
            eps=eps,
            asked=evaluation,
            grouped=grouped,
            budget=budget if texts is None else None,
        )
        self._grouped, self._score = grouped, score
        self._scores = score is not None or texts is not None
        self._generated = None if texts is None else GeneratedScores(forwards, texts, budget, beat)
        self._known: tuple[str, int, bool] | None = None
        self.left_form = False

    @property
    def evaluation(self) -> str | None:
        """Name of the form of evaluation; None before the first batch, on which it is chosen."""
        return None if self._form is None else self._form.name

    @property
    def from_logits(self) -> bool:
        """Whether separate forwards give logits, of which losses are made. A stack always does."""
        return self._form is not self._forms.stacked and self._forwards.from_logits

    def adopt(self, known: tuple[str, int, bool] | None) -> None:
        """Use a form of evaluation that was chosen in an earlier run, under the same conditions.

        known: (name of the form, points per forward, `from_logits`); None: choose a form on the next
        batch.
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
    ) -> PointLosses:
        """Compute the losses at the points, each of its rows of a batch.

        The first call also finds which modules use which parameters, and chooses the form of
        evaluation. Raises ValueError if the model gives no loss, or if the form that the
        configuration asks for does not fit the model.

        points: None is the parameters as they are. Points with rows come in pairs, in sets that
        cover the whole batch. batch: on the device. rechecks: compare the losses with those of the
        model in a separate forward, on all ranks together; see `_rechecked`.
        """
        batch = self._forwards.without_cache(batch)
        self._forwards.perturbed.move_new_hooks()
        if self._form is None:
            chosen = self._choose(without_references(batch))
            if self._scores:
                self._forwards.objective = replace(
                    self._forwards.objective, score=self._score, loss_mean="examples"
                )
            if self._generated is not None:
                chosen = self._generating(self._generated, chosen, batch)
            self._form = chosen
        form = self._form
        at = [point for point in points if point is not None]
        if len(at) < max(len(points), 2):
            if self._generated is not None:
                return self._generated.losses(points, batch, stacked=False)
            return PointLosses(
                torch.stack([self._forwards.loss_at(point, batch) for point in points])
            )
        try:
            losses = self._losses_together(form, at, batch)
        except (NotStackable, NotInLockstep) as error:
            self._refuse_alone(error)
            losses = self._losses_together(self._forms.sequential, at, batch)
        if rechecks and form is self._forms.stacked:
            return self._rechecked(losses, at, batch)
        if rechecks and self.from_logits and not self._scores:
            return self._with_own_loss(losses, form, at, batch)
        return losses

    def _losses_together(self, form: Form, points: Sequence[Point], batch: Any) -> PointLosses:
        """Compute losses in a form of evaluation, so many points at a time as fit one forward."""
        if form is self._forms.stacked and not (
            isinstance(batch, dict) and isinstance(batch.get("labels"), torch.Tensor)
        ):
            # a separate forward reports the missing labels, or gives a loss without labels
            form = self._forms.sequential
        groups = len({point.rows for point in points})
        most = groups
        if self._grouped and self._forwards.is_sharded and form is not self._forms.stacked:
            # The rows of another rank may be in more groups, which have points of their own. Every
            # rank makes as many forwards, because each of them gathers parameters.
            most = int(self._comm.max_over_ranks(groups))
        if most > groups:
            sets = [points[k : k + 2 * groups] for k in range(0, len(points), 2 * groups)]
            lacking = 2 * (most - groups)
            points = [p for of_set in sets for p in (*of_set, *[of_set[-1]] * lacking)]
        # as many forwards on every rank, however its rows are grouped
        size = self.streams_per_forward * most
        parts = [points[k : k + size] for k in range(0, len(points), size)]
        found = [self._losses_in(form, part, batch) for part in parts]
        losses = torch.cat([of_part.means for of_part in found])
        if most > groups:
            return PointLosses(losses.view(-1, 2 * most)[:, : 2 * groups].flatten())
        rows = tuple(of_point for of_part in found for of_point in of_part.rows or ())
        return PointLosses(losses, rows or None)

    def _losses_in(self, form: Form, points: Sequence[Point], batch: Any) -> PointLosses:
        if self._generated is None:
            return form.losses(points, batch)
        return self._generated.losses(points, batch, stacked=form is self._forms.stacked)

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
        name, self.streams_per_forward, from_logits = self._known
        form = self._forms.named(name)
        if from_logits or form is self._forms.stacked:
            f.find_logits(outputs, batch)
        form.prepare(batch)
        return form

    def _generating(self, generated: GeneratedScores, form: Form, batch: Any) -> Form:
        """Return the form in which texts are generated: `form` if it fits, else sequential.

        Raises ValueError, on all ranks, if the configuration asks for a stack that does not fit.
        """
        stacked = form is self._forms.stacked
        misfit = generated.misfit(batch, stacked=stacked)
        if misfit is not None and self._asked == "stacked":
            raise ValueError(
                'zeroth_order.evaluation: "stacked" does not fit the generation of texts by this '
                f'model: {misfit}. Use "auto".'
            )
        if stacked and self._known is None:
            self.streams_per_forward = generated.streams_per_forward
        return form if misfit is None else self._forms.sequential

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

    def _rechecked(self, losses: PointLosses, points: Sequence[Point], batch: Any) -> PointLosses:
        """Compare a stack's losses with a separate forward, and return losses that are right.

        If they differ on any rank, all ranks leave the stacked form, and the losses are computed in
        another form. A special term of a loss, or a router, may have an effect on later batches
        only. Collective: all ranks call it together.
        """
        f, first = self._forwards, losses.means[0]
        # The whole batch shows whether its loss is that of its logits, and the rows of a point
        # whether the stack gives the loss of a separate forward.
        parts = [replace(points[0], rows=None), points[0]] if self._grouped else points[:1]
        found: tuple[torch.Tensor, torch.Tensor] | None = None
        alone = first
        differ = [False, False]
        for point in parts:
            part = take_rows(batch, point.rows)
            counts = float(loss_count(part, f.objective))  # else this rank has nothing to compare
            if not counts and not f.is_sharded:
                continue
            outputs = f.outputs_at(point, part)  # also to take part in the other ranks' all-gathers
            if not counts:
                continue
            compared = f.own_and_logits_loss(outputs, part)
            agrees = self._agree(*compared)
            differ[0] |= not agrees
            if point is parts[-1]:
                alone = f.mean_of(outputs, part)
                # the score of an example may jump where two logits are equal up to rounding
                differ[1] = not self._scores and not self._agree(
                    first, alone, f.rounding_of_loss(outputs, counts)
                )
            if found is None or not agrees:
                found = compared
        misfits = self._comm.sum_over_ranks(list(map(float, differ)))
        if not any(misfits):
            return losses
        if misfits[0]:
            f.take_own_loss(batch)
        fits = self._chooser.misfit(self._forms.lockstep, batch) is None
        form = self._form = self._forms.lockstep if fits else self._forms.sequential
        reason = "it does not give the model's own loss on a later batch"
        if found is not None:
            reason = (
                f"on this batch the model's loss is {float(found[0]):.6g}, from its logits "
                f"{float(found[1]):.6g}; the first point's loss is {float(alone):.6g} in a separate "
                f"forward, {float(first):.6g} in a stack"
            )
        logger.warning("evaluation: %s from now on, no longer stacked: %s", form.name, reason)
        return self._losses_together(form, points, batch)

    def _with_own_loss(
        self, losses: PointLosses, form: Form, points: Sequence[Point], batch: Any
    ) -> PointLosses:
        """Compare the model's own loss with that of its logits on a few rows, and return losses that
        are right.

        If they differ on any rank, the model computes its losses from now on. Collective.
        """
        f, few = self._forwards, first_examples(batch, CHECK_EXAMPLES)
        own, of_logits = f.own_and_logits_loss(
            f.outputs_at(replace(points[0], rows=None), few), few
        )
        (differ,) = self._comm.sum_over_ranks([float(not self._agree(own, of_logits))])
        if not differ:
            return losses
        f.take_own_loss(batch)
        logger.warning(
            "evaluation: with the model's own loss from now on: on this batch it is %.6g, from the "
            "logits %.6g", own, of_logits,
        )  # fmt: skip
        return self._losses_together(form, points, batch)

    def _agree(self, a: torch.Tensor, b: torch.Tensor, rounding: float = 0.0) -> bool:
        """Whether two losses are equal up to the rounding of a forward.

        rounding: for losses of two forwards, the error that the rounding of logits makes.
        """
        tolerance = 1e-3 if self._forwards.dtype == torch.float32 else 3e-2
        atol = 1e-2 * tolerance + rounding
        return torch.allclose(a, b, rtol=tolerance, atol=atol, equal_nan=True)

    def loss_sums(
        self, points: Sequence[Point | None], batch: Any, *, rechecks: bool = False
    ) -> LossSums:
        """Compute the sums of losses at the points."""
        self._beat()
        losses = self.losses(points, batch, rechecks=rechecks)
        objective = self._forwards.objective
        rows = [None if point is None else point.rows for point in points]
        counts = {
            some: loss_count(take_rows(batch, some), objective).to(losses.means.device)
            for some in {None, *rows}
        }
        of_points = torch.stack([counts[some] for some in rows])
        sums = torch.where(of_points > 0, losses.means * of_points, 0.0)
        return LossSums(sums, counts[None], losses.rows)

    def pair_sums(
        self,
        groups: Sequence[Group],
        sets: Sequence[Callable[[Group], Sequence[Point]]],
        batch: Any,
        *,
        rechecks: bool = False,
    ) -> PairSums:
        """Compute the losses of a batch at pairs of points, which each group of rows has its own of.

        sets: each maps a group to a pair of points, on its rows.
        """
        points = [point for pair_of in sets for group in groups for point in pair_of(group)]
        found = self.loss_sums(points, batch, rechecks=rechecks)
        return pair_sums_of(found, groups, len(sets), num_examples(batch))

    def differences_over(
        self,
        dataset: Any,
        order: torch.Tensor,
        starts: Sequence[int],
        sets: Sequence[Callable[[Group], Sequence[Point]]],
        collate_fn: Callable | None,
        *,
        title: str,
        micro_batch: int,
        split: tuple[int, int],
        total: Callable[[Sequence[float]], Sequence[float]],
        before_each: Callable[[], None],
    ) -> PassDifferences:
        """Compute differences of losses over many examples, each group of them at its own pairs of
        points.

        order: indices of the examples. starts: position in `order` of the first example of each
        group. sets: as in `pair_sums`. title: of the progress bar. micro_batch: examples per
        forward and rank. split: (index of this rank, number of ranks) among the ranks that divide
        the examples. All of them use micro-batches of one size. total: adds up values over these
        ranks. before_each: called before each micro-batch.
        """
        rounds = WholePass(Subset(dataset, order.tolist()), micro_batch, *split, collate_fn)
        sums = torch.zeros(len(starts), len(sets), dtype=torch.float64, device=self._comm.device)
        levels, squares = sums.new_zeros(len(sets)), sums.new_zeros(len(sets))
        count = sums.new_zeros(())
        units = 0
        progress = tqdm(rounds, desc=title, leave=False, disable=self._comm.rank != 0)
        for batch, positions, counted in progress:
            before_each()
            inputs = self.inputs(batch)
            if len(starts) > 1 and num_examples(inputs) != len(positions):
                raise ValueError(
                    f"zeroth_order.anchor_split: collate_fn makes {num_examples(inputs)} rows of "
                    f"{len(positions)} examples, so the parts of a refresh cannot be told apart. "
                    "Set it to false."
                )
            found = self.pair_sums(divide(positions, starts), sets, inputs)
            if counted:
                sums[found.groups] += found.differences
                levels += found.sums
                count += found.count
                squares += found.squares
                units += found.units
        *totals, all_units, counted = total(
            [*sums.flatten().tolist(), *levels.tolist(), *squares.tolist(), units, float(count)]
        )
        unit = counted or math.nan
        means = [value / unit for value in totals[: -len(sets)]]
        return PassDifferences(
            means[: sums.numel()],
            means[sums.numel() :],
            [value / unit**2 for value in totals[-len(sets) :]],
            round(all_units),
        )

    def mean_loss(self, batches: Iterator[Any]) -> float:
        """Compute the mean loss at the parameters under the objective, over batches of all ranks.

        batches: the same number on every rank. Returns NaN if no label counts.
        """
        found = (self.loss_sums([None], self.inputs(batch)) for batch in batches)
        sums = torch.stack([torch.cat([one.sums, one.count[None]]) for one in found]).sum(0)
        total, count = self._comm.sum_over_ranks(sums.tolist())
        return total / count if count else math.nan
