"""Fused functions in place of the forwards of layer norms and RMS norms.

A transformers model computes an RMS norm with about six operations of torch, each of which reads
and writes the activations. A fused function reads and writes them once. The modules and their
parameters stay: a fused function is given the parameters that its module has at the call, which may
be gathered or perturbed ones.

`zods.initialize` finds the functions, and `zods.forward.perturbed_modules` runs them. The comparison
of a function with a module's forward serves `zods.forward.row_norms`, too.
"""

from __future__ import annotations

import copy
import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16)
Compute = Callable[[Any, Tensor], Tensor]  # (module, input) -> output


@dataclass(frozen=True)
class FusedNorms:
    """The norm modules of one model that a fused function computes.

    library: the library of the functions: "apex", "torch", or None. functions: by module; each
    takes the module and its input.
    """

    library: str | None = None
    functions: dict[nn.Module, Compute] = field(default_factory=dict)

    @property
    def code(self) -> dict[str, str]:
        """What ranks compare and a run records of it."""
        count = len(self.functions)
        return {"fused_norm": f"{self.library}, {count}" if count else "none"}


def find_fused_norms(
    model: nn.Module, asked: Literal["auto"] | bool, device: torch.device
) -> FusedNorms:
    """Find the norm modules that a fused function can compute, before the model is sharded.

    A module is taken if its class is known and the function gives its outputs, within rounding, on
    random inputs and weights. The result follows from the arguments and from the installed
    packages.

    asked: the configuration's key `fused_norm`. "auto" leaves a CPU alone: there, torch's
    `rms_norm` is a sequence of operations, too. device: where the model will run. Raises ValueError
    if `asked` is True and there is no such module.
    """
    if asked is False or (asked == "auto" and device.type != "cuda"):
        return FusedNorms()
    apex = import_apex() if device.type == "cuda" else None
    library = "torch" if apex is None else "apex"
    functions = {}
    for module in model.modules():
        compute = _function_for(module, apex)
        if compute is not None and is_same(module, compute, device):
            functions[module] = compute
    if functions:
        logger.info("fused_norm: %s's functions compute %d norms", library, len(functions))
    elif asked is True:
        known = "RMS norms" if apex is None else "RMS norms and layer norms"
        raise ValueError(
            f"zeroth_order.fused_norm: true, but no module of the model is a norm that {library} "
            f'computes with a fused function (it has them for {known}). Use "auto" or false.'
        )
    return FusedNorms(library, functions)


def import_apex() -> Any | None:
    """Return apex's module of fused norms; None where apex is not installed with its CUDA extension.

    Its functions are those of NVIDIA/apex, commit 014f30f.
    """
    try:
        # apex imports its extension at the first call only
        importlib.import_module("fused_layer_norm_cuda")
        return importlib.import_module("apex.normalization.fused_layer_norm")
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        logger.warning("fused_norm: apex is installed, but cannot be imported: %s", error)
        return None


def run_fused(module: Any, compute: Compute, original: Callable, *args: Any, **kwargs: Any) -> Any:
    """Compute a module's output by its fused function, or by its own forward for a call that the
    function was not compared for.
    """
    if len(args) == 1 and not kwargs and was_compared(module, args[0]):
        return compute(module, args[0])
    return original(*args, **kwargs)


def was_compared(module: Any, x: Any) -> bool:
    """Whether an input is of a kind that `is_same` compares: no gradients, no forward-mode
    derivatives (a model's own jvp), no mixed dtypes.
    """
    derivatives = torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0
    if not isinstance(x, Tensor) or derivatives:
        return False
    own_dtype = x.dtype == module.weight.dtype and x.dtype in DTYPES
    return own_dtype and not torch.is_autocast_enabled(x.device.type)


def _function_for(module: Any, apex: Any | None) -> Compute | None:
    """Return the fused function for a module of a known class, or None.

    A LayerNorm and an RMSNorm of torch have torch's function already.
    """
    own = {name for name, param in module._parameters.items() if param is not None}
    kind = type(module)
    if "forward" in vars(module):  # replaced by the model's user or by another library
        return None
    if kind is nn.LayerNorm and own == {"weight", "bias"} and apex is not None:
        layer_norm = apex.fused_layer_norm_affine
        return lambda m, x: layer_norm(x, m.weight, m.bias, m.weight.shape, m.eps)
    named = kind.__name__.endswith(("RMSNorm", "T5LayerNorm"))
    known = named and own == {"weight"} and isinstance(eps_of(module), float)
    if not known or (kind is nn.RMSNorm and apex is None):
        return None
    if apex is not None:
        rms_norm = apex.fused_rms_norm_affine
        return lambda m, x: rms_norm(x, m.weight, m.weight.shape, eps_of(m))
    return lambda m, x: functional.rms_norm(x, m.weight.shape, m.weight, eps_of(m))


def eps_of(module: Any) -> Any:
    """The eps of a norm, under its name in torch or in transformers."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def is_same(
    module: Any, compute: Compute, device: torch.device, *, weights_of_rows: bool = False
) -> bool:
    """Whether a function gives the outputs of a module's forward, within rounding.

    A shallow copy of the module with random weights is compared, because a sharded module has no
    weights. They tell (1 + weight) from weight; a row with a mean square near eps tells where eps
    is added. weights_of_rows: the function is called once with other weights for each row, the
    forward once per row.
    """
    probe = copy.copy(module)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        name: tuple(getattr(param, "ds_shape", param.shape))
        for name, param in module._parameters.items()
        if param is not None
    }
    rows = 3
    x = 0.5 + torch.randn(rows, 2, *shapes["weight"], generator=generator)
    x[1] *= math.sqrt(eps_of(module))
    sets = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(rows if weights_of_rows else 1)
    ]
    for dtype in DTYPES:
        given = x.to(device, dtype)
        try:
            own = []
            for part, values in zip(given.chunk(len(sets)), sets, strict=True):
                _place(probe, values, device, dtype)
                own.append(type(module).forward(probe, part))
            if weights_of_rows:
                stacks = {name: torch.stack([v[name] for v in sets])[:, None] for name in shapes}
                _place(probe, stacks, device, dtype)
            expected, found = torch.cat(own), compute(probe, given)
            tolerance = 8 * torch.finfo(dtype).eps
            same = expected.dtype == found.dtype and expected.shape == found.shape
            if not same or not torch.allclose(expected, found, tolerance, tolerance):
                return False
        except Exception:  # a forward may do anything, and the function may refuse a size
            return False
    return True


def _place(
    module: Any, values: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> None:
    """Give a shallow copy of a module parameters of its own."""
    vars(module)["_parameters"] = dict.fromkeys(module._parameters) | {
        name: nn.Parameter(value.to(device, dtype), requires_grad=False)
        for name, value in values.items()
    }
