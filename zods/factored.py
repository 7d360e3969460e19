"""What a low-rank direction adds to the output of a module that multiplies by a matrix: (x V) U^T beside x W^T.

The weights stay as they are, so one matrix product serves all streams. Activations carry the factors in their own dtype.
"""

from __future__ import annotations

import torch
from torch import nn

Form = str  # "linear": weight (out, in); "conv1d": (in, out); "embedding": (rows, out)


def form_of(module: nn.Module) -> Form | None:
    """How `module` uses its `weight`, or None where that is not known: subclasses with another forward are not."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return "linear"
    if forward is nn.Embedding.forward and module.max_norm is None:
        return "embedding"
    if (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return "conv1d"
    return None


def add_(
    form: Form,
    output: torch.Tensor,
    x: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    scale: float,
    mirrored: int,
) -> None:
    """output <- scale * output + what the matrix left @ right, of the weight's shape, would give for the input `x`.

    output: (..., out), contiguous. x: (..., in), or indices (...). left: (rows, Q), right: (Q, columns), float32.
    mirrored: in the second half of `x` on dim 0 the last so many columns of `left` count negative; 0: none.
    """
    if form == "embedding":
        inner = left[x.reshape(-1)]
    else:
        inner = x.reshape(-1, x.shape[-1]) @ (right.T if form == "linear" else left).to(x.dtype)
    outer = (left.T if form == "linear" else right).to(output.dtype)
    if mirrored:
        inner[inner.shape[0] // 2 :, -mirrored:].neg_()
    output.view(-1, output.shape[-1]).addmm_(inner.to(output.dtype), outer, beta=scale)
