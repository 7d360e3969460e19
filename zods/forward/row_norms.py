"""Norms that give each row of their input weights of its own.

In a stack of streams every stream has its own perturbed weights. A norm that takes a weight for
each row runs once for the stack, where a module's forward runs once for each stream. With a
direction per example that is one call in place of twice the number of examples.

`zods.forward.perturbed_modules` finds the functions, and `zods.forward.module_runners` calls them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zods.forward.fused_norms import Compute, eps_of, is_same

CPU = torch.device("cpu")


def find_row_norms(model: nn.Module) -> dict[nn.Module, Compute]:
    """Find the norms of a model that can have a weight for each row of their input.

    Returns, by module, the function that computes its output. It takes the module and the input,
    (rows, ..., features), and the module's parameters may be (rows, 1, ..., features). A module is
    taken if the name of its class ends in "Norm", its parameters are vectors, and a function gives
    its outputs within rounding.
    """
    functions = {}
    for module in model.modules():
        # a comparison on a CPU decides for all devices: it tells what a forward computes
        found = (f for f in _candidates(module) if is_same(module, f, CPU, weights_of_rows=True))
        compute = next(found, None)
        if compute is not None:
            functions[module] = compute
    return functions


def _candidates(module: Any) -> list[Compute]:
    """Functions that may compute a module's output, the faster one first."""
    kind = type(module)
    own = {name: p for name, p in module._parameters.items() if p is not None}
    has_others = module._buffers or module._modules or "forward" in vars(module)
    if has_others or "weight" not in own or own.keys() - {"weight", "bias"}:
        return []
    if any(len(getattr(param, "ds_shape", param.shape)) != 1 for param in own.values()):
        return []
    if not kind.__name__.endswith("Norm") or not isinstance(eps_of(module), float):
        return []
    if kind is nn.LayerNorm:
        return [_layer_norm]
    return [_rms_norm, kind.forward]


def _layer_norm(module: Any, x: Tensor) -> Tensor:
    out = functional.layer_norm(x, x.shape[-1:], None, None, module.eps)
    if module.bias is None:
        return out.mul_(module.weight)
    return torch.addcmul(module.bias, out, module.weight, out=out)


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], None, eps_of(module)).mul_(module.weight)
