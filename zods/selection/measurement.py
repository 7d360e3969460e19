"""Measure examples on all ranks: their features and losses.

Every rank can read every example by its index in the dataset. Ranks exchange features and losses,
never examples. The micro-batches depend on train_micro_batch_size_per_gpu, and not on the number of
ranks.

Caller: `zods.selection.sub_batches`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zods.comm.communicator import Communicator
from zods.config.schema import SelectorConfig
from zods.data.batch import to_device
from zods.selection.facility_location import quantised
from zods.selection.features import FeatureExtractor

SMALLEST = torch.finfo(torch.float32).tiny


class Measured(NamedTuple):
    """Measurements of n examples: features (n, m) int16 `quantised` by `largest`, losses (n,)
    float32 on the CPU, and the positions of the examples that this rank measured.

    An example whose loss or features are not finite has the loss NaN and features 0.
    """

    features: Tensor
    losses: Tensor
    largest: float
    owned: Tensor


class Measurement:
    """Measures examples of a dataset; all ranks call it together.

    matrix: the matrix whose gradients the features project. compares_gradients: whether features
    are of gradients.
    """

    def __init__(
        self,
        config: SelectorConfig,
        deepspeed_engine: Any,
        comm: Communicator,
        collate: Callable[[Sequence[Any]], dict[str, Any]],
        micro_batch: int,
    ) -> None:
        """collate: makes a batch of rows. micro_batch: examples of a forward."""
        self._extract = FeatureExtractor(
            deepspeed_engine.module,
            deepspeed_engine,
            kind=config.features,
            rank=config.rank,
            pattern=config.pattern,
            eps=config.eps,
            two_sided=config.two_sided,
            agree=lambda value: max(of_rank[0] for of_rank in comm.gather_integers([value])),
        )
        self.matrix = self._extract.target
        self.compares_gradients = config.features != "hidden_states"
        self._comm, self._collate, self._micro_batch = comm, collate, micro_batch

    def __call__(
        self, dataset: Any, ids: Sequence[int], seeds: Sequence[int], *, by_row: bool = False
    ) -> Measured:
        """Measure the examples `ids` of a dataset; the ranks take micro-batches in turn.

        seeds: of the directions of the features; none: only losses are measured. by_row: divide
        the features of each example by their largest magnitude, so that one example with a large
        gradient leaves the others all their digits.
        """
        world = self._comm.world_size
        chunks = [
            range(start, min(start + self._micro_batch, len(ids)))
            for start in range(0, len(ids), self._micro_batch)
        ]
        features, losses = self._own(dataset, [[ids[k] for k in chunk] for chunk in chunks], seeds)
        if by_row:
            features = features / features.abs().amax(1, keepdim=True).clamp(min=SMALLEST)
        largest, rows = self._exchanged(features, losses)
        by_rank = [
            torch.tensor([k for chunk in chunks[rank::world] for k in chunk], dtype=torch.int64)
            for rank in range(world)
        ]
        in_order = torch.empty_like(rows)
        in_order[torch.cat(by_rank).to(rows.device)] = rows
        return Measured(
            in_order[:, :-2],
            in_order[:, -2:].contiguous().view(torch.float32).squeeze(1).cpu(),
            largest,
            by_rank[self._comm.rank],
        )

    def _own(
        self, dataset: Any, chunks: list[list[int]], seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Measure this rank's chunks, which are every `world_size`-th. Returns (features, losses)."""
        rank, world = self._comm.rank, self._comm.world_size
        found = []
        # All ranks make the same number of forwards, as ZeRO-3 needs.
        for first in range(0, len(chunks), world):
            own = first + rank
            ids = chunks[own if own < len(chunks) else 0]
            batch = self._collate([dataset[int(i)] for i in ids])
            inputs = to_device(batch, self._comm.device)
            if seeds:
                result = self._extract(inputs, seeds)
            else:
                losses = self._extract.losses(inputs)
                result = losses.new_empty(len(losses), 0), losses
            is_own = own < len(chunks)
            found.append(result if is_own else (result[0][:0], result[1][:0]))
        features, losses = (torch.cat(parts) for parts in zip(*found, strict=True))
        finite = losses.isfinite() & features.isfinite().all(1)
        return features.where(finite[:, None], 0.0), losses.where(finite, torch.nan)

    def _exchanged(self, features: Tensor, losses: Tensor) -> tuple[float, Tensor]:
        """Gather the features and losses of all ranks.

        Returns the largest magnitude of a feature, and the rows of all ranks in rank order: the
        features as int16, then the float32 bits of the loss as two int16.
        """
        own_largest = float(features.abs().max()) if features.numel() else 0.0
        largest = max(row[0] for row in self._comm.gather_scalars([own_largest]))
        sent = torch.cat(
            [quantised(features, largest), losses.float().view(-1, 1).view(torch.int16)], 1
        )
        return largest, torch.cat(self._comm.gather_rows(sent))
