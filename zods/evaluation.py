"""Losses and outputs of a sharded model on batches, at given points: one forward per point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from zods.comm import Communicator
from zods.data import WholePass
from zods.objectives import batch_loss, num_examples
from zods.sharding import ShardedParameters
from zods.streams import PerturbedForward, Point


class Evaluator:
    """Runs a model under DeepSpeed. `micro_batch`: examples per forward and rank of a pass over a whole dataset."""

    def __init__(
        self,
        deepspeed_engine: Any,
        comm: Communicator,
        parameters: ShardedParameters,
        *,
        distribution: str,
        micro_batch: int,
    ) -> None:
        self._deepspeed = deepspeed_engine
        self._comm = comm
        self._micro_batch = micro_batch
        self._forward_at = PerturbedForward(deepspeed_engine.module, parameters.slices, distribution)
        self._checked = False

    def to_device(self, batch: Any) -> Any:
        """A batch with its tensors on the device; tuples, lists and dicts are followed."""
        if isinstance(batch, torch.Tensor):
            return batch.to(self._comm.device, non_blocking=True)
        if isinstance(batch, (tuple, list)):
            return type(batch)(self.to_device(item) for item in batch)
        if hasattr(batch, "items"):
            return {key: self.to_device(value) for key, value in batch.items()}
        return batch

    def outputs(self, batch: Any) -> Any:
        """The model's outputs: a dict is given as keywords, a tuple or list as positions."""
        if isinstance(batch, dict):
            return self._deepspeed(**batch)
        return self._deepspeed(*batch) if isinstance(batch, (tuple, list)) else self._deepspeed(batch)

    def losses(self, points: Sequence[Point | None], batch: Any) -> torch.Tensor:
        """Mean losses of a batch on the device, (number of points,) in float64; None is the parameters as they are.

        Before the first, one forward at the parameters: does the model give a loss, and which modules run?
        Raises ValueError where the model gives no loss.
        """
        if not self._checked:
            with self._forward_at.observing():
                outputs = self.outputs(batch)
            batch_loss(outputs, batch)
            self._checked = True
        losses = []
        for point in points:
            with self._forward_at.at(point):
                losses.append(batch_loss(self.outputs(batch), batch).double())
        return torch.stack(losses)

    def loss_sums(self, points: Sequence[Point | None], batch: Any) -> torch.Tensor:
        """Losses times the number of examples, then that number: (number of points + 1,) in float64."""
        losses = self.losses(points, batch)
        size = num_examples(batch)
        return torch.cat([losses * size, losses.new_tensor([size])])

    def whole_set_losses(
        self, points: Sequence[Point], dataset: Any, collate_fn: Callable | None, title: str
    ) -> list[float]:
        """Mean losses over a whole dataset and all ranks, each micro-batch weighted by its examples."""
        rounds = self._whole_pass(dataset, collate_fn)
        sums = torch.zeros(len(points) + 1, dtype=torch.float64, device=self._comm.device)
        for batch, counted in tqdm(rounds, desc=title, leave=False, disable=self._comm.rank != 0):
            found = self.loss_sums(points, self.to_device(batch))
            if counted:
                sums += found
        *totals, count = self._comm.sum_over_ranks(sums.tolist())
        return [total / count for total in totals]

    def measure(
        self,
        dataset: Any,
        collate_fn: Callable[[list], tuple[dict[str, torch.Tensor], Any]],
        measure: Callable[[Any, dict[str, torch.Tensor], Any], dict[str, tuple[float, float]]],
    ) -> dict[str, float]:
        """Means of metrics over a whole dataset and all ranks; see `ZerothOrderEngine.evaluate`."""
        totals: dict[str, list[float]] = {}
        for (inputs, targets), counted in self._whole_pass(dataset, collate_fn):
            inputs, targets = self.to_device(inputs), self.to_device(targets)
            for name, (total, count) in measure(self.outputs(inputs), inputs, targets).items():
                sums = totals.setdefault(name, [0.0, 0.0])
                if counted:
                    sums[0] += total
                    sums[1] += count
        names = sorted(totals)
        reduced = self._comm.sum_over_ranks([value for name in names for value in totals[name]])
        return {name: reduced[2 * i] / reduced[2 * i + 1] for i, name in enumerate(names)}

    def mean_loss(self, batches: Iterator[Any]) -> float:
        """Mean loss at the parameters over `batches` and all ranks; the same number of batches on every rank."""
        sums = torch.stack([self.loss_sums([None], self.to_device(batch)) for batch in batches]).sum(0)
        total, count = self._comm.sum_over_ranks(sums.tolist())
        return total / count

    def _whole_pass(self, dataset: Any, collate_fn: Callable | None) -> WholePass:
        return WholePass(dataset, self._micro_batch, self._comm.rank, self._comm.world_size, collate_fn)
