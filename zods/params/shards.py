"""This rank's shards of the trainable parameters: their ranges, access to them, and updates of
them.

Works on ZeRO-3 shards (stage 3) and on replicated parameters (stage 0), where a rank's shard is the
whole parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zods.core.directions import Direction
from zods.core.estimators import Update
from zods.params import zero3_adapter as zero3

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Shard:
    """The part of one trainable parameter that this rank owns.

    ordinal: the parameter's position in `named_parameters()`, frozen ones counted. An element of a
    direction is named by it and by the element's index in the flat whole parameter. offset: index
    of the shard's first element in the whole. numel: elements owned, without padding; may be 0.
    padded_numel: the same on all ranks.
    """

    name: str
    ordinal: int
    param: Any  # a torch.nn.Parameter; Any for the attributes that DeepSpeed sets on it
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
    """The trainable parameters of a module as this rank's shards, in the order of
    `named_parameters()`.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        rank: int,
        model_parameters: Iterable[torch.nn.Parameter] | None = None,
    ) -> None:
        """model_parameters: those to train among the ones that require a gradient; None trains all
        of these.

        Raises ValueError when nothing is trainable, or a trainable parameter is neither float32 nor
        bfloat16.
        """
        wanted = None if model_parameters is None else {id(p) for p in model_parameters}
        shards = [
            Shard(name, ordinal, param, shape, param.dtype, offset, numel, padded_numel)
            for ordinal, (name, param) in enumerate(module.named_parameters())
            for shape, offset, numel, padded_numel in (zero3.partition_of(param, rank),)
        ]
        self.shards = [
            s for s in shards if s.param.requires_grad and (wanted is None or id(s.param) in wanted)
        ]
        trained = {s.ordinal for s in self.shards}
        self.frozen = [s for s in shards if s.ordinal not in trained]  # all other parameters
        if not self.shards:
            raise ValueError(
                "model: no trainable parameter. Set requires_grad on those that are to be trained."
            )
        odd = [f"{s.name} ({s.dtype})" for s in self.shards if s.dtype not in DTYPES]
        if odd:
            raise ValueError(
                f"model: trainable parameters must be float32 or bfloat16; found "
                f"{', '.join(odd[:3])}."
            )
        self.numel = sum(s.whole_numel for s in self.shards)

    def __iter__(self) -> Iterator[Shard]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)

    def visit(
        self, *, write: bool, shards: Sequence[Shard] | None = None
    ) -> Iterator[tuple[Shard, torch.Tensor]]:
        """(shard, its elements as a 1-D tensor of `numel`), one after the other, where they are
        stored.

        Shards on NVMe are read one ahead and, with `write`, written back behind. Without it changes
        to them are lost. The gathered copies of the parameters must have been released before
        (`release_gathered`). shards: those to visit; None: all.
        """
        shards = self.shards if shards is None else shards
        for shard, following in zip(shards, [*shards[1:], None], strict=True):
            zero3.begin_load(shard.param)
            zero3.finish_load(shard.param)
            if following is not None and zero3.can_read_ahead(following.param):
                zero3.begin_load(following.param)
            yield shard, zero3.local_shard(shard.param, shard.numel)
            zero3.release_shard(shard.param, write)
        zero3.finish_stores([shard.param for shard in shards])

    @torch.no_grad()
    def apply_(
        self,
        update: Update,
        *,
        direction: Direction,
        dense: Callable[[Shard], Iterable[tuple[int, torch.Tensor]]] | None = None,
        shards: Sequence[Shard] | None = None,
    ) -> None:
        """Apply an update to this rank's shards, in one sweep over each.

        dense: the anchor gradient, a shard's (start, elements) in blocks that together cover it;
        None where the update has no part of it. shards: as in `visit`.
        """
        for shard, local in self.visit(write=True, shards=shards):
            if shard.numel == 0:
                continue
            sweeps = [update.sweep(shard.decays)]
            for start, addend in ((0, None),) if dense is None else dense(shard):
                part = local if addend is None else local[start : start + addend.numel()]
                moved = None if addend is None else addend.to(local.device)
                direction.replay_(part, shard, shard.offset + start, sweeps, moved)
