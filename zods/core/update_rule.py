"""The step rule of MeZO and MeZO-SVRG: from a step's number and losses to its update.

It uses no tensors. The engine calls it in a run, and `zods.trajectory.updates` in a replay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from zods.core import estimators
from zods.core.anchor_weight import AnchorWeight, products
from zods.core.directions import derive_seed
from zods.core.estimators import Term, Update
from zods.core.ordered_sum import ordered_sum


class StepSettings(Protocol):
    """The settings that the rule depends on; `zods.config.schema.ZerothOrderConfig` has them."""

    @property
    def seed(self) -> int: ...
    @property
    def eps(self) -> float: ...
    @property
    def num_directions(self) -> int: ...
    @property
    def anchor_split(self) -> bool: ...
    @property
    def examples_per_direction(self) -> int | str: ...
    @property
    def is_svrg(self) -> bool: ...
    @property
    def share_direction(self) -> bool: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def stochastic_rounding(self) -> bool: ...


class Estimate(NamedTuple):
    """The estimate of a step.

    terms: see `StepRule.estimate`. projected_grad: the mean projected gradient at the parameters.
    products: of the projected gradients at the parameters and at the anchor.
    """

    terms: tuple[Term, ...]
    projected_grad: float
    products: AnchorWeight


@dataclass(frozen=True)
class StepRule:
    """The rule of a step.

    Its results depend on the settings, the step's number and the losses alone. They are therefore
    the same on all ranks and in a replay.
    """

    config: StepSettings

    def seeds(self, purpose: str, step: int, number: int, set_index: int = 0) -> list[int]:
        """The seeds of one set of a step's directions; a set has `number` directions."""
        first = set_index * number
        return [derive_seed(self.config.seed, purpose, step, first + k) for k in range(number)]

    def step_seeds(self, step: int, group: int) -> tuple[list[int], list[int]]:
        """The seeds of a step's directions at the parameters and at the anchor.

        group: index of the group of examples that the directions belong to.
        """
        number = self.config.num_directions
        at_parameters = self.seeds("step", step, number, group)
        shared = self.config.share_direction
        return at_parameters, at_parameters if shared else self.seeds(
            "step_anchor", step, number, group
        )

    def rounding_seed(self, purpose: str, step: int) -> int | None:
        """The seed of a step's stochastic rounding; None: round to nearest."""
        return (
            derive_seed(self.config.seed, purpose, step)
            if self.config.stochastic_rounding
            else None
        )

    def estimate(
        self, step: int, differences: Sequence[Sequence[float]], anchor_weight: float = 1.0
    ) -> Estimate:
        """Estimate the gradient from the differences of a step's losses.

        The terms of MeZO-SVRG are the correction alone; the anchor gradient is not added here.
        There are no terms where a loss or a coefficient is not finite: such a step is skipped.

        differences: for each group of examples, L(center + eps z) - L(center - eps z) along each of
        its directions: at the parameters, then at the anchor. A group's losses are weighted by its
        share of the global batch, such that the mean over the groups is the loss of the global
        batch.

        Coefficients are rounded to the log's precision. The noise of the estimate is orders of
        magnitude larger.
        """
        if not all(math.isfinite(value) for of_group in differences for value in of_group):
            return Estimate((), math.nan, AnchorWeight())
        n = self.config.num_directions
        coefficients: list[float] = []
        anchor_coefficients: list[float] = []
        for of_group in differences:
            grads = estimators.projected_grads(of_group, self.config.eps)
            coefficients += grads[:n]
            anchor_coefficients += grads[n:]
        seeds, anchor_seeds = self._all_seeds(step, len(differences))
        if self.config.is_svrg:
            terms = estimators.svrg(
                seeds, coefficients, anchor_seeds, anchor_coefficients, anchor_weight
            )
        else:
            terms = estimators.spsa(seeds, coefficients)
        return Estimate(
            _finite(self._rounded(terms)),
            ordered_sum(coefficients) / len(coefficients),
            products(coefficients, anchor_coefficients) if self.config.is_svrg else AnchorWeight(),
        )

    def estimate_at_anchor(
        self, seeds: Sequence[int], differences: Sequence[float]
    ) -> tuple[Term, ...]:
        """Estimate the full-batch gradient at a refresh.

        differences: of the losses over the examples of the refresh, for each of the directions
        `seeds`. With `anchor_split`, a direction's losses are the part of its own examples in the
        mean over all; the gradient is then the sum over the directions, not their mean. There are
        no terms where a loss or a coefficient is not finite.
        """
        if not all(map(math.isfinite, differences)):
            return ()
        grads = estimators.projected_grads(differences, self.config.eps)
        if self.config.anchor_split:
            terms = [Term(seed, c) for seed, c in zip(seeds, grads, strict=True)]
        else:
            terms = estimators.spsa(seeds, grads)
        return _finite(self._rounded(terms))

    def _rounded(self, terms: Sequence[Term]) -> tuple[Term, ...]:
        return (estimators.in_bfloat16 if self.logs_16_bits else estimators.in_float32)(terms)

    @property
    def logs_16_bits(self) -> bool:
        """Whether coefficients are rounded to bfloat16, because a step has many."""
        return self.config.examples_per_direction != "all"

    def estimate_of(self, step: int, coefficients: Sequence[float]) -> tuple[Term, ...]:
        """The terms of an estimate, from the coefficients that a log holds.

        Raises ValueError where the number of coefficients is wrong.
        """
        per_set = self.config.num_directions * (2 if self._draws_twice else 1)
        number, left_over = divmod(len(coefficients), per_set)
        if left_over or (number > 1 and self.config.examples_per_direction == "all"):
            raise ValueError(
                f"{len(coefficients)} coefficients, expected {per_set} for each group of examples"
            )
        seeds, anchor_seeds = self._all_seeds(step, number)
        return tuple(map(Term, seeds + (anchor_seeds if self._draws_twice else []), coefficients))

    @property
    def _draws_twice(self) -> bool:
        return self.config.is_svrg and not self.config.share_direction

    def _all_seeds(self, step: int, num_sets: int) -> tuple[list[int], list[int]]:
        sets = [self.step_seeds(step, index) for index in range(num_sets)]
        return [seed for seeds, _ in sets for seed in seeds], [
            seed for _, seeds in sets for seed in seeds
        ]

    def update(
        self,
        step: int,
        estimate: Sequence[Term],
        lr: float,
        step_size: float,
        anchor_terms: Sequence[Term] = (),
        anchor_coefficient: float = 0.0,
    ) -> Update:
        """The update of a step.

        step_size: the factor of the estimate; lr, or lr divided by the running size of estimates.
        anchor_terms, anchor_coefficient: the result of `estimators.along_gradient`; left out for
        MeZO.
        """
        return Update(
            terms=(*estimators.descend(estimate, step_size), *anchor_terms),
            decay=1.0 - lr * self.config.weight_decay,
            anchor_grad_coefficient=anchor_coefficient,
            rounding_seed=self.rounding_seed("rounding", step),
        )

    def anchor_gradient(self, step: int, coefficients: Sequence[float]) -> tuple[Term, ...]:
        """The terms of the full-batch gradient at a refresh, from their coefficients."""
        return tuple(map(Term, self.seeds("anchor", step, len(coefficients)), coefficients))

    def anchor_update(
        self, step: int, anchor_terms: Sequence[Term], anchor_coefficient: float
    ) -> Update:
        """The update of a refresh: a step along the full-batch gradient."""
        return Update(
            terms=tuple(anchor_terms),
            anchor_grad_coefficient=anchor_coefficient,
            rounding_seed=self.rounding_seed("anchor_rounding", step),
        )


def _finite(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    return terms if all(math.isfinite(term.coefficient) for term in terms) else ()
