"""Activation memory of a forward, found by running it on fake tensors.

Every operation of the model's own forward is executed on tensors without memory, and their sizes are
added up as `zods.forward.peak_memory` does in a run on a CPU. So the figure follows from the model's
code, whatever its architecture. `torch.nn.functional.scaled_dot_product_attention` counts as a fused
kernel: its output and the padding mask in the dtype of the queries, without a matrix of scores.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from zods.forward.peak_memory import peak_memory
from zods.planning.model_shape import ModelShape

# Elements of logits that the loss converts to float32 at a time; see `zods.data.objectives`.
_LOSS_CHUNK = 1 << 24
_LOSS_COPIES = 2  # float32 logits of a chunk, and their log-softmax


class Activations(NamedTuple):
    """Bytes of the tensors of one inference forward and of the losses after it.

    peak: the largest size at any time, logits included. logits: the part of it that is alive to the
    end. Both grow in proportion to the rows.
    """

    peak: int
    logits: int


@functools.cache
def activations(model: ModelShape, rows: int, length: int) -> Activations:
    """Run a forward of (rows, length) tokens on fake tensors.

    The batch has a padding mask, as a batch of examples of different lengths does. Raises ValueError
    where the model's forward needs the values of its tensors.
    """
    try:
        with model.mode, torch.no_grad(), _FusedAttention():
            ids = torch.zeros(rows, length, dtype=torch.long)
            with peak_memory(torch.device("cpu")) as peak:
                outputs = model.module(
                    input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
                )
    except Exception as error:  # a model's forward may raise anything
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"--model {model.name}: its forward of {rows} x {length} tokens cannot be followed "
            f"without values: {first}"
        ) from error
    logits = outputs.logits
    of_loss = _LOSS_COPIES * 4 * min(logits.numel(), _LOSS_CHUNK)
    return Activations(max(peak.bytes, logits.nbytes + of_loss), logits.nbytes)


class _FusedAttention(TorchFunctionMode):
    """Replace scaled_dot_product_attention by its output alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, mask = args[0], kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.to(query.dtype)  # as torch does, for the time of the call
        return torch.empty_like(query)
