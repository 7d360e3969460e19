"""The loss of a module whose weights are overwritten in place, for `DenseReference`: right for any
module.

`torch.func.functional_call` replaces attributes, so a hook that reads a module's own parameters, a
weight that a hook made before, or a parent that reads `child.weight.data` would see other values.
Here the parameters themselves hold the values of the point while the module's plain forward runs.
There is no code of zods in it, and no DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.reference.dense import Loss, Parameters


def loss_in_place(module: torch.nn.Module, mean_loss: Callable[[Any, Any], Tensor]) -> Loss:
    """A `Loss` that overwrites the parameters of `module` and runs it: mean_loss(outputs, part of
    the batch).

    The batch is a sequence of parts of one size, each a dict of keyword arguments or a tuple of
    positional ones. Its loss is the mean over the parts, as several micro-batches of equal content
    give it.
    """
    module.eval()
    named = dict(module.named_parameters())

    @torch.no_grad()
    def loss(params: Parameters, parts: Sequence[Any]) -> float:
        for name, param in named.items():
            param.data.copy_(params[name])
        losses = []
        for part in parts:
            outputs = module(**part) if isinstance(part, dict) else module(*part)
            losses.append(mean_loss(outputs, part).item())
        return sum(losses) / len(losses)

    return loss
