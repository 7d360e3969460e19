"""What a step evaluates and what follows from its losses, for MeZO and MeZO-SVRG: seeds, points, updates. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zods import estimators
from zods.directions import derive_seed
from zods.estimators import Term, Update
from zods.section import ZerothOrderConfig
from zods.streams import Point


@dataclass(frozen=True)
class StepRule:
    """A function of the step's number and of its losses alone: the same on all ranks, and in a replay."""

    config: ZerothOrderConfig

    def seeds(self, purpose: str, step: int, number: int, of: int = 0) -> list[int]:
        return [derive_seed(self.config.seed, purpose, step, of * number + k) for k in range(number)]

    def step_seeds(self, step: int, of: int) -> tuple[list[int], list[int]]:
        """The directions of a step at the parameters and at the anchor: of one rank, or of all where they share them."""
        number = self.config.num_directions
        at_parameters = self.seeds("step", step, number, of)
        shared = self.config.share_direction
        return at_parameters, at_parameters if shared else self.seeds("step_anchor", step, number, of)

    def rounding_seed(self, purpose: str, step: int) -> int | None:
        return derive_seed(self.config.seed, purpose, step) if self.config.stochastic_rounding else None

    def pairs(self, seeds: Sequence[int], **source: Any) -> list[Point]:
        return [Point(seed, sign * self.config.eps, **source) for seed in seeds for sign in (1, -1)]

    def points(self, step: int, of: int, anchor_source: Any) -> list[Point]:
        """Pairs at the parameters, then with SVRG at the anchor. of: the rank whose directions they are, 0 if shared."""
        seeds, anchor_seeds = self.step_seeds(step, of)
        return self.pairs(seeds) + (self.pairs(anchor_seeds, source=anchor_source) if self.config.is_svrg else [])

    def update(
        self,
        step: int,
        losses: Sequence[Sequence[float]],
        lr: float,
        anchor_terms: Sequence[Term],
        anchor_coefficient: float,
    ) -> tuple[Update, float]:
        """The update of a step, and the mean projected gradient at the parameters.

        losses: at the points of each set of directions: one set, or one per rank. anchor_terms, anchor_coefficient: what
        `Anchor.descent(lr)` gives; nothing for MeZO.
        """
        n = self.config.num_directions
        seeds: list[int] = []
        anchor_seeds: list[int] = []
        coefficients: list[float] = []
        anchor_coefficients: list[float] = []
        for of, of_set in enumerate(losses):
            of_seeds, of_anchor_seeds = self.step_seeds(step, of)
            grads = estimators.projected_grads(of_set[0::2], of_set[1::2], self.config.eps)
            seeds, anchor_seeds = seeds + of_seeds, anchor_seeds + of_anchor_seeds
            coefficients, anchor_coefficients = coefficients + grads[:n], anchor_coefficients + grads[n:]
        if self.config.is_svrg:
            terms = estimators.svrg(seeds, coefficients, anchor_seeds, anchor_coefficients)
        else:
            terms = estimators.spsa(seeds, coefficients)
        update = Update(
            terms=(*estimators.descend(terms, lr), *(t for t in anchor_terms if t.coefficient != 0.0)),
            decay=1.0 - lr * self.config.weight_decay,
            anchor_grad_coefficient=anchor_coefficient,
            rounding_seed=self.rounding_seed("rounding", step),
        )
        return update, sum(coefficients) / len(coefficients)
