"""The anchor of MeZO-SVRG: a point and a gradient.

The point is the parameters at the last refresh. The gradient is the full-batch estimate at the
point. Each is sharded as the parameters are. It is stored on the device, in host memory or in NVMe
files, or it is not stored ("terms"). A gradient that is not stored is recomputed from its K terms.
A point that is not stored is recomputed from the parameters: the updates since the refresh are
subtracted. Called by `zods.training`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from zods.comm.communicator import Communicator
from zods.config.anchor_section import AnchorConfig
from zods.core.directions import Direction
from zods.core.estimators import Term, Update
from zods.core.points import Center
from zods.params.anchor_stores import (
    MemoryStore,
    NvmeStore,
    ShardStore,
    nvme_folder,
    remove_leftovers,
)
from zods.params.shards import Shard, ShardedParameters
from zods.params.zero3_adapter import is_sharded

logger = logging.getLogger(__name__)


class _Drift:
    """The sum of the updates since the refresh, for parameters that all decay or all do not.

    theta = scale * anchor + sum_k coefficients[seed_k] * z(seed_k)
    """

    def __init__(self) -> None:
        self.scale = 1.0
        self.coefficients: dict[int, float] = {}

    def record(self, decay: float, terms: Sequence[Term]) -> None:
        self.scale *= decay
        self.coefficients = {seed: decay * c for seed, c in self.coefficients.items()}
        for seed, c in terms:
            self.coefficients[seed] = self.coefficients.get(seed, 0.0) + c

    def center(self, live: torch.Tensor) -> Center:
        inverse = tuple(-c / self.scale for c in self.coefficients.values())
        return Center(live, 1.0 / self.scale, tuple(self.coefficients), inverse)


class Anchor:
    """Point and gradient of the anchor, stored as `config` says.

    A point kept as terms is exact up to the rounding of the updates since the refresh.
    """

    def __init__(
        self,
        config: AnchorConfig,
        parameters: ShardedParameters,
        comm: Communicator,
        *,
        direction: Direction,
        aio: Mapping[str, Any],
    ) -> None:
        self._config = config
        self._parameters = parameters
        self._comm = comm
        self._direction = direction
        self.gradient_terms: tuple[Term, ...] = ()
        self._drifts = {True: _Drift(), False: _Drift()}  # key: the parameter decays
        self.point: ShardStore | None = None
        self.gradient: ShardStore | None = None
        with comm.same_on_all_ranks():
            # A damaged point cannot be rebuilt: the parameters have changed since, with rounding.
            self.point = self._make_store("point", aio, None)
            self.gradient = self._make_store("gradient", aio, self._gradient_block)
            if config.nvme_path is not None:
                remove_leftovers(nvme_folder(config.nvme_path) / "zods_anchor", comm.world_size)

    def _make_store(
        self,
        role: str,
        aio: Mapping[str, Any],
        remake: Callable[[Shard, int, int], torch.Tensor] | None,
    ) -> ShardStore | None:
        storage = getattr(self._config, role)
        if storage == "terms":
            return None
        if storage == "nvme":
            assert self._config.nvme_path is not None
            path = (
                nvme_folder(self._config.nvme_path)
                / "zods_anchor"
                / f"rank{self._comm.rank}"
                / f"{role}.bin"
            )
            return NvmeStore(
                path,
                self._parameters,
                aio=aio,
                buffer_count=self._config.buffer_count,
                buffer_size=self._config.buffer_size,
                remake=remake,
            )
        pin = self._config.pin_memory and self._comm.device.type != "cpu"
        return MemoryStore(
            self._parameters, self._comm.device, pin_memory=None if storage == "device" else pin
        )

    @property
    def device_bytes(self) -> int:
        """Bytes of the anchor in device memory, on this rank."""
        return sum(s.device_bytes for s in (self.point, self.gradient) if s is not None)

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of the anchor in host memory or on NVMe, on this rank."""
        return sum(s.offloaded_bytes for s in (self.point, self.gradient) if s is not None)

    def set_point(self) -> None:
        """Set the anchor point to the current parameters."""
        self._drifts = {True: _Drift(), False: _Drift()}
        if self.point is not None:
            for shard, local in self._parameters.iterate_with_read_ahead(write=False):
                self.point.write(shard, local)

    def set_gradient(self, terms: Sequence[Term]) -> None:
        """Set the anchor gradient to sum_k c_k z_k."""
        self.gradient_terms = tuple(terms)
        if self.gradient is None:
            return
        for shard in self._parameters:
            for start, stop in self.gradient.blocks(shard):
                self.gradient.write(shard, self._gradient_block(shard, start, stop), start)

    def _gradient_block(self, shard: Shard, start: int, stop: int) -> torch.Tensor:
        """Compute elements [start, stop) of this rank's shard of the gradient from its terms."""
        return self._direction.combine_(
            torch.empty(stop - start, dtype=shard.dtype, device=self._comm.device),
            shard,
            shard.offset + start,
            seeds=[t.seed for t in self.gradient_terms],
            coefficients=[t.coefficient for t in self.gradient_terms],
        )

    def begin(self, gradient: Sequence[Term]) -> None:
        """Set the gradient and start a new record of updates.

        The anchor point must be set already. The parameters must equal it when `record` is next
        called.
        """
        self._drifts = {True: _Drift(), False: _Drift()}
        self.set_gradient(gradient)

    def record(self, update: Update) -> None:
        """Record an update of the parameters, so that `reconstruct` can subtract it from them."""
        gradient = [
            Term(seed, update.anchor_grad_coefficient * c) for seed, c in self.gradient_terms
        ]
        terms = [*update.terms, *(t for t in gradient if t.coefficient != 0.0)]
        for decays, drift in self._drifts.items():
            drift.record(update.decay if decays else 1.0, terms)

    def center(self, shard: Shard, live: torch.Tensor) -> Center:
        """The anchor point of one whole parameter, for `zods.forward.perturbed_modules`.

        Collective where the point is stored: all ranks call it in the same order.
        """
        if self.point is None:
            return self._drifts[shard.decays].center(live)
        stored = self.stored_point(shard, live.device)
        if is_sharded(shard.param):
            stored = self._comm.gather_shards(stored)[: shard.whole_numel]
        return Center(stored.view(live.shape))

    def stored_point(self, shard: Shard, device: torch.device) -> torch.Tensor:
        """Copy this rank's shard of the stored point, padded with zeros to `padded_numel`."""
        assert self.point is not None
        padded = torch.empty(shard.padded_numel, dtype=shard.dtype, device=device)
        for start, values in self.point.read(shard):
            padded[start : start + values.numel()] = values
        padded[shard.numel :] = 0
        return padded

    def reconstruct(self, shard: Shard, local: torch.Tensor) -> torch.Tensor:
        """Compute this rank's shard of the point by subtracting the updates since the refresh.

        local: this rank's shard of the parameters.
        """
        center = self._drifts[shard.decays].center(local)
        return self._direction.combine_(
            torch.empty_like(local),
            shard,
            shard.offset,
            weight=local,
            scale=center.scale,
            seeds=center.seeds,
            coefficients=center.coefficients,
        )

    def state_dict(self) -> dict[str, Any]:
        """The state that is not a tensor per shard, as JSON values."""
        return {
            "gradient_terms": [list(t) for t in self.gradient_terms],
            "drift": {
                str(int(decays)): {
                    "scale": d.scale,
                    "terms": [[s, c] for s, c in d.coefficients.items()],
                }
                for decays, d in self._drifts.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the values of `state_dict`. Stored tensors are not restored here."""
        self.gradient_terms = tuple(
            Term(int(seed), float(c)) for seed, c in state["gradient_terms"]
        )
        for decays, drift in self._drifts.items():
            saved = state["drift"][str(int(decays))]
            drift.scale = float(saved["scale"])
            drift.coefficients = {int(seed): float(c) for seed, c in saved["terms"]}
