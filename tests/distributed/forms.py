"""Points, and their losses in each form of evaluation.

The losses of several points at once are compared with separate forwards, and with those of a plain
model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

import zods
from tests.distributed.models import configuration
from zods.core.directions import Direction
from zods.core.points import Center, Point
from zods.data.objectives import batch_loss
from zods.params.shards import ShardedParameters

EPS = 1e-2


def engine_of(model: nn.Module, **arguments: Any) -> Any:
    """An engine with four examples per rank, and with ZeRO-3 on several ranks."""
    world_size = torch.distributed.get_world_size()
    arguments = {"method": "mezo", "stage": 3 if world_size > 1 else 0, **arguments}
    return zods.initialize(model=model, config=configuration(4 * world_size, **arguments))[0]


class Found(NamedTuple):
    """A comparison of losses.

    error: the largest relative difference of a loss from its separate forward.
    apart: the relative distance between the lowest and the highest loss.
    """

    form: str
    error: float
    apart: float


def drifted(parameter: Any, live: torch.Tensor) -> Center:
    """A center like that of an anchor kept as terms: a decay and two updates are taken back."""
    return Center(live, 0.97, (11, 12), (0.01, -0.02))


@functools.cache
def _another(ordinal: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(ordinal))).to(dtype)


def stored_elsewhere(parameter: Any, live: torch.Tensor) -> Center:
    """A center like that of an anchor kept as a copy."""
    return Center(_another(parameter.ordinal, tuple(live.shape), live.dtype))


def pairs(*starts: Any) -> list[Point]:
    """A mirrored pair of points at each start. None stands for the parameters."""
    made = []
    for seed, start in enumerate(starts, 5):
        center = {} if start is None else {"center": start}
        made += [Point(seed, sign * EPS, **center) for sign in (1, -1)]
    return made


POINTS = {
    "two pairs": pairs(None, None),
    "drifted": pairs(None, drifted),
    "stored elsewhere": pairs(None, stored_elsewhere),
}


def compare(evaluator: Any, points: Sequence[Point], batch: Any) -> Found:
    """Compare the losses of all points together with the model's own in separate forwards."""
    together = evaluator.losses(points, batch).means
    forwards = evaluator._forwards
    separate = torch.stack(
        [forwards.mean_of(forwards.outputs_at(point, batch), batch) for point in points]
    )
    error = ((together - separate).abs() / separate.abs()).max()
    return Found(
        evaluator.evaluation,
        error.item(),
        ((separate.max() - separate.min()) / separate.abs().max()).item(),
    )


@torch.no_grad()
def dense_losses(
    model: nn.Module, points: Sequence[Point], batch: Any, direction: Direction
) -> torch.Tensor:
    """The losses of whole perturbed copies of the model.

    Only the definition of a direction is taken from zods.
    """
    parameters = ShardedParameters(model, rank=0)
    losses = []
    for point in points:
        at = {}
        for shard in parameters:
            weight, scale, seeds, coefficients = point.center(shard, shard.param.data)
            arguments = {"scale": scale, "seeds": (*seeds, point.seed)}
            at[shard.name] = direction.combine_(
                torch.empty_like(weight),
                shard,
                weight=weight,
                coefficients=(*coefficients, point.coefficient),
                **arguments,
            )
        losses.append(batch_loss(torch.func.functional_call(model, at, (), batch), batch).double())
    return torch.stack(losses)
