"""Deferred updates for offloaded parameters.

An update is applied to a parameter when a forward next loads the parameter. This saves one load of
every parameter per step. At that time the forward holds the gathered parameter, and this rank's
shard is in host memory. All ranks apply the update to the gathered parameter. They compute the same
bits, because the update of an element depends on its index alone. The shard is then written back
from the gathered parameter, to NVMe while the module runs. Called by the engine and by the modules
of `zods.forward`.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.utils.z3_leaf_module import z3_leaf_parameter

from zods.core.directions import Direction
from zods.core.estimators import Update
from zods.params.shards import Shard, ShardedParameters
from zods.params.zero3_adapter import finish_stores, store_from_gathered


class DeferredUpdate:
    """The last update and the parameters that it is not applied to yet."""

    def __init__(self, parameters: ShardedParameters, direction: Direction) -> None:
        self._parameters = parameters
        self._direction = direction
        self._update: Update | None = None
        self._waiting: dict[int, Shard] = {}  # key: ordinal
        self._storing: list[Shard] = []

    def defer(self, update: Update) -> None:
        """Keep an update for later, after the previous update is applied everywhere (`flush`).

        The update must not use a stored anchor gradient. Gathered copies of the parameters must
        have been released before.

        Parameters of DeepSpeed's leaf modules are updated at once, because the ranks may use
        different parameters of such a module in a forward.
        """
        self.flush()
        self._update = update
        at_once = [shard for shard in self._parameters if z3_leaf_parameter(shard.param)]
        self._waiting = {shard.ordinal: shard for shard in self._parameters if shard not in at_once}
        if at_once:
            self._parameters.apply_(update, direction=self._direction, shards=at_once)

    def flush(self) -> None:
        """Apply the update to all shards that wait for it.

        Gathered copies of the parameters must have been released before.
        """
        waiting, self._waiting = list(self._waiting.values()), {}
        if waiting:
            assert self._update is not None
            self._parameters.apply_(self._update, direction=self._direction, shards=waiting)

    def loaded(self, ordinals: Sequence[int]) -> None:
        """Apply the update to parameters that were just gathered, and to their stored shards.

        ordinals: ordinals of the gathered parameters. Parameters that do not wait for the update
        are not changed.
        """
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
        """Wait until the updated shards are stored.

        DeepSpeed may use their memory for another parameter after the release.
        """
        if self._storing:
            finish_stores([shard.param for shard in self._storing])
            self._storing = []
