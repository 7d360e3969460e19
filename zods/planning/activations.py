"""Activation memory of a forward, found by running it on fake tensors.

Every operation of the model's own forward is executed on tensors without memory, and their sizes are
added up as `zods.forward.peak_memory` does in a run on a CPU. So the figure follows from the model's
code, whatever its architecture. `torch.nn.functional.scaled_dot_product_attention` counts as a fused
kernel: its output and the padding mask in the dtype of the queries, without a matrix of scores.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from zods.forward.peak_memory import AllocationWatch
from zods.planning.model_shape import ModelShape

# Elements of logits that the loss handles at a time; see `zods.data.objectives`.
_LOSS_CHUNK, _LOSS_CHUNK_ON_CPU = 1 << 24, 1 << 20


class ForwardPeak(NamedTuple):
    """The peak of one inference forward with its losses.

    bytes: the largest size at any time of the tensors that the forward makes and of the parameters
    that are held while its modules run. logits: bytes of the logits. flops: floating-point
    operations of its matrix products, 2 for each multiplication with its addition.
    """

    bytes: int
    logits: int
    flops: int


def forward_peak(
    model: ModelShape,
    rows: int,
    length: int,
    *,
    held: Sequence[int] = (),
    on_gpu: bool = True,
    own_loss_rows: int = 0,
) -> ForwardPeak:
    """The peak of a forward of (rows, length) tokens, found on fake tensors.

    The forward runs once for a model, rows and length; the other arguments are applied to what was
    recorded of it.

    held: bytes that exist while each of `model.modules` runs, besides the tensors of its forward;
    none by default. on_gpu: whether the losses are computed on larger parts of the logits at a time,
    as on a GPU. own_loss_rows: rows of another forward, in which the model itself computes a loss, on
    all their logits at once. The batch has a padding mask, as a batch of examples of different
    lengths does.
    Raises ValueError where the model's forward needs the values of its tensors.
    """
    phases, logits, flops = _recorded_forward(model, rows, length)
    most = max(size + sum(held[k] for k in running if k < len(held)) for size, running in phases)
    chunk = _LOSS_CHUNK if on_gpu else _LOSS_CHUNK_ON_CPU
    copies = 1 if logits.dtype == torch.float32 else 2  # log-softmax, and float32 logits
    of_losses = max(
        logits.nbytes + 4 * copies * min(logits.numel(), chunk),
        own_loss_rows * (logits[0].nbytes + 4 * copies * logits[0].numel()),
    )
    return ForwardPeak(max(most, of_losses), logits.nbytes, flops)


class _RecordedForward(NamedTuple):
    """A forward on fake tensors.

    phases: (bytes, modules), the peak of the forward's own tensors between two calls or returns of
    modules, and the indices in `ModelShape.modules` of those that run meanwhile. logits: a fake
    tensor. flops: as in `ForwardPeak`.
    """

    phases: Sequence[tuple[int, tuple[int, ...]]]
    logits: Tensor
    flops: int


@functools.cache
def _recorded_forward(model: ModelShape, rows: int, length: int) -> _RecordedForward:
    counter = FlopCounterMode(display=False)
    attention = FusedAttention()
    phases: list[tuple[int, tuple[int, ...]]] = []
    try:
        with model.mode, torch.no_grad(), attention, counter:
            ids = torch.zeros(rows, length, dtype=torch.long)
            with AllocationWatch() as watch, _recording_phases(model, watch, phases):
                outputs = model.module(
                    input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
                )
    except Exception as error:  # a model's forward may raise anything
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"--model {model.name}: its forward of {rows} x {length} tokens cannot be followed "
            f"without values: {first}"
        ) from error
    return _RecordedForward(phases, outputs.logits, counter.get_total_flops() + attention.flops)


@contextmanager
def _recording_phases(
    model: ModelShape, watch: AllocationWatch, phases: list[tuple[int, tuple[int, ...]]]
) -> Iterator[None]:
    """Append to `phases`, as in `_RecordedForward`, when a module is called and when it returns."""
    running: list[int] = []

    def enter(index: int, *_: Any) -> None:
        phases.append((watch.restart(), tuple(running)))
        running.append(index)

    def leave(index: int, *_: Any) -> None:
        phases.append((watch.restart(), tuple(running)))
        running.remove(index)

    hooks = []
    for index, (module, _) in enumerate(model.modules):
        hooks.append(module.register_forward_pre_hook(functools.partial(enter, index)))
        hooks.append(module.register_forward_hook(functools.partial(leave, index)))
    try:
        yield
    finally:
        phases.append((watch.restart(), tuple(running)))
        for hook in hooks:
            hook.remove()


class FusedAttention(TorchFunctionMode):
    """Replace scaled_dot_product_attention by its output alone.

    flops: of its two products, over the whole square of positions as `torch.utils.flop_counter`
    counts them.
    """

    flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, mask = args[0], args[1], kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.to(query.dtype)  # as torch does, for the time of the call
        self.flops += 4 * query.numel() * key.shape[-2]
        return _Attention.apply(*args[:3])


class _Attention(torch.autograd.Function):
    """The output of an attention kernel, which keeps its inputs and output for a backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(given) for given in ctx.saved_tensors[:3])
