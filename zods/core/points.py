"""Points in parameter space at which a loss is evaluated.

A point is a center and a perturbation along one direction. The center is the parameters themselves,
or the anchor point. A point holds no tensors. The modules of `zods.forward` compute the value of a
parameter at a point when the parameter is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch


class Center(NamedTuple):
    """Value of one parameter at a center: scale * weight + sum_k coefficients[k] * z(seeds[k])."""

    weight: torch.Tensor  # the whole parameter
    scale: float = 1.0
    seeds: tuple[int, ...] = ()
    coefficients: tuple[float, ...] = ()


def at_parameters(parameter: Any, live: torch.Tensor) -> Center:
    """The center that is the parameters themselves."""
    return Center(live)


@dataclass(frozen=True)
class Point:
    """The point center + coefficient * z(seed).

    center: maps (parameter, its current whole data) to a `Center`. rows: the examples of the batch
    that are evaluated at this point; None: all.
    """

    seed: int
    coefficient: float
    center: Callable[[Any, torch.Tensor], Center] = field(default=at_parameters)
    rows: tuple[int, ...] | None = None

    def is_mirror_of(self, other: Point) -> bool:
        """Whether the points lie on opposite sides of the same center, at the same distance, and
        have the same examples.
        """
        return replace(self, coefficient=-self.coefficient) == other


def pair(seed: int, eps: float, **others: Any) -> list[Point]:
    """The points center + eps * z and center - eps * z. others: fields of `Point`."""
    return [Point(seed, sign * eps, **others) for sign in (1, -1)]
