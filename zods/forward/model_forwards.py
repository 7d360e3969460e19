"""Forwards of a model under DeepSpeed: its outputs, logits and losses at one point, and its
objective.

The forms of evaluation in `zods.forward.forms` are made of these.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from zods.comm.communicator import Communicator
from zods.core.directions import Direction
from zods.core.points import Point
from zods.data.batch import (
    WEIGHTS,
    Inputs,
    Signature,
    call_model,
    num_examples,
    to_device,
    without_weights,
)
from zods.data.objectives import (
    Objective,
    batch_loss,
    fits_cross_entropy,
    logits_of,
    needs_row_losses,
    own_loss,
    refusal_of_examples,
    shift_probes,
)
from zods.forward.perturbed_modules import PerturbedForward
from zods.forward.stacked import NotStackable
from zods.params.deferred_update import DeferredUpdate
from zods.params.shards import ShardedParameters
from zods.params.zero3_adapter import is_sharded


class ModelForwards:
    """The model's outputs, logits and losses at points. It is in eval mode whenever one of these
    methods runs it.

    on_forward: called before each forward, where it is set.
    """

    def __init__(
        self,
        deepspeed_engine: Any,
        comm: Communicator,
        parameters: ShardedParameters,
        deferred: DeferredUpdate | None,
        direction: Direction,
        loss_mean: str,
    ) -> None:
        """loss_mean: what a batch's loss is a mean over, "tokens" or "examples"."""
        self.deepspeed, self.module = deepspeed_engine, deepspeed_engine.module
        self.comm = comm
        first = parameters.shards[0]
        self.is_sharded, self.dtype = is_sharded(first.param), first.dtype
        self.at = PerturbedForward(self.module, parameters.shards, direction, deferred)
        # how the model aligns its labels is found on the first batch
        self.objective = Objective(loss_mean)
        self.on_forward: Callable[[], Any] | None = None
        self._modules = list(self.module.modules())
        self._signature = Signature(self.module)
        takes = inspect.signature(self.module.forward).parameters
        self._needs_labels = (
            "labels" in takes and takes["labels"].default is inspect.Parameter.empty
        )
        # keys and values for generation, of all layers: a loss needs none
        self._has_cache = "use_cache" in takes

    def inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any] | Inputs:
        """A batch on the device, as the model's forward is given it; see
        `zods.data.batch.Signature.bind`.
        """
        return to_device(self._signature.bind(*args, **kwargs), self.comm.device)

    def without_cache(self, batch: Any) -> Any:
        """The batch, with generation's cache switched off where the model has one."""
        return (
            {"use_cache": False, **batch} if self._has_cache and isinstance(batch, dict) else batch
        )

    def outputs(self, batch: Any) -> Any:
        """The model's outputs for what `inputs` gave, or for a batch that it would take."""
        self.into_eval_mode()
        if self.on_forward is not None:
            self.on_forward()
        return call_model(self.deepspeed, self._signature.bind(batch))

    def into_eval_mode(self) -> None:
        """Put the model into eval mode: both losses of a pair need the same function, so dropout is
        off.
        """
        for module in self._modules:
            module.training = False

    def mean_of(self, outputs: Any, batch: Any) -> torch.Tensor:
        return batch_loss(outputs, batch, self.objective)

    def find_objective(self, outputs: Any, batch: Any) -> None:
        """Find how the model's labels are aligned, and whether its loss is the cross entropy of its
        logits.

        The same on all ranks. Where the loss fits both alignments or neither, it is that of a
        shifted model if it does not depend on the rows' first labels. Raises ValueError on all
        ranks where the mean over examples is wanted of a loss that does not tell them apart.
        """
        batch_loss(outputs, batch)
        found = Objective(self.objective.loss_mean)
        if own_loss(outputs) is None:
            self.objective = found
            return
        misfits = [
            float(fits_cross_entropy(outputs, batch, shifted) is False) for shifted in (True, False)
        ]
        fits = [not number for number in self.comm.sum_over_ranks(misfits)]
        shifted = fits[0]
        if fits[0] == fits[1] and (probes := shift_probes(batch)) is not None:
            without, with_first = (
                batch_loss(self.outputs_at(None, probe), probe) for probe in probes
            )
            same = torch.allclose(without, with_first, rtol=1e-6, atol=0.0, equal_nan=True)
            shifted = not any(self.comm.sum_over_ranks([float(not same)]))
        self.objective = replace(found, shifted=shifted)
        if not any(fits):
            self.take_own_loss(batch)

    def take_own_loss(self, batch: Any) -> None:
        """Take the model's loss as one of its own from now on, not as the cross entropy of its
        logits. All ranks together.

        Raises ValueError on all ranks where the mean over examples is wanted of a loss that does
        not tell them apart.
        """
        self.objective = replace(self.objective, own=True)
        if isinstance(batch, dict) and WEIGHTS in batch:
            raise ValueError(
                "the model's own loss is not the cross entropy of its logits, of which the losses "
                "of single examples are made. Losses of another kind can be neither selected by "
                "nor weighted."
            )
        size = num_examples(batch) if needs_row_losses(batch, self.objective) else 0
        largest = max(of_rank[0] for of_rank in self.comm.gather_scalars([float(size)]))
        if largest:
            raise ValueError(refusal_of_examples(int(largest)))

    def own_and_logits_loss(self, outputs: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's own loss, and the one that is taken of its logits alone. Raises ValueError
        where logits and labels have shapes that no cross entropy has."""
        batch = without_weights(batch)  # with weights a loss is always taken from the logits
        over_tokens = replace(self.objective, loss_mean="tokens", own=False)
        return batch_loss(outputs, batch, over_tokens), batch_loss(
            {"logits": logits_of(outputs)}, batch, over_tokens
        )

    def loss_at(self, point: Point | None, batch: Any) -> torch.Tensor:
        return self.mean_of(self.outputs_at(point, batch), batch)

    def logits_at(self, point: Point, batch: Any, **record: int) -> torch.Tensor:
        """The logits at a point. Raises NotStackable where there are none."""
        return logits_in(self.outputs_at(point, batch, **record))

    def without_loss(self, batch: Any) -> Any:
        """The batch without labels, where the model takes that: its own loss, over a whole stack,
        is not needed.
        """
        if self._needs_labels or not isinstance(batch, dict):
            return batch
        return {key: value for key, value in batch.items() if key != "labels"}

    def outputs_at(self, point: Point | None, batch: Any, **record: int) -> Any:
        with self.at.at(point, **record):
            return self.outputs(batch)


def logits_in(outputs: Any) -> torch.Tensor:
    """The logits among a model's outputs. Raises NotStackable where there are none."""
    logits = logits_of(outputs)
    if logits is None:
        raise NotStackable("the model gives no logits without labels")
    return logits
