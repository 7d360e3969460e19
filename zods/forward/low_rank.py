"""Products of modules that multiply by a matrix, and the part of a low-rank direction in them.

    x (W + U V^T)^T = x W^T + (x V) U^T

With low-rank directions the weights stay as they are, so one product x W^T serves all streams.
Called by `zods.forward.matrix_forwards` and `zods.forward.module_runners`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from zods.kernels import grouped_products

# shape of the weight: "linear" (out, in), "conv1d" (in, out), "embedding" (rows, out)
MatrixProduct = Literal["linear", "conv1d", "embedding"]


def product_of(module: nn.Module) -> MatrixProduct | None:
    """Return how `module` multiplies by its `weight`, or None if it is not known.

    It is not known for a subclass with a forward of its own.
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
    product: MatrixProduct, x: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two float32 matrices, (N, Q) and (Q, out), whose product is the output of the module
    for `x` if its weight is left @ right.

    x: (..., in), or indices (...) of an embedding, N of them. left: (rows of the weight, Q). right:
    (Q, columns of the weight). Both are float32. V is multiplied in the dtype of x.
    """
    if product == "embedding":
        inner = left[x.reshape(-1)]
    else:
        inner = (
            x.reshape(-1, x.shape[-1]) @ (right.T if product == "linear" else left).to(x.dtype)
        ).float()
    return inner, left.T if product == "linear" else right


def projected_each(
    product: MatrixProduct,
    x: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor] | None,
    biases: torch.Tensor | None,
    bounds: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrices of `projected` for K groups of the N rows of `x` with factors and a bias
    of their own: float32 tensors (N, Q) and (K, Q, out), Q = r and 1 more for the bias. V is
    multiplied by `grouped_products.project_`.

    factors: (K, rows of the weight, r) and (K, r, columns of the weight). biases: (K, out). Either is
    None where it is 0. bounds: group k has the rows from bounds[k] to bounds[k + 1] of N.
    """
    outer = [] if biases is None else [biases[:, None]]
    rank = 0
    if factors is not None:
        left, right = factors
        rank = left.shape[2]
        outer.insert(0, left.transpose(1, 2) if product == "linear" else right)
    inner = torch.ones(bounds[-1], rank + (biases is not None), device=x.device)
    if factors is not None and product == "embedding":
        groups = torch.arange(len(left), device=x.device).repeat_interleave(
            torch.tensor(bounds, device=x.device).diff()
        )
        inner[:, :rank] = left[groups, x.reshape(-1)]
    elif factors is not None:
        factor = right if product == "linear" else left.transpose(1, 2)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        grouped_products.project_(inner, rows, factor.contiguous(), bounds)
    return inner, torch.cat(outer, 1)


def projected_together(
    product: MatrixProduct, x: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `projected` for K parts of `x` with factors of their own, (K, N, r) and (K, r, out).

    x: (K times the examples of a part, ...). left: (K, rows of the weight, r). right:
    (K, r, columns of the weight).
    """
    if product == "embedding":
        indices = x.long().reshape(len(left), -1, 1).expand(-1, -1, left.shape[2])
        return left.gather(1, indices), right
    parts = x.reshape(len(left), -1, x.shape[-1])
    factor = right.transpose(1, 2) if product == "linear" else left
    outer = left.transpose(1, 2) if product == "linear" else right
    return torch.bmm(parts, factor.to(x.dtype)).float(), outer


def empty_output(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Allocate the output of a linear module for input `x`, or return None if its dtype is not
    that of `x` and the weight.
    """
    if torch.is_autocast_enabled(x.device.type) or x.dtype != module.weight.dtype:
        return None
    return x.new_empty(*x.shape[:-1], module.weight.shape[0])


def linear_(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """out <- x @ weight^T + bias.

    out: (N, outputs); may be a slice of some columns. x: (..., inputs), N rows. bias: (outputs,).
    """
    rows = x.reshape(-1, x.shape[-1])
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)
