"""Metrics of a model over a whole dataset, whatever trains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zods.comm import Communicator
from zods.data import WholePass

Measure = Callable[[Any, dict[str, torch.Tensor], Any], dict[str, tuple[float, float]]]


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device; tuples, lists and dicts are followed."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(item, device) for item in batch)
    if hasattr(batch, "items"):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch


@torch.no_grad()
def measure_whole(
    outputs_of: Callable[[Any], Any],
    dataset: Any,
    collate_fn: Callable[[list], tuple[dict[str, torch.Tensor], Any]],
    measure: Measure,
    *,
    comm: Communicator,
    micro_batch: int,
) -> dict[str, float]:
    """Means of metrics over a whole dataset and all ranks, every example counted once.

    outputs_of: model inputs -> the model's outputs. collate_fn: rows -> (model inputs, targets). measure: (outputs, inputs,
    targets) -> name: (sum, count).
    """
    totals: dict[str, list[float]] = {}
    for batch, counted in WholePass(dataset, micro_batch, comm.rank, comm.world_size, collate_fn):
        inputs, targets = to_device(batch, comm.device)
        for name, (total, count) in measure(outputs_of(inputs), inputs, targets).items():
            sums = totals.setdefault(name, [0.0, 0.0])
            if counted:
                sums[0] += total
                sums[1] += count
    names = sorted(totals)
    reduced = comm.sum_over_ranks([value for name in names for value in totals[name]])
    return {name: reduced[2 * i] / reduced[2 * i + 1] for i, name in enumerate(names)}
