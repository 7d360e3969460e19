"""Updates of offloaded parameters that wait until each parameter is next loaded, which saves one
load of each per step.

A forward has the gathered parameter at hand, and this rank's shard in host memory. The update is
applied to the gathered one on all ranks (to the same bits: it depends on an element's index alone),
and the shard is written back from it, to NVMe while the module runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.utils.z3_leaf_module import z3_leaf_parameter

from zods.core.directions import Direction
from zods.core.estimators import Update
from zods.params.shards import Shard, ShardedParameters
from zods.params.zero3_adapter import finish_stores, store_from_gathered


class DeferredUpdate:
    """The last update, where it still has to be applied."""

    def __init__(self, parameters: ShardedParameters, direction: Direction) -> None:
        self._parameters = parameters
        self._direction = direction
        self._update: Update | None = None
        self._waiting: dict[int, Shard] = {}  # by ordinal
        self._storing: list[Shard] = []

    def defer(self, update: Update) -> None:
        """Take over an update that has no part of a stored anchor gradient, after what the one
        before still has to do.

        No gathered copies may be held.

        Parameters of DeepSpeed's leaf modules are updated at once: which of them a forward uses may
        differ by rank.
        """
        self.flush()
        self._update = update
        at_once = [shard for shard in self._parameters if z3_leaf_parameter(shard.param)]
        self._waiting = {shard.ordinal: shard for shard in self._parameters if shard not in at_once}
        if at_once:
            self._parameters.apply_(update, direction=self._direction, shards=at_once)

    def flush(self) -> None:
        """Apply what waits to the stored shards. No gathered copies may be held."""
        waiting, self._waiting = list(self._waiting.values()), {}
        if waiting:
            assert self._update is not None
            self._parameters.apply_(self._update, direction=self._direction, shards=waiting)

    def loaded(self, ordinals: Sequence[int]) -> None:
        """Apply the update to these parameters, which are gathered, and to their stored shards."""
        for ordinal in ordinals:
            shard = self._waiting.get(ordinal)
            if shard is None:
                continue
            assert self._update is not None
            gathered = shard.param.data.view(-1)
            self._direction.replay_(gathered, shard, 0, [self._update.sweep(shard.decays)])
            store_from_gathered(shard.param, shard.offset, shard.numel)
            self._storing.append(shard)
            del self._waiting[ordinal]

    def before_release(self) -> None:
        """Wait until what was written is stored: DeepSpeed may use its memory for another
        parameter.
        """
        if self._storing:
            finish_stores([shard.param for shard in self._storing])
            self._storing = []
