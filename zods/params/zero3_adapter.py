"""Access to a parameter's shard in DeepSpeed's ZeRO-3, where DeepSpeed documents none.

All code of zods that uses undocumented parts of DeepSpeed is here. On a Parameter it uses
`ds_tensor` (the local shard with its padding), `ds_shape`, `ds_numel`, `ds_status` and
`nvme_swapper`. Of ZeRO-3's coordinator it uses `fetch_sub_module` and `__prefetch_nvme`. Of the
swapper it uses `swap_in`, `synchronize_reads`, `swap_out_and_release`, `swap_out_params`,
`synchronize_writes`, `remove_partition_and_release_buffers`, `available_swap_in_buffers`,
`get_path`, `use_gds` and the handles of async_io, which `zods.params.swap_files` replaces. Of
ZeRO-3's optimizer it uses `swap_optimizer`, `optimizer_swapper.is_swappable_tensor` and
`fp16_partitioned_groups_flat_numel`. Of DeepSpeed's engine it uses `module_forward_pre_hook` and
`module_forward_post_hook`. They were read in DeepSpeed 0.19.8. tests/distributed/test_sharding.py,
test_deferral.py, test_swap_files.py, test_engine_interface.py and test_first_order_nvme.py fail when
they change. No DeepSpeed class is patched, and no attribute is set on
a Parameter.

A parameter that is not sharded (stage 0) is its own shard. Called by the other modules of
`zods.params`, and by the modules that read or release gathered copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.swap_tensor.utils import MIN_AIO_BYTES
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus


class Partition(NamedTuple):
    """This rank's part of a parameter, in elements of the flat whole parameter.

    shape: of the whole parameter. offset: index of the first element. numel: elements without
    padding, may be 0. padded_numel: elements with padding, the same on all ranks.
    """

    shape: tuple[int, ...]
    offset: int
    numel: int
    padded_numel: int


def is_sharded(param: torch.nn.Parameter) -> bool:
    """Whether ZeRO-3 shards the parameter."""
    return hasattr(param, "ds_tensor")


def bytes_of(params: Iterable[torch.nn.Parameter]) -> int:
    """The bytes of whole parameters, however they are sharded."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in params)


def partition_of(param: Any, rank: int) -> Partition:
    """The part of a parameter that `rank` owns; the whole parameter where it is not sharded."""
    if not is_sharded(param):
        return Partition(tuple(param.shape), 0, param.numel(), param.numel())
    padded = param.ds_tensor.ds_numel
    offset = rank * padded
    numel = min(max(param.ds_numel - offset, 0), padded)
    return Partition(tuple(param.ds_shape), offset, numel, padded)


@contextmanager
def gathered(params: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Gather whole parameters into their `.data`, for reading (a context manager)."""
    with deepspeed.zero.GatheredParameters(
        list(params), enabled=bool(params) and is_sharded(params[0])
    ):
        yield


def release_gathered(deepspeed_engine: Any) -> None:
    """Release every gathered copy that DeepSpeed holds, so that the next forward gathers anew.

    Waits for all-gathers that are in flight: an interrupted forward leaves some.
    """
    # Without an optimizer, `optimizer` is the part of ZeRO-3 that manages parameters.
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


def remove_hooks(deepspeed_engine: Any) -> None:
    """Take DeepSpeed's hooks off the model. At stage 3 the model then runs no forward."""
    release_gathered(deepspeed_engine)
    deepspeed_engine.destroy()
    # DeepSpeed 0.19.8 leaves the hooks of the engine itself
    for handle in (
        deepspeed_engine.module_forward_pre_hook,
        deepspeed_engine.module_forward_post_hook,
    ):
        if handle is not None:
            handle.remove()


def stop_nvme_prefetch(deepspeed_engine: Any) -> None:
    """Turn off DeepSpeed's read-ahead of shards on NVMe.

    DeepSpeed 0.19.8 fails when its trace of a forward names a parameter twice within the
    read-ahead. When several forwards advance in lockstep, the trace names every parameter once per
    forward.
    """
    coordinator = deepspeed_engine.optimizer and deepspeed_engine.optimizer.get_param_coordinator()
    if coordinator is not None:
        coordinator._PartitionedParameterCoordinator__prefetch_nvme = False


def local_shard(param: Any, numel: int) -> torch.Tensor:
    """The first `numel` elements of this rank's stored shard, as a 1-D view."""
    if is_sharded(param):
        return param.ds_tensor.data.view(-1)[:numel]
    return param.data.view(-1)


# --- shards on NVMe -------------------------------------------------------------------------------


def on_nvme(param: Any) -> bool:
    """Whether the parameter's shard is stored on NVMe."""
    return is_sharded(param) and getattr(param.ds_tensor, "final_location", None) == "nvme"


def optimizer_is_partly_on_nvme(optimizer: Any) -> bool:
    """Whether DeepSpeed stores the states of some sub-groups on NVMe, and of others in memory.

    A sub-group of fewer bytes than `smallest_on_nvme` stays in memory.
    """
    if not getattr(optimizer, "swap_optimizer", False):
        return False
    sizes = optimizer.fp16_partitioned_groups_flat_numel
    is_swapped = optimizer.optimizer_swapper.is_swappable_tensor
    return not all(is_swapped(numel=numel) for numel in sizes)


def smallest_on_nvme(aio: Mapping[str, Any]) -> int:
    """The size, in bytes, below which DeepSpeed keeps a shard in host memory. aio: its section."""
    return max(MIN_AIO_BYTES, aio.get("block_size", MIN_AIO_BYTES))


def handles_of(swapper: Any) -> tuple[str, ...]:
    """The attributes of a swapper that hold its handles of async_io.

    Empty with GPUDirect Storage, whose buffers are on the device.
    """
    return () if swapper.use_gds else ("aio_read_handle", "aio_write_handle")


def can_read_ahead(param: Any) -> bool:
    """Whether the shard is on NVMe and a buffer is free for it."""
    return on_nvme(param) and bool(param.nvme_swapper.available_swap_in_buffers())


def begin_load(param: Any) -> None:
    """Start to read a shard from NVMe, unless it is loaded or being read.

    Waits for pending writes if no buffer is free.
    """
    if on_nvme(param) and param.ds_tensor.status is PartitionedParamStatus.NOT_AVAILABLE:
        if param.nvme_swapper.available_swap_in_buffers() == 0:
            param.nvme_swapper.synchronize_writes()
        param.nvme_swapper.swap_in([param], async_op=True)


def finish_load(param: Any) -> None:
    """Wait until the shard is loaded from NVMe."""
    if on_nvme(param):
        param.nvme_swapper.synchronize_reads()


def release_shard(param: Any, write: bool) -> None:
    """Release the memory of a loaded shard.

    write: store the shard first, in the background; `finish_stores` waits for it.
    """
    if not on_nvme(param):
        return
    if write:
        # Wait for the previous shard's write. This shard's write overlaps the next computation.
        param.nvme_swapper.synchronize_writes()
        param.nvme_swapper.swap_out_and_release([param], async_op=True, force_buffer_release=True)
    else:
        param.nvme_swapper.remove_partition_and_release_buffers([param])


def store_from_gathered(param: Any, offset: int, numel: int) -> None:
    """Store this rank's shard from the gathered parameter.

    A write to NVMe runs in the background; `finish_stores` waits for it. offset, numel: the shard's
    elements in the flat whole parameter.
    """
    updated = param.data.view(-1)[offset : offset + numel]
    released = on_nvme(param) and param.ds_tensor.status is not PartitionedParamStatus.AVAILABLE
    if released:  # DeepSpeed releases the shard of a parameter that stays gathered
        # With one rank on CPU, the gathered parameter may lie in the buffer that the shard is read
        # into.
        updated = updated.clone()
        begin_load(param)
        finish_load(param)
    local_shard(param, numel).copy_(updated)
    if on_nvme(param):
        param.nvme_swapper.swap_out_and_release([param], async_op=True, force_buffer_release=True)
        if not released:
            # DeepSpeed releases this shard itself, together with the gathered parameter.
            param.nvme_swapper.swap_out_params.pop()


def finish_stores(params: Sequence[Any]) -> None:
    """Wait for the pending writes of these parameters' shards to NVMe."""
    stored = [param for param in params if on_nvme(param)]
    if stored:
        stored[0].nvme_swapper.synchronize_writes()
