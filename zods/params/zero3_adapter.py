"""Access to what DeepSpeed's ZeRO-3 keeps of a parameter, where it has no documented way.

All of zods that touches undocumented parts of DeepSpeed is here. On a Parameter: `ds_tensor` (the
local shard with its padding), `ds_shape`, `ds_numel`, `ds_status` and `nvme_swapper`. Of ZeRO-3's
coordinator: `fetch_sub_module` and `__prefetch_nvme`. Of the swapper: `swap_in`,
`synchronize_reads`, `swap_out_and_release`, `swap_out_params`, `synchronize_writes`,
`remove_partition_and_release_buffers` and `available_swap_in_buffers`. Read in DeepSpeed 0.19.8;
tests/distributed/test_sharding.py and test_deferral.py fail where they change. No DeepSpeed class
is patched, and no attribute is set on a Parameter.

A parameter that is not sharded (stage 0) is its own shard. Called by the other modules of
`zods.params`, and by those who read or drop gathered copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus


class Partition(NamedTuple):
    """This rank's part of a parameter, in elements of the flat whole.

    shape: of the whole. numel: without padding, may be 0. padded_numel: the same on all ranks.
    """

    shape: tuple[int, ...]
    offset: int
    numel: int
    padded_numel: int


def is_sharded(param: torch.nn.Parameter) -> bool:
    return hasattr(param, "ds_tensor")


def partition_of(param: Any, rank: int) -> Partition:
    if not is_sharded(param):
        return Partition(tuple(param.shape), 0, param.numel(), param.numel())
    padded = param.ds_tensor.ds_numel
    offset = rank * padded
    numel = min(max(param.ds_numel - offset, 0), padded)
    return Partition(tuple(param.ds_shape), offset, numel, padded)


@contextmanager
def gathered(params: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Gather the whole of `params` into their `.data`, for reading."""
    with deepspeed.zero.GatheredParameters(
        list(params), enabled=bool(params) and is_sharded(params[0])
    ):
        yield


def release_gathered(deepspeed_engine: Any) -> None:
    """Drop every gathered copy that DeepSpeed still holds, so that the next forward gathers what is
    stored.

    Waits for gathers that are under way, which a forward that was cut short leaves behind.
    """
    # An engine without an optimizer has the part of ZeRO-3 that manages parameters in its place.
    offload = getattr(deepspeed_engine.optimizer, "parameter_offload", deepspeed_engine.optimizer)
    if not hasattr(offload, "get_param_coordinator"):
        return
    for module in deepspeed_engine.module.modules():
        if any(
            is_sharded(p) and p.ds_status is ZeroParamStatus.INFLIGHT
            for p in module.parameters(recurse=False)
        ):
            offload.get_param_coordinator().fetch_sub_module(module, forward=True)
    offload.partition_all_parameters()


def stop_nvme_prefetch(deepspeed_engine: Any) -> None:
    """Make DeepSpeed read shards from NVMe when they are needed, not ahead.

    DeepSpeed 0.19.8 fails on a parameter that its trace of a forward names twice within its
    read-ahead. Where forwards advance in lockstep, the trace names every parameter once per
    forward.
    """
    coordinator = deepspeed_engine.optimizer and deepspeed_engine.optimizer.get_param_coordinator()
    if coordinator is not None:
        coordinator._PartitionedParameterCoordinator__prefetch_nvme = False


def local_shard(param: Any, numel: int) -> torch.Tensor:
    """The first `numel` elements of this rank's shard, as a 1-D view of where they are stored."""
    if is_sharded(param):
        return param.ds_tensor.data.view(-1)[:numel]
    return param.data.view(-1)


# --- shards on NVMe -------------------------------------------------------------------------------


def on_nvme(param: Any) -> bool:
    return is_sharded(param) and getattr(param.ds_tensor, "final_location", None) == "nvme"


def can_read_ahead(param: Any) -> bool:
    """Whether the shard is on NVMe and a buffer is free for it."""
    return on_nvme(param) and bool(param.nvme_swapper.available_swap_in_buffers())


def begin_load(param: Any) -> None:
    """Start to read a shard from NVMe, unless that is under way.

    Waits for writes if it needs their buffer.
    """
    if on_nvme(param) and param.ds_tensor.status is PartitionedParamStatus.NOT_AVAILABLE:
        if param.nvme_swapper.available_swap_in_buffers() == 0:
            param.nvme_swapper.synchronize_writes()
        param.nvme_swapper.swap_in([param], async_op=True)


def finish_load(param: Any) -> None:
    if on_nvme(param):
        param.nvme_swapper.synchronize_reads()


def release_shard(param: Any, write: bool) -> None:
    """Release the memory of a shard that was loaded. write: store it first; this goes on until
    `finish_stores`.
    """
    if not on_nvme(param):
        return
    if write:
        # of the shard before; this write runs while the next is computed
        param.nvme_swapper.synchronize_writes()
        param.nvme_swapper.swap_out_and_release([param], async_op=True, force_buffer_release=True)
    else:
        param.nvme_swapper.remove_partition_and_release_buffers([param])


def store_from_gathered(param: Any, offset: int, numel: int) -> None:
    """Store this rank's shard of a parameter that is gathered; on NVMe this goes on until
    `finish_stores`.
    """
    updated = param.data.view(-1)[offset : offset + numel]
    released = on_nvme(param) and param.ds_tensor.status is not PartitionedParamStatus.AVAILABLE
    if released:  # as DeepSpeed does with the shard of a parameter that stays gathered
        # on one CPU rank it may lie in the memory that the shard is read into
        updated = updated.clone()
        begin_load(param)
        finish_load(param)
    local_shard(param, numel).copy_(updated)
    if on_nvme(param):
        param.nvme_swapper.swap_out_and_release([param], async_op=True, force_buffer_release=True)
        if not released:
            # DeepSpeed releases the shard with the gathered parameter
            param.nvme_swapper.swap_out_params.pop()


def finish_stores(params: Sequence[Any]) -> None:
    stored = [param for param in params if on_nvme(param)]
    if stored:
        stored[0].nvme_swapper.synchronize_writes()
