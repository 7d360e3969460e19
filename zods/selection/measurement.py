"""Measure examples on all ranks: their features and losses.

Every rank can read every example by its index in the dataset. Ranks exchange features and losses,
never examples. In one world of ranks the micro-batches depend on train_micro_batch_size_per_gpu,
and not on the number of ranks. Replicas may have micro-batches of different sizes. There each
example is measured by one rank, and its numbers go to all replicas as they are.

Caller: `zods.selection.sub_batches`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from zods.comm.communicator import Communicator
from zods.config.selector_section import SelectorConfig
from zods.data.batch import to_device
from zods.selection.facility_location import quantised
from zods.selection.features import FeatureExtractor

SMALLEST = torch.finfo(torch.float32).tiny
SUMMED_VALUES = 2**18  # of rows that replicas exchange at a time: 2 MiB


class Sharing(Protocol):
    """The replicas that share the candidates of a selection."""

    @property
    def split(self) -> tuple[int, int]:
        """(index of this rank, number of ranks) among the ranks of all replicas."""

    def sum(self, values: Sequence[float], what: str) -> list[float] | None:
        """Sum values over the ranks of all replicas; None where this replica was left out.

        what: a name of the sum, the same in all replicas.
        """


class Measured(NamedTuple):
    """Measurements of n examples: features (n, m) int16 `quantised` by `largest`, losses (n,)
    float32 on the CPU, and the positions of the examples for which this rank evaluates gains.

    An example whose loss or features are not finite has the loss NaN and features 0.
    """

    features: Tensor
    losses: Tensor
    largest: float
    owned: Tensor


class Measurement:
    """Measures examples of a dataset; all ranks call it together.

    matrix: the matrix whose gradients the features project. compares_gradients: whether features
    are of gradients. sharing: the replicas that take part; None without replicas.
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
        self.sharing: Sharing | None = None
        self._comm, self._collate, self._micro_batch = comm, collate, micro_batch

    def __call__(
        self,
        dataset: Any,
        ids: Sequence[int],
        seeds: Sequence[int],
        *,
        what: str,
        by_row: bool = False,
    ) -> Measured:
        """Measure the examples `ids` of a dataset; the ranks take micro-batches in turn.

        seeds: of the directions of the features; none: only losses are measured. what: a name of
        this measurement for the replicas. by_row: divide the features of each example by their
        largest magnitude, so that one example with a large gradient leaves the others all their
        digits.
        """
        rank, world = self._comm.rank, self._comm.world_size
        chunks = self._chunks(range(len(ids)))
        owned = [_positions(chunks[of::world]) for of in range(world)]
        if self.sharing is None:
            own, longest = chunks[rank::world], chunks[::world]
        else:
            index, total = self.sharing.split
            own, longest = (self._chunks(range(of, len(ids), total)) for of in (index, 0))
        features, losses = self._own(dataset, ids, own, longest, seeds)
        if by_row:
            features = features / features.abs().amax(1, keepdim=True).clamp(min=SMALLEST)
        if self.sharing is not None:
            features, losses = exchanged_with_replicas(
                self.sharing, features, losses, _positions(own), len(ids), what
            )
            largest = float(features.abs().max()) if features.numel() else 0.0
            return Measured(quantised(features, largest), losses, largest, owned[rank])
        largest, rows = self._exchanged(features, losses)
        in_order = torch.empty_like(rows)
        in_order[torch.cat(owned).to(rows.device)] = rows
        losses = in_order[:, -2:].contiguous().view(torch.float32).squeeze(1).cpu()
        return Measured(in_order[:, :-2], losses, largest, owned[rank])

    def _chunks(self, positions: range) -> list[range]:
        """Cut positions into micro-batches."""
        size = self._micro_batch
        return [positions[start : start + size] for start in range(0, len(positions), size)]

    def _own(
        self,
        dataset: Any,
        ids: Sequence[int],
        chunks: Sequence[range],
        longest: Sequence[range],
        seeds: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Measure this rank's chunks of positions in `ids`. Returns (features, losses).

        longest: the chunks of the rank that has the largest number of them.
        """
        found = []
        # All ranks make the same number of forwards, as ZeRO-3 needs.
        for own, other in zip_longest(chunks, longest):
            batch = self._collate([dataset[int(ids[k])] for k in own or other])
            inputs = to_device(batch, self._comm.device)
            if seeds:
                result = self._extract(inputs, seeds)
            else:
                losses = self._extract.losses(inputs)
                result = losses.new_empty(len(losses), 0), losses
            found.append(result if own else (result[0][:0], result[1][:0]))
        features, losses = (torch.cat(parts) for parts in zip(*found, strict=True))
        finite = losses.isfinite() & features.isfinite().all(1)
        return features.where(finite[:, None], 0.0), losses.where(finite, torch.nan)

    def _exchanged(self, features: Tensor, losses: Tensor) -> tuple[float, Tensor]:
        """Gather the features and losses of all ranks.

        Returns the largest magnitude of a feature, and the rows of all ranks in rank order: the
        features as int16, then the float32 bits of the loss as two int16.
        """
        own_largest = float(features.abs().max()) if features.numel() else 0.0
        largest = self._comm.max_over_ranks(own_largest)
        sent = torch.cat(
            [quantised(features, largest), losses.float().view(-1, 1).view(torch.int16)], 1
        )
        return largest, torch.cat(self._comm.gather_rows(sent))


def exchanged_with_replicas(
    sharing: Sharing, features: Tensor, losses: Tensor, own: Tensor, number: int, what: str
) -> tuple[Tensor, Tensor]:
    """Give this rank's features (n, m) and losses (n,), of the positions `own`, to all replicas.

    Returns those of all `number` examples, both float32. The loss of an example is NaN where its
    rank was left out meanwhile. A replica that was left out itself gets ones, because its step is
    dropped.
    """
    rows = torch.zeros(number, features.shape[1] + 2, dtype=torch.float64)
    rows[own, :-2] = features.double().cpu()
    rows[own, -2] = losses.double().cpu()
    rows[own, -1] = 1.0
    for k, part in enumerate(rows.split(max(1, SUMMED_VALUES // rows.shape[1]))):
        # of each row all ranks but one send zeros, so that the sum has its bits
        total = sharing.sum(part.flatten().tolist(), f"{what}, {k}")
        part.copy_(torch.ones_like(part) if total is None else torch.tensor(total).view_as(part))
    losses = rows[:, -2].where(rows[:, -1] == 1.0, torch.nan)
    return rows[:, :-2].float().to(features.device), losses.float()


def _positions(chunks: Sequence[range]) -> Tensor:
    """All positions of some chunks, 1-D int64."""
    return torch.tensor([k for chunk in chunks for k in chunk], dtype=torch.int64)
