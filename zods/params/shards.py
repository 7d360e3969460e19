"""This rank's shards of the trainable parameters: ranges, access and updates.

Works with ZeRO-3 shards (stage 3) and with replicated parameters (stage 0). With stage 0 a rank's
shard is the whole parameter.
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

    ordinal: the parameter's position in `named_parameters()`, frozen parameters counted. The
    ordinal and an element's index in the flat whole parameter identify an element of a direction.
    offset: index of the shard's first element in the flat whole parameter. numel: elements owned,
    without padding; may be 0. padded_numel: elements with padding, the same on all ranks.
    """

    name: str
    ordinal: int
    param: Any  # a torch.nn.Parameter; Any for the attributes that DeepSpeed sets on it
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    numel: int
    padded_numel: int

    @property
    def whole_numel(self) -> int:
        return math.prod(self.shape)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to parameters of two or more dimensions only."""
        return len(self.shape) >= 2


class ShardedParameters:
    """This rank's shards of the trainable parameters, in the order of `named_parameters()`."""

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        rank: int,
        model_parameters: Iterable[torch.nn.Parameter] | None = None,
    ) -> None:
        """Collect the shards of the parameters that require a gradient.

        model_parameters: train only these; None: train all that require a gradient.

        Raises ValueError when no parameter is trainable, or when a trainable parameter is neither
        float32 nor bfloat16.
        """
        wanted = None if model_parameters is None else {id(p) for p in model_parameters}
        shards = [
            Shard(name, ordinal, param, param.dtype, *zero3.partition_of(param, rank))
            for ordinal, (name, param) in enumerate(module.named_parameters())
        ]
        self.shards = [
            s for s in shards if s.param.requires_grad and (wanted is None or id(s.param) in wanted)
        ]
        trained = {s.ordinal for s in self.shards}
        self.frozen = [s for s in shards if s.ordinal not in trained]  # all other parameters
        if not self.shards:
            raise ValueError(
                "model: no trainable parameter. Set requires_grad on the parameters to train."
            )
        odd = [f"{s.name} ({s.dtype})" for s in self.shards if s.dtype not in DTYPES]
        if odd:
            raise ValueError(
                "model: trainable parameters must be float32 or bfloat16; found "
                f"{', '.join(odd[:3])}. Convert them, or set requires_grad to False."
            )
        self.numel = sum(s.whole_numel for s in self.shards)

    def __iter__(self) -> Iterator[Shard]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)

    def iterate_with_read_ahead(
        self, *, write: bool, shards: Sequence[Shard] | None = None
    ) -> Iterator[tuple[Shard, torch.Tensor]]:
        """Yield each shard with its elements: a 1-D tensor of `numel`, not a copy.

        A shard on NVMe is loaded before it is yielded, and the next shard is read in the background
        meanwhile. Gathered copies of the parameters must have been released before
        (`release_gathered`).
        write: write shards on NVMe back, in the background; without it changes to them are lost.
        shards: the shards to yield; None: all.
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
        """Apply an update to this rank's shards in place, in one pass over each shard.

        dense: maps a shard to its part of the stored anchor gradient: blocks (start, elements) that
        together cover the shard. None where the update does not use a stored anchor gradient.
        shards: as in `iterate_with_read_ahead`.
        """
        for shard, local in self.iterate_with_read_ahead(write=True, shards=shards):
            if shard.numel == 0:
                continue
            sweeps = [update.sweep(shard.decays)]
            for start, addend in ((0, None),) if dense is None else dense(shard):
                part = local if addend is None else local[start : start + addend.numel()]
                moved = None if addend is None else addend.to(local.device)
                direction.replay_(part, shard, shard.offset + start, sweeps, moved)
