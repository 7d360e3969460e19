"""A trajectory log replayed on whole parameters: one record after the other, one application per
step and parameter.

What a record means is written out here; zods gives the definition of seeds and, in plain PyTorch,
of z and of rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tests.reference.dense import half_seed
from zods.config.schema import ZerothOrderConfig
from zods.core.directions import derive_seed
from zods.kernels import reference
from zods.trajectory.records import Record, Refresh, RunRecord, Step

Terms = list[tuple[int, float]]  # (seed, coefficient)


def replayed(
    base: dict[str, Tensor], trained: set[str], records: Iterable[Record]
) -> dict[str, Tensor]:
    """The parameters after `records`, in their dtypes.

    base: all parameters before the first record, in the order of `named_parameters()`.
    """
    params = {name: value.clone() for name, value in base.items()}
    section = ZerothOrderConfig()
    gradient: Terms = []
    for record in records:
        if isinstance(record, RunRecord):
            section = record.section
        if isinstance(record, Refresh) and record.coefficients:
            seeds = [
                derive_seed(section.seed, "anchor", record.step, k)
                for k in range(len(record.coefficients))
            ]
            gradient = list(zip(seeds, record.coefficients, strict=True))
            terms, decay, purpose = [], 1.0, "anchor_rounding"
        elif isinstance(record, Step) and record.coefficients:
            terms = list(zip(seeds_of_step(section, record), record.coefficients, strict=True))
            decay, purpose = 1.0 - record.lr * section.weight_decay, "rounding"
        else:
            continue
        rounding_seed = (
            derive_seed(section.seed, purpose, record.step) if section.stochastic_rounding else None
        )
        stored = section.is_svrg and section.anchor.gradient != "terms"
        size = record.lr if record.rms is None else record.lr / record.rms
        along = size * record.weight if isinstance(record, Step) else size
        if isinstance(record, Refresh):
            terms = [] if stored else gradient
        terms = [(seed, -size * coefficient) for seed, coefficient in terms]
        if isinstance(record, Step) and section.is_svrg and not stored:
            terms += [(seed, -along * coefficient) for seed, coefficient in gradient]
        for ordinal, (name, value) in enumerate(params.items()):
            if name not in trained:
                continue
            dense = (
                combined(section, torch.empty_like(value), ordinal, gradient) if stored else None
            )
            combined(section, value, ordinal, terms, value, decay, dense, -along, rounding_seed)
    return params


def seeds_of_step(section: ZerothOrderConfig, step: Step) -> list[int]:
    """The seeds of all ranks' directions at the parameters, then those at the anchor.

    The anchor has seeds of its own only where directions are not shared with it.
    """
    purposes = (
        ["step"] if section.share_direction or not section.is_svrg else ["step", "step_anchor"]
    )
    number = len(step.coefficients or ()) // len(purposes)
    return [
        derive_seed(section.seed, purpose, step.step, k)
        for purpose in purposes
        for k in range(number)
    ]


def combined(
    section: ZerothOrderConfig,
    out: Tensor,
    ordinal: int,
    terms: Terms,
    weight: Tensor | None = None,
    scale: float = 1.0,
    dense: Tensor | None = None,
    dense_coefficient: float = 0.0,
    rounding_seed: int | None = None,
) -> Tensor:
    """out <- scale * weight + the sum of the terms' directions + dense_coefficient * dense, of a
    whole parameter.
    """
    distribution, factors = section.direction.distribution, None
    if distribution == "low_rank":
        distribution = "gaussian"
        if out.ndim == 2:
            factors, terms = factors_of(section.direction.rank, out, ordinal, terms), []
    scale = scale if out.ndim >= 2 else 1.0
    reference.combine_(
        out.view(-1),
        None,
        None if weight is None else weight.view(-1),
        in_float32(scale),
        [seed for seed, _ in terms],
        [in_float32(coefficient) for _, coefficient in terms],
        distribution,
        ordinal,
        0,
        factors,
        None if dense is None else dense.view(-1),
        in_float32(dense_coefficient),
        None if out.dtype == torch.float32 else rounding_seed,
    )
    return out


def factors_of(rank: int, matrix: Tensor, ordinal: int, terms: Terms) -> tuple[Tensor, Tensor]:
    """The terms' c / sqrt(r) U beside each other, and their V below each other."""
    rank = min(rank, *matrix.shape)
    left, right = [torch.empty(matrix.shape[0], 0)], [torch.empty(0, matrix.shape[1])]
    for seed, coefficient in terms:
        sides = []
        for side, size in enumerate(matrix.shape):
            made = torch.empty(size * rank)
            seeds = [half_seed(seed, side)]
            reference.combine_(
                made, None, None, 1.0, seeds, [1.0], "gaussian", ordinal, 0, None, None, 0.0, None
            )
            sides.append(made)
        left.append(sides[0].view(-1, rank) * (coefficient / math.sqrt(rank)))
        right.append(sides[1].view(rank, -1))
    return torch.cat(left, 1), torch.cat(right)


def in_float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).float().item()
