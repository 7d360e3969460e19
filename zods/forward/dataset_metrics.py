"""Metrics of a model over a whole dataset, and a check of the model's own loss.

Called by the engines of zeroth-order and first-order training, and by `zods.selection`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from zods.comm.communicator import Communicator
from zods.data.batch import to_device, without_weights
from zods.data.evaluation import Forwards, SeveralForwards
from zods.data.loader import WholePass
from zods.data.loss_probes import other_labels
from zods.data.objectives import batch_loss, logits_of
from zods.forward.cached_generation import NextTokens
from zods.forward.labelled_logits import LabelledLogits

Measure = Callable[[Any, Any, Any], dict[str, tuple[float, float]]]


@torch.no_grad()
def measure_whole(
    outputs_of: Callable[[Any], Any],
    dataset: Any,
    collate_fn: Callable[[list], tuple[Any, Any]],
    measure: Measure,
    *,
    comm: Communicator,
    micro_batch: int,
    next_tokens: NextTokens,
    labelled_logits: LabelledLogits,
) -> dict[str, float]:
    """Compute means of metrics over a whole dataset and all ranks, every example counted once.

    Collective: all ranks call it together. outputs_of: maps model inputs to the model's outputs.
    collate_fn: maps rows to (model inputs, targets). The inputs may be a `SeveralForwards`, on all
    ranks. measure: maps (outputs, inputs, targets) to {name: (sum, count)}. micro_batch: most
    sequences per forward and rank. next_tokens, labelled_logits: compute logits for inputs that
    generate text, and for candidates.
    """

    def largest(number: int) -> int:
        return int(comm.max_over_ranks(number))

    forwards = Forwards(outputs_of, micro_batch, largest, next_tokens, labelled_logits)
    totals: dict[str, list[float]] = {}
    rounds = WholePass(dataset, micro_batch, comm.rank, comm.world_size, collate_fn)
    for batch, _, counted in rounds:
        inputs, targets = to_device(batch, comm.device)
        several = isinstance(inputs, SeveralForwards)
        outputs = inputs.run(forwards) if several else outputs_of(inputs)
        for name, (total, count) in measure(outputs, inputs, targets).items():
            sums = totals.setdefault(name, [0.0, 0.0])
            if counted:
                sums[0] += total
                sums[1] += count
    names = sorted(totals)
    comm.check_agreement(json.dumps(names).encode(), "the names of the metrics")
    reduced = comm.sum_over_ranks([value for name in names for value in totals[name]])
    return {name: reduced[2 * i] / reduced[2 * i + 1] for i, name in enumerate(names)}


@torch.no_grad()
def check_own_loss(model: Any, batch: dict[str, Any], comm: Communicator) -> None:
    """Raise ValueError on all ranks if a model's own loss is not the cross entropy of its logits.

    The losses of single examples are made from the logits. Collective: all ranks call it together.
    """
    plain = to_device(without_weights(batch), comm.device)
    outputs = model(**plain)
    logits = logits_of(outputs)
    differs, own, of_logits = logits is None, batch_loss(outputs, plain), torch.tensor(torch.nan)
    if logits is not None:
        tolerance = 1e-4 if logits.dtype == torch.float32 else 1e-2
        for given in (plain, *other_labels(plain, logits)):
            # every forward runs, also after a difference is found: on the other ranks they run
            # too, and ZeRO-3 gathers collectively
            outputs = model(**given)
            if not differs:
                own, of_logits = (
                    batch_loss(outputs, given),
                    batch_loss({"logits": logits_of(outputs)}, given),
                )
                differs = not torch.allclose(
                    own, of_logits, rtol=tolerance, atol=0.1 * tolerance, equal_nan=True
                )
    if comm.sum_over_ranks([float(differs)])[0]:
        raise ValueError(
            f"the model's own loss ({float(own):.4f} on a first batch) is not the cross entropy of "
            f"its logits ({float(of_logits):.4f}), of which the losses of single examples are "
            "made. Losses of another kind can be neither selected by nor weighted."
        )
