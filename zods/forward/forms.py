"""The forms of evaluation: how the losses of a batch at several points are computed.

    sequential   one forward after the other
    stacked      one forward of as many copies of the batch as points; losses from the logits
    lockstep     as many forwards as points, which wait for each other at every module

All give the same losses, up to rounding, on models that fit the form. `zods.forward.choose_form`
chooses one on the first batch; the evaluator uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from zods.core.points import Point
from zods.data.batch import call_model, num_examples
from zods.forward.model_forwards import ModelForwards, logits_in
from zods.forward.stacked import NotStackable


class Form(Protocol):
    def losses(self, points: Sequence[Point], batch: Any) -> torch.Tensor:
        """Mean losses of a batch at the points: (number of points,)."""
        ...


class Sequential:
    def __init__(self, forwards: ModelForwards) -> None:
        self._forwards = forwards

    def losses(self, points: Sequence[Point], batch: Any) -> torch.Tensor:
        return torch.stack([self._forwards.loss_at(point, batch) for point in points])


class Stacked:
    def __init__(self, forwards: ModelForwards) -> None:
        self._forwards = forwards

    def losses(self, points: Sequence[Point], batch: Any) -> torch.Tensor:
        """Mean losses at the points.

        Raises NotStackable where the batch or a module cannot be stacked.
        """
        logits = self.logits(points, batch)
        return torch.stack([self._forwards.mean_of({"logits": part}, batch) for part in logits])

    def logits(self, points: Sequence[Point], batch: Any) -> tuple[torch.Tensor, ...]:
        """The logits of a batch at each point, from one forward of as many copies of it."""
        if not isinstance(batch, dict) or "labels" not in batch:
            raise NotStackable("the batch is not a dict with labels")
        size = num_examples(batch)
        stack = {
            key: _stacked(value, len(points), size)
            for key, value in self._forwards.without_loss(batch).items()
        }
        with self._forwards.at.at_all(points, size):
            logits = logits_in(self._forwards.outputs(stack))
        return logits.chunk(len(points))


class Lockstep:
    def __init__(self, forwards: ModelForwards) -> None:
        self._forwards = forwards

    def losses(self, points: Sequence[Point], batch: Any) -> torch.Tensor:
        """Mean losses at the points.

        Raises NotInLockstep where the forwards call different modules.
        """
        f = self._forwards
        f.into_eval_mode()

        def loss(k: int) -> torch.Tensor:
            # DeepSpeed's hooks on the whole model count forwards: they run once, in the first
            # stream
            call = f.deepspeed if k == 0 else f.module.forward
            return f.mean_of(call_model(call, batch), batch)

        return torch.stack(f.at.in_lockstep(points, loss))


def _stacked(value: Any, num_points: int, size: int) -> Any:
    """Repeat an entry of a batch of `size` examples for each point; one row serves all examples."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] not in (1, size):
        return value
    return value.expand(size, *value.shape[1:]).repeat(num_points, *[1] * (value.ndim - 1))
