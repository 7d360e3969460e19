"""Memory of one rank under ZeRO-3, by kind.

Not counted: the CUDA context, buffers of NCCL, fragmentation by the allocator, Python and its
libraries, the loading of the weights, and a batch's own tensors. The rank is rank 0, whose shards
are the largest.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from zods.forward.choose_form import CHECK_EXAMPLES
from zods.forward.large_matrices import BLOCK_BYTES, MOST_ROWS, is_large
from zods.forward.low_rank import product_of
from zods.params.anchor_stores import ALIGNMENT
from zods.params.zero3_adapter import smallest_on_nvme
from zods.planning.activations import forward_peak
from zods.planning.model_shape import ParameterShape
from zods.planning.setup import Setup

# DeepSpeed aligns reads and writes of parameters to so many bytes for each thread of async_io
# (AIO_ALIGNED_BYTES of deepspeed/runtime/swap_tensor/utils.py, 0.19.8).
_AIO_ALIGNMENT = 1024


class Bytes(NamedTuple):
    """Bytes of one rank: on its device, in host memory, and on NVMe.

    pinned: the part of `host` that is page-locked through CUDA. locked: the part that is page-locked
    by mlock(2), which `ulimit -l` bounds.
    """

    device: int = 0
    host: int = 0
    nvme: int = 0
    pinned: int = 0
    locked: int = 0


class StepForwards(NamedTuple):
    """The forwards of a step.

    rows: of the largest forward, over all its points. streams: points of each group of examples in
    one forward. number: of forwards in a step, on each rank.
    """

    rows: int
    streams: int
    number: int


def memory(setup: Setup) -> dict[str, Bytes]:
    """Memory of one rank, by kind. The sum is the peak of a step.

    weights: this rank's shards. activations: of a forward of all its points, with logits and losses.
    gathered and copies: what whole parameters (`gathered_of_modules`) and perturbed copies
    (`copies_of_modules`) add to the peak of the activations. anchor point, anchor gradient: of
    MeZO-SVRG. NVMe buffers: of async_io.
    """
    forwards = step_forwards(setup)
    staying, gathered = gathered_of_modules(setup)
    held = tuple(map(operator.add, gathered, copies_of_modules(setup, forwards)))
    alone, whole = (_forward_bytes(setup, forwards.rows, held=held_of) for held_of in ((), held))
    return {
        "weights": weights_bytes(setup),
        "activations": Bytes(alone),
        "gathered and copies": Bytes(staying + whole - alone),
        "anchor point": anchor_bytes(setup, "point"),
        "anchor gradient": anchor_bytes(setup, "gradient"),
        "NVMe buffers": nvme_buffers(setup),
    }


def _forward_bytes(setup: Setup, rows: int, held: Sequence[int] = ()) -> int:
    return forward_peak(
        setup.model,
        rows,
        setup.length,
        held=held,
        on_gpu=setup.on_gpu,
        own_loss_rows=0 if setup.form == "stacked" else min(CHECK_EXAMPLES, setup.rows_of_point),
    ).bytes


def total(amounts: Sequence[Bytes]) -> Bytes:
    """The sum of amounts, kind of memory by kind of memory."""
    return Bytes(*(sum(of_kind) for of_kind in zip(*amounts, strict=True)))


# --- weights --------------------------------------------------------------------------------------


def stored_on(setup: Setup, parameter: ParameterShape) -> str:
    """Where a parameter's shards are: "device", "host" or "nvme".

    With NVMe offload, a shard of less than aio.block_size (1 MiB at least) stays in host memory. A
    parameter of at most stage3_param_persistence_threshold elements stays on the device with either
    offload, unless its shard is on NVMe. Source: `Init._partition_param` of DeepSpeed 0.19.8.
    """
    shard = parameter.padded_numel(setup.world_size) * parameter.dtype.itemsize
    if setup.offload == "nvme" and shard >= smallest_on_nvme(setup.aio):
        return "nvme"
    if setup.offload == "none" or parameter.numel <= setup.zero.param_persistence_threshold:
        return "device"
    return "host"


def weights_bytes(setup: Setup) -> Bytes:
    """This rank's shards: the sum over parameters of ceil(numel / ranks) elements."""
    sizes = dict.fromkeys(("device", "host", "nvme"), 0)
    for parameter in setup.model.parameters:
        shard = parameter.padded_numel(setup.world_size) * parameter.dtype.itemsize
        sizes[stored_on(setup, parameter)] += shard
    offload = setup.zero.offload_param
    pins = setup.on_gpu and offload is not None and offload.pin_memory
    return Bytes(**sizes, pinned=sizes["host"] if pins else 0)


def nvme_buffers(setup: Setup) -> Bytes:
    """Buffers of DeepSpeed's NVMe offload, and of an anchor on NVMe, all locked by mlock.

    offload_param.buffer_count * buffer_size elements, and for each of point and gradient
    anchor.buffer_count blocks. Sources: `AsyncPartitionedParameterSwapper` of DeepSpeed 0.19.8,
    `zods.params.anchor_stores.NvmeStore`.
    """
    size, offload = 0, setup.zero.offload_param
    itemsize = setup.model.parameters[0].dtype.itemsize
    if setup.offload == "nvme" and offload is not None:
        alignment = _AIO_ALIGNMENT * setup.aio["intra_op_parallelism"]
        size += offload.buffer_count * _aligned(offload.buffer_size * itemsize, alignment)
    zo = setup.config.zeroth_order
    if zo.is_svrg:
        alignment = ALIGNMENT * setup.aio["intra_op_parallelism"]
        largest = max(_owned_bytes(setup, p) for p in setup.model.parameters)
        asked = zo.anchor.buffer_size * itemsize
        block = max(_aligned(min(asked, largest), alignment), alignment)
        size += zo.anchor.storages().count("nvme") * zo.anchor.buffer_count * block
    return Bytes(host=size, locked=size)


def anchor_bytes(setup: Setup, role: str, rank: int = 0) -> Bytes:
    """The anchor's point or gradient (`role`) on a rank: its shards without padding.

    Nothing with "terms". A file on NVMe has each shard aligned to 4096 bytes per thread. Source:
    `zods.params.anchor_stores`.
    """
    zo = setup.config.zeroth_order
    storage = getattr(zo.anchor, role) if zo.is_svrg else "terms"
    alignment = ALIGNMENT * setup.aio["intra_op_parallelism"] if storage == "nvme" else 1
    size = sum(_aligned(_owned_bytes(setup, p, rank), alignment) for p in setup.model.parameters)
    if storage == "cpu":
        pins = setup.on_gpu and zo.anchor.pin_memory
        return Bytes(host=size, pinned=size if pins else 0)
    return {"terms": Bytes(), "device": Bytes(device=size), "nvme": Bytes(nvme=size)}[storage]


def _owned_bytes(setup: Setup, parameter: ParameterShape, rank: int = 0) -> int:
    return parameter.owned_numel(rank, setup.world_size) * parameter.dtype.itemsize


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


# --- gathered parameters --------------------------------------------------------------------------


def gathered_of_modules(setup: Setup) -> tuple[int, list[int]]:
    """Bytes of whole parameters that ZeRO-3 holds: to the end of a forward, and besides them while
    each of `ModelShape.modules` runs; an upper bound.

    While a module runs, it holds the module's parameters and those that it has prefetched: the next
    ones in the order of the forward, until they have stage3_prefetch_bucket_size elements or all
    held ones stage3_max_live_parameters. Several parameters fetched together are gathered into one
    buffer and copied out of it. Offloaded shards are copied to the device first. Parameters of at
    most stage3_param_persistence_threshold elements, and shared ones where the model is smaller
    than stage3_max_reuse_distance, stay to the end of the forward.
    Source: `PartitionedParameterCoordinator` and `AllGatherCoalescedHandle` of DeepSpeed 0.19.8.
    """
    model, zero = setup.model, setup.zero
    stays = {p for p in model.parameters if p.numel <= zero.param_persistence_threshold}
    if model.numel < zero.max_reuse_distance:
        stays |= set(model.shared)
    order = [[p for p in own if p not in stays] for _, own in model.modules]
    held_bytes = []
    for k, own in enumerate(order):
        following = [p for of_module in order[k + 1 :] for p in of_module]
        live = sum(p.numel for p in (*own, *stays))
        ahead = list(
            _prefetched(following, min(zero.prefetch_bucket_size, zero.max_live_parameters - live))
        )
        offloaded = (p for p in (*own, *ahead) if stored_on(setup, p) != "device" and setup.on_gpu)
        loaded = sum(p.padded_numel(setup.world_size) * p.dtype.itemsize for p in offloaded)
        whole = 0
        if setup.world_size > 1:
            buffers = [group for group in (own, ahead) if len(group) > 1]
            whole = sum(p.bytes for group in (own, ahead, *buffers) for p in group)
        held_bytes.append(whole + loaded)
    return sum(p.bytes for p in stays) if setup.world_size > 1 else 0, held_bytes


def _prefetched(following: Sequence[ParameterShape], most: int) -> Iterator[ParameterShape]:
    """The parameters that are prefetched: until they have `most` elements."""
    numel = 0
    for parameter in following:
        if numel >= most:
            return
        numel += parameter.numel
        yield parameter


# --- forwards and perturbed copies ----------------------------------------------------------------


def step_forwards(setup: Setup) -> StepForwards:
    """The forwards of a step in the setup's form of evaluation.

    Stacked and in lockstep, a forward has as many points as fit `stream_memory_gb`, by default half
    of the device's memory that weights and anchor leave: an even number, at most all points of the
    step. Source: `ChooseForm._fitting`, `Evaluator._losses_together`. A sequential forward has the
    rows of one group at one point.
    """
    points, groups = 2 * setup.pairs, setup.most_groups
    if setup.form == "sequential":
        return StepForwards(setup.rows_of_point, 1, points * groups * setup.accumulation)
    streams = min(_streams_that_fit(setup), points)
    number = -(-points // streams) * setup.accumulation
    return StepForwards(streams * setup.micro_batch, streams, number)


def _streams_that_fit(setup: Setup) -> int:
    given = setup.config.zeroth_order.stream_memory_gb
    if given is None and setup.gpu_memory is None:
        return 2 * setup.pairs
    kept = [weights_bytes(setup), anchor_bytes(setup, "point"), anchor_bytes(setup, "gradient")]
    free = (setup.gpu_memory or 0) - total(kept).device
    budget = free / 2 if given is None else given * 2**30
    of_pair = _forward_bytes(setup, 2 * setup.micro_batch)
    return 2 * max(1, int(budget / of_pair))


def copies_of_modules(setup: Setup, forwards: StepForwards) -> list[int]:
    """Bytes of perturbed copies and of the anchor's point, for each of `ModelShape.modules`.

    Copies exist for one module at a time: two of each parameter where points are stacked, one
    otherwise. Of a linear layer's weight of 64 MiB or more there are copies of 16 MiB, of an
    embedding as large the rows of the batch's tokens. A matrix with a stacked low-rank direction has
    no copy, but factors: rank * (rows + columns) float32 numbers per pair of points (and for a moment
    some of them twice, which is neglected), and per term since the refresh where the anchor's point
    is kept as terms. A stored point is gathered whole for
    the module. Source: `zods.forward.module_runners`, `matrix_forwards` and `large_matrices`.
    """
    return [_copies_of_module(setup, module, own, forwards) for module, own in setup.model.modules]


def _copies_of_module(
    setup: Setup, module: torch.nn.Module, own: Sequence[ParameterShape], forwards: StepForwards
) -> int:
    zo = setup.config.zeroth_order
    size = 0
    if zo.is_svrg and zo.anchor.point != "terms":
        shards = sum(p.padded_numel(setup.world_size) * p.dtype.itemsize for p in own)
        size += sum(p.bytes for p in own) + shards
    stacked, low_rank = setup.form == "stacked", zo.direction.distribution == "low_rank"
    if stacked and low_rank and product_of(module) is not None:
        numbers = _low_rank_numbers(setup, forwards)
        sides = max(sum(p.shape) for p in own if len(p.shape) == 2)
        return size + 4 * numbers * sides
    number = 2 if stacked else 1
    return size + number * sum(_copied_bytes(setup, module, p) for p in own)


def _low_rank_numbers(setup: Setup, forwards: StepForwards) -> int:
    """Columns of the factors that a matrix has: those of the points and those of the anchor."""
    zo = setup.config.zeroth_order
    columns = forwards.streams // 2 * setup.most_groups
    if zo.is_svrg and zo.anchor.point == "terms":
        per_step = setup.num_groups * zo.num_directions
        columns += per_step * zo.anchor_interval + zo.anchor_directions
    return columns * zo.direction.rank


def _copied_bytes(setup: Setup, module: torch.nn.Module, parameter: ParameterShape) -> int:
    """Bytes of the copy of one parameter at one point."""
    large = is_large(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
    product = product_of(module) if large else None
    if product == "linear":
        return min(parameter.bytes, BLOCK_BYTES)
    tokens = setup.micro_batch * setup.length
    if product == "embedding" and tokens <= MOST_ROWS * parameter.shape[0]:
        return tokens * parameter.shape[1] * parameter.dtype.itemsize
    return parameter.bytes
