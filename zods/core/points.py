"""Points in parameter space at which a loss is evaluated: a center and a perturbation along one
direction.

The center is the parameters themselves, or the anchor point. A point holds no tensors. The modules
of `zods.forward` make a parameter's value at a point when the parameter is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Center(NamedTuple):
    """A parameter at the center of points: scale * weight + sum_k coefficients[k] * z(seeds[k])."""

    weight: torch.Tensor  # the whole parameter
    scale: float = 1.0
    seeds: tuple[int, ...] = ()
    coefficients: tuple[float, ...] = ()


def at_parameters(parameter: Any, live: torch.Tensor) -> Center:
    """The center that is the parameters themselves."""
    return Center(live)


@dataclass(frozen=True)
class Point:
    """center + coefficient * z(seed). center: maps (parameter, its live whole data) to a `Center`."""

    seed: int
    coefficient: float
    center: Callable[[Any, torch.Tensor], Center] = field(default=at_parameters)

    def is_mirror_of(self, other: Point) -> bool:
        return (self.seed, -self.coefficient, self.center) == (
            other.seed,
            other.coefficient,
            other.center,
        )


def pairs(seeds: Sequence[int], eps: float, **center: Any) -> list[Point]:
    """center + eps * z and center - eps * z for each seed."""
    return [Point(seed, sign * eps, **center) for seed in seeds for sign in (1, -1)]
