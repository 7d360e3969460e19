"""A loader of a stream: a dataset without a length, which is read from its beginning.

The examples of a step are the next ones of the stream, so an example's position in the stream
decides on its step and on its place in the batch, for any number of ranks. Each rank reads the
whole stream in its own process, and collates its own examples only. What is costly, such as the
tokenisation of texts, therefore belongs into the collate function. Made by
`zods.training.training_data`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, IterableDataset, default_collate

from zods.core.example_groups import positions_of
from zods.data.digest import ExampleDigests, digest_of
from zods.data.loader import TrainingLoader

HEAD = 64  # first examples that ranks and restarts compare, and on which an lr of auto is measured


class BadRow(ValueError):
    """A row that a collate function cannot use. The message names the row."""


def is_stream(dataset: Any) -> bool:
    """Whether a dataset is torch's IterableDataset, as that of the library datasets is, too."""
    return isinstance(dataset, IterableDataset)


class _Rows(Dataset):
    """Examples that are given in place of their indices."""

    def __getitem__(self, row: Any) -> Any:
        return row


class StreamLoader(TrainingLoader):
    """This rank's micro-batches of a stream, resumable.

    The step s of an epoch has the examples at positions s * train_batch_size and following. The
    stream's end ends the epoch, and a tail that does not fill a step is dropped. The next epoch
    reads the stream again, after `stream.set_epoch(epoch)` where it has this method. It is shuffled
    only where the stream itself is, as by `shuffle` of the library datasets.

    A resumed run reads the stream from its beginning and drops the examples before its position.
    `skip` of datasets 5.2 is not used: in epochs after the first it gives other examples where
    shards are shuffled.

    dataset: the first examples. stream: the whole.
    """

    def __init__(
        self,
        stream: IterableDataset,
        *,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world_size: int,
        collate_fn: Callable | None = None,
        num_workers: int = 0,
    ) -> None:
        """num_workers: processes that collate micro-batches. Raises ValueError where the stream
        cannot be read twice with the same examples, or has too few.
        """
        self.batch_size = micro_batch * accumulation * world_size
        self.stream = stream
        self.dataset = _first(stream, max(HEAD, self.batch_size))
        if len(self.dataset) < self.batch_size:
            raise ValueError(_too_short(len(self.dataset), self.batch_size))
        self.examples = ExampleDigests(self.dataset[:HEAD])
        again = _first(stream, len(self.examples))
        if digest_of(again) != digest_of(self.dataset[:HEAD]):
            raise ValueError(
                "training_data: a stream with other examples when it is read again: ranks and "
                "resumed runs could not agree on them. Read it from its beginning in each "
                "iteration, with a seed where it is shuffled, and augment examples in collate_fn."
            )
        self.collate_fn = collate_fn
        self._num_workers = num_workers
        self.accumulation = accumulation
        self.split = (rank, world_size)
        self._digests: dict[tuple[int, int], str] = {}  # (epoch, step) -> digest of its examples
        self._end: tuple[int, int] | None = None  # of the epoch whose end was read

    def __len__(self) -> int:
        raise TypeError("training_data: a stream has no known number of micro-batches per epoch")

    @property
    def num_examples(self) -> None:
        return None

    @property
    def _source(self) -> Any:
        return _Rows()

    def _collate(self, rows: list[Any]) -> Any:
        """Collate examples. A BadRow is returned, because torch would put the traceback of a worker
        process before its message.
        """
        try:
            return (self.collate_fn or default_collate)(rows)
        except BadRow as error:
            return error

    def __iter__(self) -> Iterator[Any]:
        if self._is_over():
            self.epoch, self.position = self.epoch + 1, 0
        begun = (self.epoch, self.position)
        while self.epoch == begun[0] and not self._is_over():
            for batch in self._in_sequence():
                if isinstance(batch, BadRow):
                    raise batch
                yield batch
        if (self.epoch, self.position) == begun:  # a resumed run stands at the end of an epoch
            yield from self

    def _is_over(self) -> bool:
        return self._end == (self.epoch, self.position)

    def _epoch_batches(self) -> Iterator[list[Any]]:
        """Yield this rank's examples of each micro-batch in the rest of the epoch."""
        epoch, (step, first) = self.epoch, divmod(self.position, self.accumulation)
        rows = self._rows_from(step * self.batch_size)
        while len(batch := list(islice(rows, self.batch_size))) == self.batch_size:
            self._note_digest(epoch, step, batch)
            for micro in range(first, self.accumulation):
                positions = positions_of(self.batch_size, self.accumulation, micro, self.split)
                yield batch[positions.start : positions.stop]
            step, first = step + 1, 0
        if step == 0:
            raise ValueError(_too_short(len(batch), self.batch_size))
        self._end = (epoch, step * self.accumulation)

    def _rows_from(self, start: int) -> Iterator[Any]:
        """Read the stream from the example at position `start`."""
        rows = _opened(self.stream, self.epoch)
        dropped = sum(1 for _ in islice(rows, start))
        if dropped < start:
            raise ValueError(
                f"training_data: the stream ends after {dropped} examples, but the run stands at "
                f"example {start} of its epoch. Resume with the same data."
            )
        return rows

    def _note_digest(self, epoch: int, step: int, batch: list[Any]) -> None:
        """Keep the digest of a step's examples, and drop those of steps before the last one."""
        last = (self.epoch, self.position // self.accumulation - 1)
        self._digests = {key: value for key, value in self._digests.items() if key >= last}
        self._digests[epoch, step] = digest_of(batch)

    def last_examples(self) -> list[int]:
        """The positions in the stream of the examples of the last step that was yielded."""
        end = self.position // self.accumulation * self.batch_size
        return list(range(end - self.batch_size, end)) if end else []

    def digest_of_last_step(self) -> str:
        return self._digests.get((self.epoch, self.position // self.accumulation - 1), "")

    def go_to(self, epoch_and_step: tuple[int, int]) -> None:
        self.epoch, self.position = epoch_and_step[0], epoch_and_step[1] * self.accumulation


def _opened(stream: Any, epoch: int) -> Iterator[Any]:
    """Read the stream from its beginning."""
    if hasattr(stream, "set_epoch"):
        stream.set_epoch(epoch)
    return iter(stream)


def _first(stream: IterableDataset, number: int) -> list[Any]:
    return list(islice(_opened(stream, 0), number))


def _too_short(found: int, batch_size: int) -> str:
    return (
        f"training_data: the stream ends after {found} examples, fewer than one step's "
        f"train_batch_size of {batch_size}. Use a smaller batch or more data."
    )
