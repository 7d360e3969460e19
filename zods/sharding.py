"""This rank's slices of the trainable parameters: where they start, how they are reached, how terms are applied to them.

Works on ZeRO-3 shards (stage 3) and on replicated parameters (stage 0), where a rank's slice is the whole.

This is the one place that touches what DeepSpeed does not document: on a Parameter `ds_tensor` (the padded local slice),
`ds_shape`, `ds_numel`, `ds_status`, `nvme_swapper`; of ZeRO-3's coordinator `fetch_sub_module` and `__prefetch_nvme`; and
the swapper's `swap_in`, `synchronize_reads`, `swap_out_and_release`, `swap_out_params`, `synchronize_writes` and
`remove_partition_and_release_buffers`. Read in DeepSpeed 0.19.8; tests/distributed/test_sharding.py and test_deferral.py
fail where they change. No DeepSpeed class is patched, nothing is hung on a Parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from zods.directions import Direction
from zods.estimators import Update

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of one trainable parameter that this rank owns.

    ordinal: the parameter's place in `named_parameters()`, frozen ones counted; with an element's index in the whole
    flat parameter it names an element of a direction. offset: where the slice starts in the whole, in elements.
    numel: elements owned, without padding; may be 0. padded_numel: the same on all ranks.
    """

    name: str
    ordinal: int
    param: Any  # a torch.nn.Parameter; Any for the attributes that DeepSpeed hangs on it
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    numel: int
    padded_numel: int

    @property
    def whole_numel(self) -> int:
        return math.prod(self.shape)

    @property
    def decays(self) -> bool:
        return len(self.shape) >= 2


class ShardedParameters:
    """The trainable parameters of a module, as this rank's slices, in the order of `named_parameters()`."""

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        rank: int,
        model_parameters: Iterable[torch.nn.Parameter] | None = None,
    ) -> None:
        """model_parameters: those to train among the ones that require a gradient; None trains all of these.

        Raises ValueError when nothing is trainable, or a trainable parameter is neither float32 nor bfloat16.
        """
        wanted = None if model_parameters is None else {id(p) for p in model_parameters}
        named = list(module.named_parameters())
        self.slices: list[Slice] = [
            self._slice(name, ordinal, param, rank)
            for ordinal, (name, param) in enumerate(named)
            if param.requires_grad and (wanted is None or id(param) in wanted)
        ]
        trained = {id(piece.param) for piece in self.slices}
        self.frozen: list[Slice] = [  # all other parameters
            self._slice(name, ordinal, param, rank)
            for ordinal, (name, param) in enumerate(named)
            if id(param) not in trained
        ]
        if not self.slices:
            raise ValueError("model: no trainable parameter. Set requires_grad on those that are to be trained.")
        odd = [f"{s.name} ({s.dtype})" for s in self.slices if s.dtype not in DTYPES]
        if odd:
            raise ValueError(f"model: trainable parameters must be float32 or bfloat16; found {', '.join(odd[:3])}.")
        self.numel = sum(s.whole_numel for s in self.slices)

    @staticmethod
    def _slice(name: str, ordinal: int, param: torch.nn.Parameter, rank: int) -> Slice:
        if not is_sharded(param):
            n = param.numel()
            return Slice(name, ordinal, param, tuple(param.shape), param.dtype, 0, n, n)
        zero: Any = param
        padded = zero.ds_tensor.ds_numel
        offset = rank * padded
        numel = min(max(zero.ds_numel - offset, 0), padded)
        return Slice(name, ordinal, param, tuple(zero.ds_shape), param.dtype, offset, numel, padded)

    def __iter__(self) -> Iterator[Slice]:
        return iter(self.slices)

    def __len__(self) -> int:
        return len(self.slices)

    def visit(self, *, write: bool, pieces: Sequence[Slice] | None = None) -> Iterator[tuple[Slice, torch.Tensor]]:
        """(slice, its elements as a 1-D tensor of `numel`), one after the other, where they are stored.

        Slices on NVMe are read one ahead and, with `write`, written back behind; otherwise changes to them are lost.
        The gathered copies of the parameters must have been released before (`release_gathered`).
        pieces: those to visit; None: all.
        """
        pieces = self.slices if pieces is None else pieces
        for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
            _begin_load(piece)
            _finish_load(piece)
            if following is not None and _on_nvme(following) and _swapper(following).available_swap_in_buffers():
                _begin_load(following)
            yield piece, _local(piece)
            _store(piece, write)
        finish_stores(pieces)

    @torch.no_grad()
    def apply_(
        self,
        update: Update,
        *,
        direction: Direction,
        dense: Callable[[Slice], Iterable[tuple[int, torch.Tensor]]] | None = None,
        pieces: Sequence[Slice] | None = None,
    ) -> None:
        """Apply an update to this rank's slices, in one sweep over each.

        dense: the anchor gradient, a slice's (start, elements) in blocks that together cover it; None where the update
        has no part of it. pieces: as in `visit`.
        """
        for piece, local in self.visit(write=True, pieces=pieces):
            if piece.numel == 0:
                continue
            sweeps = [update.sweep(piece.decays)]
            for start, addend in ((0, None),) if dense is None else dense(piece):
                part = local if addend is None else local[start : start + addend.numel()]
                moved = None if addend is None else addend.to(local.device)
                direction.replay_(part, piece, piece.offset + start, sweeps, moved)


def is_sharded(param: torch.nn.Parameter) -> bool:
    return hasattr(param, "ds_tensor")


@contextmanager
def gathered(params: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """The whole of `params` in their `.data`, for reading."""
    with deepspeed.zero.GatheredParameters(list(params), enabled=bool(params) and is_sharded(params[0])):
        yield


def release_gathered(deepspeed_engine: Any) -> None:
    """Drop every gathered copy that DeepSpeed still holds, so that the next forward gathers what is stored.

    Gathers still under way, which a forward that was cut short leaves behind, are waited for.
    """
    # an engine without an optimizer of its own has the part of ZeRO-3 that looks after parameters in its place
    offload = getattr(deepspeed_engine.optimizer, "parameter_offload", deepspeed_engine.optimizer)
    if not hasattr(offload, "get_param_coordinator"):
        return
    for module in deepspeed_engine.module.modules():
        if any(is_sharded(p) and p.ds_status is ZeroParamStatus.INFLIGHT for p in module.parameters(recurse=False)):
            offload.get_param_coordinator().fetch_sub_module(module, forward=True)
    offload.partition_all_parameters()


def stop_nvme_prefetch(deepspeed_engine: Any) -> None:
    """Have slices read from NVMe when they are needed, not ahead.

    DeepSpeed 0.19.8 fails on a parameter that its trace of a forward names twice within what it reads ahead, and where
    forwards advance in lockstep the trace names every parameter once per forward.
    """
    coordinator = deepspeed_engine.optimizer and deepspeed_engine.optimizer.get_param_coordinator()
    if coordinator is not None:
        coordinator._PartitionedParameterCoordinator__prefetch_nvme = False


def _on_nvme(piece: Slice) -> bool:
    return is_sharded(piece.param) and getattr(piece.param.ds_tensor, "final_location", None) == "nvme"


def _swapper(piece: Slice) -> Any:
    return piece.param.nvme_swapper


def _begin_load(piece: Slice) -> None:
    """Start to read a slice from NVMe, unless that is under way; waits for writes where their buffer is needed."""
    if _on_nvme(piece) and piece.param.ds_tensor.status is PartitionedParamStatus.NOT_AVAILABLE:
        if _swapper(piece).available_swap_in_buffers() == 0:
            _swapper(piece).synchronize_writes()
        _swapper(piece).swap_in([piece.param], async_op=True)


def _finish_load(piece: Slice) -> None:
    if _on_nvme(piece):
        _swapper(piece).synchronize_reads()


def _store(piece: Slice, write: bool) -> None:
    if not _on_nvme(piece):
        return
    swapper = _swapper(piece)
    if write:
        swapper.synchronize_writes()  # the one before; this one runs while the next slice is computed
        swapper.swap_out_and_release([piece.param], async_op=True, force_buffer_release=True)
    else:
        swapper.remove_partition_and_release_buffers([piece.param])


def store_from_gathered(piece: Slice) -> None:
    """Store this rank's slice of a parameter that is gathered; on NVMe this goes on until `finish_stores`."""
    updated = piece.param.data.view(-1)[piece.offset : piece.offset + piece.numel]
    released = _on_nvme(piece) and piece.param.ds_tensor.status is not PartitionedParamStatus.AVAILABLE
    if released:  # DeepSpeed has let go of the slice already, as of a parameter that stays gathered
        updated = updated.clone()  # on one CPU rank it may lie in the memory that the slice is read into
        _begin_load(piece)
        _finish_load(piece)
    _local(piece).copy_(updated)
    if _on_nvme(piece):
        _swapper(piece).swap_out_and_release([piece.param], async_op=True, force_buffer_release=True)
        if not released:
            _swapper(piece).swap_out_params.pop()  # DeepSpeed releases the slice's memory with the gathered parameter


def finish_stores(pieces: Sequence[Slice]) -> None:
    on_nvme = [piece for piece in pieces if _on_nvme(piece)]
    if on_nvme:
        _swapper(on_nvme[0]).synchronize_writes()


def _local(piece: Slice) -> torch.Tensor:
    if is_sharded(piece.param):
        return piece.param.ds_tensor.data.view(-1)[: piece.numel]
    return piece.param.data.view(-1)
