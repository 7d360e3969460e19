"""Directions as seeds.

A direction z is a function of its seed, and a seed is a function of (base seed, purpose, step,
index). No rank sends a direction to another. `zods.kernels` defines every element
z(seed, parameter, index). In a low-rank direction the part for a matrix is z = U V^T / sqrt(r) with
Gaussian elements of U and V, and the part for any other parameter is Gaussian. For every
distribution E[z z^T] = I.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from zods import kernels

__all__ = ["PURPOSES", "Direction", "Parameter", "derive_seed"]

PURPOSES = (
    *("step", "step_anchor", "anchor", "rounding", "anchor_rounding", "selection"),
    *("anchor_examples", "step_size", "mixture"),
)

_FACTOR_BYTES = 1 << 26  # bytes of the low-rank factors that `replay_` makes at a time


def derive_seed(base_seed: int, purpose: str, step: int, index: int = 0) -> int:
    """The 64-bit seed of direction `index` of step `step` for one of `PURPOSES`.

    The seed is a BLAKE2b digest of the four numbers. Seeds of different purposes, steps and indices
    are therefore unrelated, whatever the base seed.
    """
    return _hash(struct.pack("<QIQI", base_seed, PURPOSES.index(purpose), step, index))


def _hash(message: bytes) -> int:
    return int.from_bytes(
        hashlib.blake2b(message, digest_size=8, person=b"zods-seed").digest(), "little"
    )


class Parameter(Protocol):
    """Identification of a parameter's elements in a direction."""

    @property
    def ordinal(self) -> int:
        """The parameter's position in `named_parameters()`."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Direction:
    """Recipe that makes a direction z from a seed.

    distribution: "gaussian", "rademacher" or "low_rank". rank: rank of the matrices of "low_rank";
    not used by the other distributions.
    """

    distribution: str = "gaussian"
    rank: int = 1

    def has_factors(self, parameter: Parameter) -> bool:
        """Whether z of this parameter is U V^T / sqrt(r)."""
        return self.distribution == "low_rank" and len(parameter.shape) == 2

    def factors(
        self,
        parameter: Parameter,
        seeds: Sequence[int],
        coefficients: Sequence[float],
        rows: range,
        device: torch.device | str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of sum_k c_k z_k for some rows of a matrix.

        Returns (left, right), of shapes (rows, K r) and (K r, columns), float32: the sum is
        left @ right. r is `rank`, or the matrix's smaller side where that is less. left: the K
        matrices c_k / sqrt(r) U_k, concatenated by columns. right: the K matrices V_k^T,
        concatenated by rows.
        """
        left, right = self.factor_stack(parameter, seeds, coefficients, rows, device)
        return left.transpose(0, 1).flatten(1).contiguous(), right.flatten(0, 1)

    def factor_stack(
        self,
        parameter: Parameter,
        seeds: Sequence[int],
        coefficients: Sequence[float],
        rows: range,
        device: torch.device | str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of each c_k z_k for some rows of a matrix.

        Returns (left, right), of shapes (K, rows, r) and (K, r, columns), float32: c_k z_k is
        left[k] @ right[k]. The other arguments are as in `factors`.
        """
        rank = min(self.rank, *parameter.shape)
        of_sides = [[_hash(struct.pack("<QI", seed, side)) for seed in seeds] for side in (0, 1)]
        left, right = (
            kernels.directions(
                number * rank,
                seeds=of_side,
                distribution="gaussian",
                parameter=parameter.ordinal,
                offset=start * rank,
                device=device,
            )
            for of_side, number, start in zip(
                of_sides, (len(rows), parameter.shape[1]), (rows.start, 0), strict=True
            )
        )
        scales = torch.tensor([c / math.sqrt(rank) for c in coefficients], device=device)
        left = left.view(-1, len(rows), rank) * scales.view(-1, 1, 1)
        return left, right.view(-1, rank, parameter.shape[1])

    def stack(
        self, parameter: Parameter, seeds: Sequence[int], device: torch.device | str
    ) -> torch.Tensor:
        """z of a parameter without factors for each seed, (seeds, numel) float32."""
        return kernels.directions(
            math.prod(parameter.shape),
            seeds=seeds,
            distribution="gaussian" if self.distribution == "low_rank" else self.distribution,
            parameter=parameter.ordinal,
            offset=0,
            device=device,
        )

    def combine_(
        self,
        out: torch.Tensor,
        parameter: Parameter,
        offset: int = 0,
        *,
        weight: torch.Tensor | None = None,
        scale: float = 1.0,
        seeds: Sequence[int] = (),
        coefficients: Sequence[float] = (),
        dense: torch.Tensor | None = None,
        dense_coefficient: float = 0.0,
        rounding_seed: int | None = None,
        mirror: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Call `zods.kernels.combine_` with directions of this kind.

        out: elements of `parameter` from index `offset` on. The other arguments are as in
        `zods.kernels.combine_`.
        """
        others = {
            "weight": weight,
            "scale": scale,
            "dense": dense,
            "dense_coefficient": dense_coefficient,
            "rounding_seed": rounding_seed,
            "parameter": parameter.ordinal,
            "offset": offset,
        }
        if not self.has_factors(parameter):
            distribution = "gaussian" if self.distribution == "low_rank" else self.distribution
            terms = {"seeds": seeds, "coefficients": coefficients, "distribution": distribution}
            return kernels.combine_(out, mirror=mirror, **terms, **others)  # type: ignore[arg-type]
        columns = max(parameter.shape[1], 1)
        rows = range(offset // columns, (offset + out.numel() - 1) // columns + 1)
        left, right = self.factors(parameter, seeds, coefficients, rows, out.device)
        if mirror is not None:
            last = right.shape[0] // len(seeds)
            negated = torch.cat([left[:, :-last], -left[:, -last:]], 1)
            kernels.combine_(mirror, factors=(negated, right), **others)  # type: ignore[arg-type]
        return kernels.combine_(out, factors=(left, right), **others)  # type: ignore[arg-type]

    def replay_(
        self,
        out: torch.Tensor,
        parameter: Parameter,
        offset: int,
        sweeps: Sequence[kernels.Sweep],
        dense: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Call `zods.kernels.replay_` with directions of this kind.

        The result has the same bits as one call of `combine_` per sweep. It takes one pass over
        `out`, or for low-rank directions one pass per group of sweeps whose factors fit in
        `_FACTOR_BYTES`.
        """
        if not self.has_factors(parameter):
            distribution = "gaussian" if self.distribution == "low_rank" else self.distribution
            return kernels.replay_(
                out,
                sweeps,
                distribution=distribution,
                parameter=parameter.ordinal,
                offset=offset,
                dense=dense,
            )
        if out.numel() == 0:
            return out
        columns = max(parameter.shape[1], 1)
        rows = range(offset // columns, (offset + out.numel() - 1) // columns + 1)
        rank = min(self.rank, *parameter.shape)
        for number, of_number in itertools.groupby(sweeps, key=lambda sweep: len(sweep.seeds)):
            alike = list(of_number)
            size = max(1, _FACTOR_BYTES // (4 * max(number, 1) * rank * (len(rows) + columns)))
            for start in range(0, len(alike), size):
                part = alike[start : start + size]
                pairs = [
                    self.factors(parameter, s.seeds, s.coefficients, rows, out.device) for s in part
                ]
                left, right = (torch.stack(side) for side in zip(*pairs, strict=True))
                bare = [sweep._replace(seeds=(), coefficients=()) for sweep in part]
                kernels.replay_(
                    out,
                    bare,
                    distribution="gaussian",
                    parameter=parameter.ordinal,
                    offset=offset,
                    factors=(left, right),
                    dense=dense,
                )
        return out
