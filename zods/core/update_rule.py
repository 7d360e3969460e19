"""Seeds, estimates and updates of MeZO and MeZO-SVRG, as functions of the step number and its
losses. No tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from zods.core import estimators
from zods.core.directions import derive_seed
from zods.core.estimators import Term, Update


class StepSettings(Protocol):
    """The settings that the rule depends on; `zods.config.schema.ZerothOrderConfig` has them."""

    @property
    def seed(self) -> int: ...
    @property
    def eps(self) -> float: ...
    @property
    def num_directions(self) -> int: ...
    @property
    def directions(self) -> str: ...
    @property
    def is_svrg(self) -> bool: ...
    @property
    def share_direction(self) -> bool: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def stochastic_rounding(self) -> bool: ...


@dataclass(frozen=True)
class StepRule:
    """A function of the step's number and of its losses alone: the same on all ranks, and in a
    replay.
    """

    config: StepSettings

    def seeds(self, purpose: str, step: int, number: int, of: int = 0) -> list[int]:
        return [
            derive_seed(self.config.seed, purpose, step, of * number + k) for k in range(number)
        ]

    def step_seeds(self, step: int, of: int) -> tuple[list[int], list[int]]:
        """The directions of a step at the parameters and at the anchor: of one rank, or of all
        where they share them.
        """
        number = self.config.num_directions
        at_parameters = self.seeds("step", step, number, of)
        shared = self.config.share_direction
        return at_parameters, at_parameters if shared else self.seeds(
            "step_anchor", step, number, of
        )

    def rounding_seed(self, purpose: str, step: int) -> int | None:
        return (
            derive_seed(self.config.seed, purpose, step)
            if self.config.stochastic_rounding
            else None
        )

    def estimate(
        self, step: int, losses: Sequence[Sequence[float]]
    ) -> tuple[tuple[Term, ...], float]:
        """The estimate of the gradient as terms, less that of the full batch, and the mean
        projected gradient at the parameters.

        losses: at the points of each set of directions: one set, or one per rank, each weighted by
        the rank's share of the global batch such that their mean is the global batch's.
        Coefficients are rounded to float32, in which the log keeps them; noise is many orders
        above.
        """
        n = self.config.num_directions
        coefficients: list[float] = []
        anchor_coefficients: list[float] = []
        for of_set in losses:
            grads = estimators.projected_grads(of_set[0::2], of_set[1::2], self.config.eps)
            coefficients, anchor_coefficients = (
                coefficients + grads[:n],
                anchor_coefficients + grads[n:],
            )
        seeds, anchor_seeds = self._all_seeds(step, len(losses))
        if self.config.is_svrg:
            terms = estimators.svrg(seeds, coefficients, anchor_seeds, anchor_coefficients)
        else:
            terms = estimators.spsa(seeds, coefficients)
        return estimators.in_float32(terms), sum(coefficients) / len(coefficients)

    def estimate_of(self, step: int, coefficients: Sequence[float]) -> tuple[Term, ...]:
        """The terms of an estimate from their coefficients alone, as a log keeps them. Raises
        ValueError where they are not as many as an estimate has."""
        per_set = self.config.num_directions * (2 if self._draws_twice else 1)
        number, left_over = divmod(len(coefficients), per_set)
        if left_over or (number > 1 and self.config.directions == "shared"):
            raise ValueError(
                f"{len(coefficients)} coefficients, expected {per_set} (times the ranks, if "
                f"per_rank)"
            )
        seeds, anchor_seeds = self._all_seeds(step, number)
        return tuple(map(Term, seeds + (anchor_seeds if self._draws_twice else []), coefficients))

    @property
    def _draws_twice(self) -> bool:
        return self.config.is_svrg and not self.config.share_direction

    def _all_seeds(self, step: int, num_sets: int) -> tuple[list[int], list[int]]:
        sets = [self.step_seeds(step, of) for of in range(num_sets)]
        return [seed for seeds, _ in sets for seed in seeds], [
            seed for _, seeds in sets for seed in seeds
        ]

    def update(
        self,
        step: int,
        estimate: Sequence[Term],
        lr: float,
        anchor_terms: Sequence[Term] = (),
        anchor_coefficient: float = 0.0,
    ) -> Update:
        """The update of a step. anchor_terms, anchor_coefficient: what `estimators.along_gradient`
        gives; none for MeZO.
        """
        return Update(
            terms=(*estimators.descend(estimate, lr), *anchor_terms),
            decay=1.0 - lr * self.config.weight_decay,
            anchor_grad_coefficient=anchor_coefficient,
            rounding_seed=self.rounding_seed("rounding", step),
        )

    def anchor_gradient(self, step: int, coefficients: Sequence[float]) -> tuple[Term, ...]:
        """The full-batch gradient at a refresh, from the mean's coefficients."""
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
