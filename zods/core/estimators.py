"""SPSA and SVRG estimates as lists of terms. Pure: no ranks, no modules.

An estimate of the gradient is sum_k coefficient_k * z(seed_k). An update is this list of terms,
scaled, plus a multiple of the stored anchor gradient.

Spall 1992 (SPSA); Malladi et al. 2023, arXiv:2305.17333 (MeZO); Gautam et al. 2024,
arXiv:2404.08080, algorithm 2 (MeZO-SVRG). The anchor is kept as a copy, and the two estimates of a
step can share one direction.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from zods.kernels import Sweep


class Term(NamedTuple):
    """One term `coefficient * z(seed)`, over all trainable parameters."""

    seed: int
    coefficient: float


@dataclass(frozen=True)
class Update:
    """One update of the parameters, applied in one pass.

    theta <- decay * theta + sum of terms + anchor_grad_coefficient * g, with g the anchor gradient.

    decay: for parameters of two or more dimensions only (biases and norms are not decayed).
    rounding_seed: seed of the stochastic rounding of 16-bit parameters; None: round to nearest.
    """

    terms: tuple[Term, ...]
    decay: float = 1.0
    anchor_grad_coefficient: float = 0.0
    rounding_seed: int | None = None

    def sweep(self, decays: bool) -> Sweep:
        """The part of the update for one parameter. decays: whether decay applies to it."""
        return Sweep(
            self.decay if decays else 1.0,
            [term.seed for term in self.terms],
            [term.coefficient for term in self.terms],
            self.anchor_grad_coefficient,
            self.rounding_seed,
        )


def projected_grads(differences: Sequence[float], eps: float) -> list[float]:
    """The projected gradient (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps) for each k.

    differences: L(theta + eps z_k) - L(theta - eps z_k).

    >>> projected_grads([0.5], eps=0.25)
    [1.0]
    """
    return [difference / (2 * eps) for difference in differences]


def spsa(seeds: Sequence[int], coefficients: Sequence[float]) -> list[Term]:
    """The mean over directions of c_k z_k."""
    return [Term(seed, c / len(seeds)) for seed, c in zip(seeds, coefficients, strict=True)]


def svrg(
    seeds: Sequence[int],
    coefficients: Sequence[float],
    anchor_seeds: Sequence[int],
    anchor_coefficients: Sequence[float],
    weight: float = 1.0,
) -> list[Term]:
    """The correction of MeZO-SVRG: mean_k c_k z_k - w mean_k a_k z'_k.

    The whole estimate is this correction plus w times the anchor gradient. When both means use the
    same directions (anchor_seeds == seeds), there is one term per direction: (c_k - w a_k) z_k.
    weight: w, see `zods.core.anchor_weight`.
    """
    scaled = [weight * a for a in anchor_coefficients]
    if list(seeds) == list(anchor_seeds):
        return spsa(seeds, [c - a for c, a in zip(coefficients, scaled, strict=True)])
    return spsa(seeds, coefficients) + spsa(anchor_seeds, [-a for a in scaled])


def in_float32(terms: Sequence[Term]) -> tuple[Term, ...]:
    """The terms with their coefficients rounded to float32."""
    return tuple(Term(seed, ctypes.c_float(coefficient).value) for seed, coefficient in terms)


def in_bfloat16(terms: Sequence[Term]) -> tuple[Term, ...]:
    """The terms with their coefficients rounded to bfloat16."""
    values = torch.tensor([coefficient for _, coefficient in terms], dtype=torch.float32)
    rounded = values.bfloat16().tolist()
    return tuple(Term(seed, c) for (seed, _), c in zip(terms, rounded, strict=True))


def along_gradient(
    gradient: Sequence[Term], stored: bool, lr: float
) -> tuple[tuple[Term, ...], float]:
    """A step -lr * g along the anchor gradient, as (terms, coefficient of the stored gradient).

    stored: g is stored as a tensor. Then there are no terms; otherwise the coefficient is 0.
    """
    return ((), -lr) if stored else (descend(gradient, lr), 0.0)


def descend(estimate: Sequence[Term], lr: float) -> tuple[Term, ...]:
    """The terms of theta <- theta - lr * estimate, without terms whose coefficient is 0."""
    return tuple(Term(seed, -lr * c) for seed, c in estimate if lr * c != 0.0)
