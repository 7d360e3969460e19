"""Forwards of a module at points, for the tests of streams and of what wraps modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zods.core.directions import Direction
from zods.core.points import Point
from zods.forward.module_runners import PointRunner
from zods.forward.perturbed_modules import PerturbedModules
from zods.params.shards import ShardedParameters

EPS = 1e-2


def example(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def perturbed_forward(
    module: nn.Module, distribution: str = "gaussian", observe: bool = True
) -> PerturbedModules:
    slices = ShardedParameters(module, rank=0).shards
    forward_at = PerturbedModules(module, slices, Direction(distribution))
    if observe:
        with torch.no_grad(), forward_at.observing():
            module(example(next(module.parameters()).dtype))
    return forward_at


@torch.no_grad()
def output_at(
    forward_at: PerturbedModules, module: nn.Module, x: Tensor, point: Point | None
) -> Tensor:
    with PointRunner(forward_at).at(point):
        return module(x)
