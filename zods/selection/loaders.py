"""Loaders of chosen examples, and the functions `zods.select` and `zods.weighted_loss`.

`SelectingLoader` is the training loader of `zods.initialize`. `select` wraps a loader of
first-order DeepSpeed training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.dataloader import DeepSpeedDataLoader
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor
from torch.utils.data import DataLoader

from zods.comm.communicator import Communicator
from zods.config.schema import check_loss_mean
from zods.config.selector_section import parse_selector
from zods.data.batch import POSITIONS, to_device, without_weights
from zods.data.digest import ExampleDigests
from zods.data.loader import EpochLoader, check_dataset
from zods.data.objectives import Objective, weighted_sum
from zods.data.order import epoch_order
from zods.selection.features import without_cache
from zods.selection.sub_batches import Batch, SubBatches

logger = logging.getLogger(__name__)


class SelectingLoader(EpochLoader):
    """This rank's micro-batches of chosen examples, epoch after epoch.

    It is resumable and has the interface of `TrainingLoader`. An epoch is a pass over the data in
    candidate batches, with `interval` steps for each.
    """

    def __init__(
        self,
        selection: SubBatches,
        comm: Communicator,
        seed: int,
        examples: ExampleDigests | None = None,
    ) -> None:
        """examples: the digests of the dataset, where they are known; None: they are made."""
        self.selection, self._comm, self._seed = selection, comm, seed
        self._config = selection.selector.config
        self.dataset, self.accumulation = selection.dataset, selection.accumulation
        if examples is None:
            self.examples = ExampleDigests(selection.dataset, selection.target_data)
        else:
            self.examples = examples
        if examples is None and comm.rank == 0 and (limit := self.examples.limit()) is not None:
            logger.warning(limit)

    def collate_fn(self, rows: Sequence[Any]) -> Batch:
        """Collate any examples into a batch without weights."""
        return self.selection.collated(rows)

    @property
    def split(self) -> tuple[int, int]:
        """As in `SubBatches`."""
        return self.selection.split

    @split.setter
    def split(self, split: tuple[int, int]) -> None:
        self.selection.split = split

    def __len__(self) -> int:
        """The number of micro-batches per epoch and rank."""
        return (
            len(self.dataset) // self._config.candidates * self._config.interval * self.accumulation
        )

    def __iter__(self) -> Iterator[Batch]:
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        epoch = self.epoch
        order = epoch_order(len(self.dataset), self._config.candidates, self._seed, epoch)
        batches: list[Batch] = []
        # `go_to` may change the epoch between two micro-batches
        while self.epoch == epoch and self.position < len(self):
            step, micro = divmod(self.position, self.accumulation)
            if micro == 0 and step % self._config.interval == 0:
                candidates = order[step // self._config.interval]
                self.selection.choose(candidates[self._comm.rank :: self._comm.world_size].tolist())
            if micro == 0 or not batches:
                batches = self.selection.micro_batches()
            self.position += 1
            yield batches[micro]

    def last_examples(self) -> list[int]:
        """Return the ids of the last selection."""
        return self.selection.selected_ids

    def candidates(self, epoch_and_step: tuple[int, int]) -> list[int]:
        """Ids, ascending, of the candidates of the step that ends at `epoch_and_step`."""
        order = epoch_order(
            len(self.dataset), self._config.candidates, self._seed, epoch_and_step[0]
        )
        return sorted(order[(epoch_and_step[1] - 1) // self._config.interval].tolist())

    def restore_selection(
        self,
        epoch_and_step: tuple[int, int],
        ids: Sequence[int],
        weights: Sequence[float],
        mean: float | None,
    ) -> None:
        """Restore the selection of the step that ends at `epoch_and_step`."""
        own_ids = self.candidates(epoch_and_step)[self._comm.rank :: self._comm.world_size]
        self.selection.restore_selection(own_ids, ids, weights, mean)

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "steps": self.position // self.accumulation,
            **self._kind(),
            **self.selection.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the first step that `state` had not begun, on any number of ranks.

        Raises ValueError if the data or the sizes of batches differ.
        """
        for key, here in self._kind().items():
            if state.get(key) != here:
                raise ValueError(
                    f"selector: {key} is {here}, but {state.get(key)} in the checkpoint. Resume "
                    "with the same."
                )
        self.epoch, self.position = state["epoch"], state["steps"] * self.accumulation
        self.selection.load_state_dict(state)

    def _kind(self) -> dict[str, int]:
        """The settings on which the examples of a step depend."""
        return {
            "size": len(self.dataset),
            "candidates": self._config.candidates,
            "interval": self._config.interval,
            "train_batch_size": self.selection.selector.budget,
        }


class SelectedBatches:
    """The result of `select`. Each iteration is a pass over the loader, resumable at any step.

    selection: makes the selections, and holds the ids and the report of the last one.
    """

    def __init__(self, loader: DataLoader, selection: SubBatches, comm: Communicator) -> None:
        self._batches: Any = loader.batch_sampler
        self.position = 0  # number of micro-batches that were yielded in the current pass
        self.selection = selection
        self._config = selection.selector.config
        size = int(loader.batch_size or 0) * comm.world_size
        if size == 0 or self._config.candidates % size:
            raise ValueError(
                f"selector.candidates: found {self._config.candidates}, but the loader's batches "
                f"of {loader.batch_size} on {comm.world_size} ranks give {size} at a time. Give a "
                "multiple."
            )
        self._loads = self._config.candidates // size

    def __len__(self) -> int:
        """The number of micro-batches per pass over the loader, on this rank."""
        per_step = self.selection.accumulation * self._config.interval
        return len(self._batches) // self._loads * per_step

    def __iter__(self) -> Iterator[Batch]:
        ids: list[int] = []
        per_choice = self.selection.accumulation * self._config.interval
        for count, some in enumerate(self._batches, start=1):
            ids += some
            if count % self._loads:
                continue
            own_ids, ids = ids, []
            begins = (count // self._loads - 1) * per_choice
            if self.position >= begins + per_choice:  # was yielded before the pass was resumed
                continue
            if self.position == begins:
                self.selection.choose(own_ids)
            batches = self.selection.micro_batches()
            while self.position < begins + per_choice:
                self.position += 1
                batch = batches[(self.position - 1) % self.selection.accumulation]
                yield {key: value for key, value in batch.items() if key != POSITIONS}
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        """The state of a pass, valid for a loader that yields its batches in the same order."""
        return {
            "steps": self.position // self.selection.accumulation,
            **self.selection.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["steps"] * self.selection.accumulation
        self.selection.load_state_dict(state)


def select(
    loader: Any,
    engine: DeepSpeedEngine,
    config: Mapping[str, Any],
    *,
    seed: int = 42,
    loss_mean: str = "tokens",
    target_data: Any = None,
) -> SelectedBatches:
    """Wrap a loader of first-order DeepSpeed training, so that it yields chosen examples.

        for batch in zods.select(loader, engine, {"candidates": 128, "source_column": "source"}):
            loss = zods.weighted_loss(engine, batch)
            engine.backward(loss)
            engine.step()

    Each batch is a dict of the model's inputs and labels on the CPU, with an entry
    `example_weights`.

    Args:
        loader: a torch DataLoader, or the loader that `deepspeed.initialize` returns, over a
            map-style dataset that every rank can read. Its samplers determine the candidates.
        engine: a DeepSpeedEngine. Its train_batch_size is the number of chosen examples.
        config: the keys of the section "selector".
        seed: base seed of the selector's directions and random choices.
        loss_mean: a step's loss is the weighted mean over the label tokens of the chosen examples
            ("tokens"), or over the examples ("examples"), each with the mean over its own label
            tokens. Pass the same value to `weighted_loss`.
        target_data: a map-style dataset whose rows the loader's collate_fn takes, too; the examples
            that the strategy "target" needs.

    Raises:
        ValueError: the same on all ranks, if the loader or the configuration cannot be used.
    """
    check_loss_mean(loss_mean)
    comm = Communicator(torch.device(engine.device))
    with comm.same_on_all_ranks():
        if isinstance(loader, DeepSpeedDataLoader):
            loader = iter(loader).dataloader  # DeepSpeed's loader makes a DataLoader per pass
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            raise ValueError(
                f"loader: found {type(loader).__name__}, expected a DataLoader with batches of a "
                "map-style dataset."
            )
        check_dataset(loader.dataset, "loader.dataset")
        sub_batches = SubBatches(
            loader.dataset,
            loader.collate_fn,
            parse_selector(config, "selector"),
            deepspeed_engine=engine,
            comm=comm,
            seed=seed,
            path="selector",
            loss_mean=loss_mean,
            target_data=target_data,
        )
        return SelectedBatches(loader, sub_batches, comm)


def weighted_loss(
    engine: DeepSpeedEngine, batch: Mapping[str, Any], loss_mean: str = "tokens"
) -> Tensor:
    """Compute the loss of a micro-batch of `select`, 0-d, with a graph.

    It is the weighted sum of the losses of its examples. The loss of an example is the sum over its
    label tokens, or with "examples" their mean. The weights are scaled for `engine.backward`, which
    takes the mean over micro-batches and ranks. loss_mean: as passed to `select`.
    """
    check_loss_mean(loss_mean)
    moved = to_device(batch, engine.device)
    inputs = {key: value for key, value in without_weights(moved).items() if key != "labels"}
    return weighted_sum(
        engine(**inputs, **without_cache(engine.module)), moved, Objective(loss_mean)
    ).float()
