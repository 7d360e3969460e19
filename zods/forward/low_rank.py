"""Modules that multiply by a matrix, and what a low-rank direction adds to their output: (x V) U^T
beside x W^T.

With low-rank directions the weights stay as they are, so one matrix product serves all streams;
activations carry the factors in their own dtype.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from zods import kernels

# weight of "linear": (out, in); of "conv1d": (in, out); of "embedding": (rows, out)
MatrixProduct = Literal["linear", "conv1d", "embedding"]


def product_of(module: nn.Module) -> MatrixProduct | None:
    """Return how `module` uses its `weight`, or None if that is not known. Subclasses with another
    forward are not known.
    """
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return "linear"
    if forward is nn.Embedding.forward and module.max_norm is None:
        return "embedding"
    if (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return "conv1d"
    return None


def projected(
    product: MatrixProduct,
    x: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    mirrored: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, Q) and (Q, out) float32, whose product is what the matrix left @ right, of the weight's
    shape, gives for `x`.

    x: (..., in), or indices (...), N in all. left: (rows, Q), right: (Q, columns), float32.
    mirrored: in the second half of `x` on dim 0 the last so many of the Q count negative; 0: none.
    """
    if product == "embedding":
        inner = left[x.reshape(-1)]
    else:
        inner = (
            x.reshape(-1, x.shape[-1]) @ (right.T if product == "linear" else left).to(x.dtype)
        ).float()
    if mirrored:
        inner[inner.shape[0] // 2 :, -mirrored:].neg_()
    return inner, left.T if product == "linear" else right


def add_(output: torch.Tensor, inner: torch.Tensor, outer: torch.Tensor, scale: float) -> None:
    """output <- scale * output + inner @ outer in one sweep, the sums in float32. output: (...,
    out), contiguous.
    """
    sums = output if output.dtype in kernels.DTYPES else output.float()
    factors = (inner.contiguous(), outer.contiguous())
    kernels.combine_(sums, weight=sums, scale=scale, factors=factors, parameter=0, offset=0)
    if sums is not output:
        output.copy_(sums)


def empty_output(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Allocate one output for all streams of a linear module, or return None if the streams'
    outputs must be concatenated.
    """
    if torch.is_autocast_enabled(x.device.type) or x.dtype != module.weight.dtype:
        return None
    return x.new_empty(*x.shape[:-1], module.weight.shape[0])


def linear_(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """out <- x @ weight^T + bias. out: (N, outputs), whose rows may be parts of longer ones; x:
    (..., inputs), N in all.
    """
    rows = x.reshape(-1, x.shape[-1])
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)
