"""Memory and time of first-order training under ZeRO-3, for comparison with a plan."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from zods.forward.peak_memory import peak_memory
from zods.planning.activations import FusedAttention, forward_peak
from zods.planning.memory import gathered_of_modules
from zods.planning.model_shape import ModelShape
from zods.planning.rates import Rates
from zods.planning.setup import Setup
from zods.planning.step_time import StepTime, in_total

# Bytes per parameter of AdamW with mixed precision: bf16 parameter and gradient, float32 master copy
# and two moments (Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1). In float32: parameter,
# gradient, two moments.
ADAMW_BYTES = 16


class FirstOrder(NamedTuple):
    """One rank's bytes on its device, and a step's time."""

    device_bytes: int
    time: StepTime


def first_order(setup: Setup, rates: Rates, ranks_per_node: int) -> dict[str, FirstOrder]:
    """AdamW on all parameters, and on LoRA adapters, with the setup's batch, without checkpointing
    of activations.

    The adapters' own parameters, gradients and moments are not counted, nor are their products. Both
    gather every parameter twice for each micro-batch. AdamW reduces and scatters the whole gradient once
    for each.
    """
    model, ranks = setup.model, setup.world_size
    owned, itemsize = -(-model.numel // ranks), model.dtype.itemsize
    staying, gathered = gathered_of_modules(setup)
    held = staying + max(gathered)
    saved = training_peak(model, setup.micro_batch, setup.length)
    passes = setup.accumulation
    flops = passes * forward_peak(model, setup.micro_batch, setup.length).flops / rates.flops
    received = passes * 2 * (ranks - 1) * owned * itemsize
    link = rates.gathering(setup, ranks_per_node)
    sizes = {"AdamW": ADAMW_BYTES * owned, "LoRA + AdamW": itemsize * owned}
    phases = {
        # A backward pass has two products for each of the forward, one where a weight is frozen.
        "AdamW": {
            "forwards": 3 * flops,
            "gathers": 1.5 * received / link,  # with the gradient's reduction
            "update": 2 * ADAMW_BYTES * owned / rates.memory,
        },
        "LoRA + AdamW": {"forwards": 2 * flops, "gathers": received / link},
    }
    return {
        name: FirstOrder(sizes[name] + held + saved, in_total(phases[name], rates.overlaps))
        for name in sizes
    }


@functools.cache
def training_peak(model: ModelShape, rows: int, length: int) -> int:
    """Peak bytes of the tensors of a forward and backward pass, without gradients of parameters.

    Run on fake tensors, with the attention kernel's inputs and output kept for the backward pass.
    """
    with model.mode, FusedAttention():
        hooks = [p.register_post_accumulate_grad_hook(_drop) for p in model.module.parameters()]
        try:
            ids = torch.zeros(rows, length, dtype=torch.long)
            with peak_memory(torch.device("cpu")) as peak:
                outputs = model.module(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    labels=ids,
                    use_cache=False,
                )
                outputs.loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
    return peak.bytes


def _drop(param: torch.Tensor) -> None:
    """Drop a gradient as soon as it is there: under ZeRO-3 only its shard is kept."""
    param.grad = None
