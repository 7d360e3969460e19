"""Loaders of micro-batches: the assignment of a step's examples to ranks and micro-batches.

`zods.data.order` has the order of the examples. A step's global batch is the same set of examples
for any number of ranks. A loader's position is two numbers, so that a run can resume at any step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from zods.core.example_groups import positions_of
from zods.data.digest import ExampleDigests, digest_of
from zods.data.order import Mixture, epoch_order
from zods.data.workers import ignore_requests_to_stop

logger = logging.getLogger(__name__)


def check_dataset(dataset: Any, name: str) -> int:
    """The number of examples of a map-style dataset.

    name: for messages. Raises ValueError for a dataset of another kind, and for an empty one.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"{name}: found {type(dataset).__name__}, expected a map-style dataset (__len__, "
            "__getitem__); as training_data also a stream, torch's or datasets' IterableDataset."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name}: the dataset is empty. Give at least one example.")
    return len(dataset)


class EpochLoader:
    """Base class of loaders of micro-batches.

    An iterator yields the rest of the current epoch, or the next epoch if the current one is over.
    epoch: the current epoch. position: number of its micro-batches that were yielded.
    accumulation: micro-batches per step. mixture: what the examples are drawn from; None: each is
    drawn once per epoch.
    """

    dataset: Any
    accumulation: int
    mixture: Mixture | None = None
    epoch = 0
    position = 0

    def __len__(self) -> int:
        """The number of micro-batches per epoch and rank."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    @property
    def num_examples(self) -> int | None:
        """The number of examples of an epoch; None for a stream, where it is not known."""
        return len(self.dataset)

    def last_examples(self) -> list[int]:
        """The example indices, over all ranks, of the last step that was yielded."""
        raise NotImplementedError

    def digest_of_last_step(self) -> str:
        """A digest of the examples, over all ranks, of the last step that was yielded."""
        return digest_of(self.dataset[i] for i in self.last_examples())

    def forever(self) -> Iterator[Any]:
        """Yield micro-batches without end, epoch after epoch."""
        while True:
            yield from self

    @property
    def population(self) -> int | None:
        """The number of examples of which a batch is a sample, see `Mixture.effective_size`; None
        for a stream.
        """
        return self.num_examples if self.mixture is None else self.mixture.effective_size

    @property
    def steps_per_epoch(self) -> int:
        return len(self) // self.accumulation

    @property
    def epoch_and_step(self) -> tuple[int, int]:
        """The epoch, and the number of its steps whose micro-batches were all yielded."""
        return self.epoch, self.position // self.accumulation

    def go_to(self, epoch_and_step: tuple[int, int]) -> None:
        """Continue at a value of `epoch_and_step`. Raises ValueError if an epoch is too short."""
        epoch, step = epoch_and_step
        if not 0 <= step <= self.steps_per_epoch:
            raise ValueError(
                f"the log stands at step {step} of an epoch, which has {self.steps_per_epoch} "
                "steps here. Resume with the data and the train_batch_size it was made with."
            )
        self.epoch, self.position = epoch, step * self.accumulation


class TrainingLoader(EpochLoader):
    """This rank's micro-batches of the training data, resumable.

    A step takes `accumulation` micro-batches of `micro_batch` examples on each of `world_size`
    ranks. The tail of an epoch that does not fill a step is dropped. Every epoch is shuffled anew,
    so that no example is dropped in every epoch. The position counts the micro-batches that were
    yielded, not those that worker processes have loaded ahead.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        collate_fn: Callable | None = None,
        target_data: Any = None,
        lengths: torch.Tensor | None = None,
        mixture: Mixture | None = None,
        num_workers: int = 0,
    ) -> None:
        """target_data: further examples that the digest of the data covers. lengths, mixture: as in
        `epoch_order`. num_workers: worker processes that load and collate micro-batches; 0: this
        process does.
        """
        size = check_dataset(dataset, "training_data")
        self.batch_size = micro_batch * accumulation * world_size
        if size < self.batch_size:
            raise ValueError(
                f"training_data: {size} examples, fewer than one step's train_batch_size of "
                f"{self.batch_size}. Use a smaller batch or more data."
            )
        self.dataset = dataset
        self.examples = ExampleDigests(dataset, target_data)
        if rank == 0 and (limit := self.examples.limit()) is not None:
            logger.warning(limit)
        self.collate_fn = collate_fn
        self.seed = seed
        self.mixture = mixture
        self._lengths, self._num_workers = lengths, num_workers
        self._last_order: tuple[int, torch.Tensor] | None = None
        self.accumulation = accumulation
        # (index of this rank among the ranks that share a batch, their number). It may change
        # between steps.
        self.split = (rank, world_size)

    @property
    def _source(self) -> Any:
        """A map from the items of `_epoch_batches` to examples."""
        return self.dataset

    def _collate(self, rows: list[Any]) -> Any:
        return (self.collate_fn or default_collate)(rows)

    def __len__(self) -> int:
        """The number of micro-batches per epoch and rank."""
        return len(self.dataset) // self.batch_size * self.accumulation

    def _order(self) -> torch.Tensor:
        """The example indices of each step of the current epoch, (steps, batch_size)."""
        if self._last_order is None or self._last_order[0] != self.epoch:
            size: int = len(self.dataset)
            order = epoch_order(
                *(size, self.batch_size, self.seed, self.epoch),
                lengths=self._lengths,
                mixture=self.mixture,
            )
            self._last_order = (self.epoch, order)
        return self._last_order[1]

    def _epoch_batches(self) -> Iterator[list[Any]]:
        """Yield the example indices of each micro-batch in the rest of the epoch, lazily."""
        order = self._order()
        for position in range(self.position, len(self)):
            step, micro = divmod(position, self.accumulation)
            positions = positions_of(self.batch_size, self.accumulation, micro, self.split)
            yield order[step][positions.start : positions.stop].tolist()

    def __iter__(self) -> Iterator[Any]:
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        epoch = self.epoch
        while self.epoch == epoch and self.position < len(self):
            yield from self._in_sequence()

    def _in_sequence(self) -> Iterator[Any]:
        """Yield micro-batches until the epoch ends, or the position or the split is set anew.

        What worker processes have loaded ahead is then dropped.
        """
        for batch in DataLoader(
            self._source,
            batch_sampler=self._epoch_batches(),
            collate_fn=self._collate,
            generator=torch.Generator(),
            num_workers=self._num_workers,
            # Of a forked worker this process is the parent, whose SIGTERM alone it takes.
            multiprocessing_context="fork" if self._num_workers else None,
            worker_init_fn=ignore_requests_to_stop,
        ):
            self.position += 1
            here = (self.epoch, self.position, self.split)
            yield batch
            if (self.epoch, self.position, self.split) != here:
                return

    def last_examples(self) -> list[int]:
        if self.position < self.accumulation:
            return []
        return self._order()[self.position // self.accumulation - 1].tolist()

    def state_dict(self) -> dict[str, Any]:
        examples = self.position // self.accumulation * self.batch_size
        return {"epoch": self.epoch, "examples": examples, "size": self.num_examples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the first step that was not complete in `state`.

        Raises ValueError where the dataset's size or the batch size does not fit.
        """
        if "examples" not in state:
            raise ValueError(
                "zeroth_order.selector: none, but the checkpoint was made with one. Resume with "
                "the same."
            )
        if state["size"] != self.num_examples:
            raise ValueError(
                f"training_data: {_named(self.num_examples)}, but the checkpoint was made with "
                f"{_named(state['size'])}. Resume with the same data."
            )
        if state["examples"] % self.batch_size:
            raise ValueError(
                f"train_batch_size: {self.batch_size}, but the checkpoint stands at example "
                f"{state['examples']} of its epoch, which is no multiple. Resume with the "
                "train_batch_size it was made with."
            )
        self.epoch = state["epoch"]
        self.position = state["examples"] // self.batch_size * self.accumulation


def _named(num_examples: int | None) -> str:
    return "a stream" if num_examples is None else f"{num_examples} examples"


@dataclass(frozen=True)
class WholePass:
    """One pass over a dataset, in micro-batches that are assigned to the ranks in turn.

    Yields (micro-batch, positions of its examples in the dataset, counted). All ranks make the same
    number of forwards, as ZeRO-3 requires. A rank without a micro-batch in the last round repeats
    the dataset's first one, with `counted` False. The micro-batches themselves do not depend on the
    number of ranks.
    """

    dataset: Dataset
    micro_batch: int
    rank: int
    world_size: int
    collate_fn: Callable | None = None

    def __len__(self) -> int:
        """The number of rounds; a round is one micro-batch per rank."""
        chunks = -(-len(self.dataset) // self.micro_batch)  # type: ignore[arg-type]
        return -(-chunks // self.world_size)

    def __iter__(self) -> Iterator[tuple[Any, Sequence[int], bool]]:
        size: int = len(self.dataset)  # type: ignore[arg-type]
        starts = [(r * self.world_size + self.rank) * self.micro_batch for r in range(len(self))]
        chunks = [
            range(start, min(start + self.micro_batch, size))
            if start < size
            else range(min(self.micro_batch, size))
            for start in starts
        ]
        loader = DataLoader(
            self.dataset,
            batch_sampler=[list(chunk) for chunk in chunks],
            collate_fn=self.collate_fn,
            generator=torch.Generator(),
        )
        for start, chunk, batch in zip(starts, chunks, loader, strict=True):
            yield batch, chunk, start < size
