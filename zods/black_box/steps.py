"""The steps of a minimisation: those of the engine, for a function of tensors in one process.

A step evaluates the function at pairs of points, x + eps z and x - eps z. `StepRule` turns the
differences into an estimate. The estimate becomes a record of the trajectory log, and `History`
turns the record into a change of x, as in a run of the engine and in a replay.

A function without examples is one of a single example: every batch is the whole set.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zods.black_box.objective import Objective
from zods.black_box.variables import Variables
from zods.config.schema import ZerothOrderConfig
from zods.core.anchor_weight import AnchorWeight, record_products
from zods.core.estimators import Term, Update
from zods.core.example_groups import group_starts, part_starts
from zods.core.step_scale import StepScale, record_estimate
from zods.core.update_rule import StepRule
from zods.data.order import anchor_order, epoch_order
from zods.kernels import fingerprint
from zods.trajectory.log import Trajectory
from zods.trajectory.records import Header, ParameterRecord, Refresh, RunRecord, Step
from zods.trajectory.updates import History, direction_of

logger = logging.getLogger(__name__)


def batches(num_examples: int, batch_size: int, seed: int) -> Iterator[tuple[Tensor, int, int]]:
    """Yield (example indices, epoch, steps of the epoch so far) of each step, without end."""
    for epoch in itertools.count():
        order = epoch_order(num_examples, batch_size, seed, epoch)
        for number, indices in enumerate(order, start=1):
            yield indices, epoch, number


class Minimization:
    """The state of a minimisation, which `refresh` and `step` advance.

    values: the tensors of x. num_steps: number of steps made, the skipped ones among them.
    skipped, skipped_in_a_row: number of steps that were skipped because a loss was not finite.
    """

    def __init__(
        self,
        config: ZerothOrderConfig,
        batch_size: int,
        objective: Objective,
        variables: Variables,
        trajectory: Trajectory,
    ) -> None:
        self.config, self.objective = config, objective
        self.values = variables.start
        self.num_steps = self.skipped = self.skipped_in_a_row = 0
        self._variables, self._trajectory = variables.variables, trajectory
        self._rule, self._history = StepRule(config), History(config)
        self._direction = direction_of(config)
        self._batches = batches(objective.num_examples, batch_size, config.seed)
        self._group_starts = group_starts(batch_size, config.examples_per_direction)
        self._batch_size = batch_size
        self._scale, self._measured_weight = StepScale(), AnchorWeight()
        self._anchor: list[Tensor] = []  # x at the last refresh
        self._anchor_gradient: list[Tensor] = []

    def begin(self, about: dict[str, str]) -> None:
        """Log what a replay needs. about: other information, for human readers."""
        parameters = tuple(
            ParameterRecord(
                variable.name,
                variable.shape,
                str(value.dtype).removeprefix("torch."),
                trained=True,
                fingerprint=fingerprint(value),
            )
            for variable, value in zip(self._variables, self.values, strict=True)
        )
        self._trajectory.add(Header("function", parameters))
        self._trajectory.add(RunRecord(0, self.config, self._batch_size, 1, about))

    # --- cost -------------------------------------------------------------------------------------

    @property
    def refresh_is_due(self) -> bool:
        """Whether the next step needs a refresh of the anchor before it."""
        return self.config.is_svrg and self.num_steps % self.config.anchor_interval == 0

    @property
    def next_evaluations(self) -> int:
        """Number of losses that the next step computes, with the refresh before it."""
        pairs = self.config.num_directions * (2 if self.config.is_svrg else 1) * self._batch_size
        if self.refresh_is_due:
            passes = 1 if self.config.anchor_split else self.config.anchor_directions
            pairs += passes * self.objective.num_examples
        return 2 * pairs

    # --- the refresh of the anchor ----------------------------------------------------------------

    def refresh(self, lr: float) -> None:
        """Make x the anchor, estimate the gradient there over all examples, and step along it.

        lr: step size of that step. The last anchor stays where a loss is not finite. Raises
        RuntimeError where there is none.
        """
        config, step, n = self.config, self.num_steps, self.objective.num_examples
        seeds = self._rule.seeds("anchor", step, config.anchor_directions)
        num_parts = len(seeds) if config.anchor_split else 1
        order_seed = self._rule.seeds("anchor_examples", step, 1)[0]
        order = anchor_order(n, examples=None, shuffled=num_parts > 1, seed=order_seed)
        parts = _parts(order, part_starts(n, num_parts)) * (len(seeds) // num_parts)
        differences = []
        for seed, examples in zip(seeds, parts, strict=True):
            plus, minus = self._pair(self.values, seed, examples)
            differences.append((plus - minus).sum().item() / n)
        coefficients = _coefficients(self._rule.estimate_at_anchor(seeds, differences))
        if not coefficients and not self._anchor:
            raise RuntimeError("function: not finite near x0. Start elsewhere, or lower eps.")
        rms = record_estimate(StepScale(), coefficients).rms if config.normalize else None
        self._commit(Refresh(step, lr, coefficients, rms, in_16_bits=self._rule.logs_16_bits))

    # --- a step -----------------------------------------------------------------------------------

    def step(self, lr: float) -> Step:
        """Make a step on the next batch. Returns its record, whose loss is None if it was skipped.

        Raises RuntimeError after `max_nonfinite_steps` skipped steps in a row.
        """
        indices, *at = next(self._batches)
        differences, loss = self._differences(indices)
        weight = self._anchor_weight
        terms, _, products = self._rule.estimate(self.num_steps, differences, weight)
        coefficients = _coefficients(terms)
        record = Step(self.num_steps, loss if coefficients else None, lr, coefficients,
                      (at[0], at[1]), weight=weight, in_16_bits=self._rule.logs_16_bits)  # fmt: skip
        if coefficients:
            self.skipped_in_a_row = 0
            gradient = (weight * term.coefficient for term in self._history.gradient)
            self._scale = record_estimate(self._scale, (*coefficients, *gradient))
            self._measured_weight = record_products(self._measured_weight, products)
            record = replace(
                record,
                rms=self._scale.rms if self.config.normalize else None,
                products=products if self.config.anchor_weight == "auto" else None,
            )
        self._commit(record)
        self.num_steps += 1
        if record.skipped:
            self._count_skipped(loss)
        return record

    def _differences(self, indices: Tensor) -> tuple[list[list[float]], float]:
        """The differences of a step's losses, as `StepRule.estimate` takes them, and the mean loss
        around x.
        """
        n, groups = self.config.num_directions, _parts(indices, self._group_starts)
        share = len(groups) / len(indices)
        differences, loss = [], 0.0
        for group, examples in enumerate(groups):
            seeds, anchor_seeds = self._rule.step_seeds(self.num_steps, group)
            pairs = [self._pair(self.values, seed, examples) for seed in seeds]
            loss += sum((plus + minus).sum().item() for plus, minus in pairs)
            if self.config.is_svrg:
                pairs += [self._pair(self._anchor, seed, examples) for seed in anchor_seeds]
            differences.append([share * (plus - minus).sum().item() for plus, minus in pairs])
        return differences, loss / (2 * n * len(indices))

    def _pair(self, center: Sequence[Tensor], seed: int, examples: Tensor) -> list[Tensor]:
        """The losses of examples at center + eps z and at center - eps z."""
        points: tuple[list[Tensor], list[Tensor]] = ([], [])
        for variable, weight in zip(self._variables, center, strict=True):
            plus, minus = torch.empty_like(weight), torch.empty_like(weight)
            self._direction.combine_(
                plus,
                variable,
                weight=weight,
                seeds=[seed],
                coefficients=[self.config.eps],
                mirror=minus,
            )
            points[0].append(plus)
            points[1].append(minus)
        return [self.objective.losses(point, examples) for point in points]

    @property
    def _anchor_weight(self) -> float:
        given = self.config.anchor_weight
        return self._measured_weight.value if given == "auto" else given

    def _count_skipped(self, loss: float) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        logger.warning(
            "step %d skipped: a loss is not finite; the mean is %s", self.num_steps, loss
        )
        if self.skipped_in_a_row > self.config.max_nonfinite_steps:
            raise RuntimeError(
                f"function: not finite in {self.skipped_in_a_row} steps in a row "
                f"(max_nonfinite_steps = {self.config.max_nonfinite_steps}); the last mean loss is "
                f"{loss}. Lower lr or eps, or make the function finite there."
            )

    # --- records and changes ----------------------------------------------------------------------

    def _commit(self, record: Refresh | Step) -> None:
        """Log a record, and apply it to x and to the anchor."""
        self._trajectory.add(record)
        change = self._history.change(record)
        if change is not None:
            if isinstance(record, Refresh):
                self._set_anchor(change.gradient)
            self._apply(change.update)
        self._trajectory.wait()

    def _set_anchor(self, gradient: Sequence[Term]) -> None:
        self._anchor = [value.clone() for value in self.values]
        self._anchor_gradient = [
            self._direction.combine_(
                torch.empty_like(value),
                variable,
                seeds=[term.seed for term in gradient],
                coefficients=[term.coefficient for term in gradient],
            )
            for variable, value in zip(self._variables, self.values, strict=True)
        ]
        self._measured_weight = AnchorWeight()

    def _apply(self, update: Update) -> None:
        along_gradient = update.anchor_grad_coefficient != 0.0
        for k, (variable, value) in enumerate(zip(self._variables, self.values, strict=True)):
            dense = self._anchor_gradient[k].view(-1) if along_gradient else None
            sweep = update.sweep(decays=False)
            self._direction.replay_(value.view(-1), variable, 0, [sweep], dense)


def _coefficients(terms: Sequence[Term]) -> tuple[float, ...]:
    return tuple(term.coefficient for term in terms)


def _parts(indices: Tensor, starts: Sequence[int]) -> list[Tensor]:
    """Divide indices into parts. starts: the position of the first index of each part."""
    return list(indices.tensor_split(list(starts)[1:]))
