"""Forwards of a model under DeepSpeed: its outputs, logits and losses at one point, and its
objective.

The forms of evaluation in `zods.forward.forms` are built on them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
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
    accepted_arguments,
    call_model,
    num_examples,
    take_rows,
    to_device,
    without_weights,
)
from zods.data.labelled_positions import (
    POSITIONS_OF_LOGITS,
    labelled_part,
    positions_before_labels,
)
from zods.data.loss_probes import fits_cross_entropy, shift_probes
from zods.data.objectives import (
    Objective,
    batch_loss,
    logits_of,
    losses_of_logits,
    needs_row_losses,
    own_loss,
    refusal_of_examples,
    scored_losses,
    weights_of,
)
from zods.data.scores import SCORES
from zods.forward.fused_norms import Compute
from zods.forward.labelled_logits import LogitsTrial
from zods.forward.module_runners import PointRunner
from zods.forward.perturbed_modules import PerturbedModules
from zods.forward.stacked import NotStackable
from zods.params.deferred_update import DeferredUpdate
from zods.params.shards import ShardedParameters
from zods.params.zero3_adapter import is_sharded


class ModelForwards:
    """The outputs, logits and losses of a model at a point.

    Every method that runs the model puts it into eval mode first.

    perturbed: the model's wrapped modules. objective: how a loss is computed from outputs.
    arguments: names of the arguments that the model takes. from_logits: whether losses are computed
    from the logits of forwards without labels; takes_positions: whether such a forward computes
    logits at given positions alone; see `find_logits`. on_forward: called before each forward.
    """

    def __init__(
        self,
        deepspeed_engine: Any,
        comm: Communicator,
        parameters: ShardedParameters,
        deferred: DeferredUpdate | None,
        direction: Direction,
        loss_mean: str,
        fused: Mapping[torch.nn.Module, Compute],
        on_forward: Callable[[], Any],
        scores: bool = False,
    ) -> None:
        """loss_mean: whether a batch's loss is a mean over "tokens" or over "examples". fused:
        functions that compute modules, see `zods.forward.fused_norms`. scores: whether scores of
        examples take the place of losses, once a form of evaluation is chosen. Until then the loss
        is a mean over tokens, which every model gives.
        """
        self.deepspeed, self.module = deepspeed_engine, deepspeed_engine.module
        self.comm = comm
        first = parameters.shards[0]
        self.is_sharded, self.dtype = is_sharded(first.param), first.dtype
        self.perturbed = PerturbedModules(
            self.module, parameters.shards, direction, deferred, fused
        )
        self._point_runner = PointRunner(self.perturbed)
        # `find_objective` finds on the first batch how the model aligns its labels
        self.objective, self.scores = Objective("tokens" if scores else loss_mean), scores
        self.on_forward = on_forward
        self._modules = list(self.module.modules())
        self._signature = Signature(self.module)
        takes = inspect.signature(self.module.forward).parameters
        self._needs_labels = (
            "labels" in takes and takes["labels"].default is inspect.Parameter.empty
        )
        self.arguments = accepted_arguments(self.module)
        self.from_logits = self.takes_positions = False

    def inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any] | Inputs:
        """Return a batch on the device, in the form in which the model's forward takes it; see
        `zods.data.batch.Signature.bind`.
        """
        return to_device(self._signature.bind(*args, **kwargs), self.comm.device)

    def without_cache(self, batch: Any) -> Any:
        """Return the batch with the cache for generation switched off, if the model has one."""
        has_cache = "use_cache" in self.arguments
        return {"use_cache": False, **batch} if has_cache and isinstance(batch, dict) else batch

    def outputs(self, batch: Any) -> Any:
        """Return the model's outputs for a result of `inputs`, or for a batch that it accepts."""
        self.into_eval_mode()
        self.on_forward()
        return call_model(self.deepspeed, self._signature.bind(batch))

    def into_eval_mode(self) -> None:
        """Put the model into eval mode.

        Dropout has to be off, because both losses of a pair need the same function.
        """
        for module in self._modules:
            module.training = False

    def mean_of(self, outputs: Any, batch: Any) -> torch.Tensor:
        """Return the mean loss of outputs under the objective."""
        return batch_loss(outputs, batch, self.objective)

    def losses_of_logits(
        self, logits: torch.Tensor, batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the mean loss of logits under the objective, and the losses of the rows; None in
        place of these for a batch with weights.
        """
        if self.objective.score is not None:
            return scored_losses({"logits": logits}, batch, self.objective)
        if weights_of(batch) is not None:
            return self.mean_of({"logits": logits}, batch), None
        return losses_of_logits(logits, batch["labels"], self.objective)

    def find_objective(self, outputs: Any, batch: Any) -> None:
        """Find how the model's labels are aligned, and whether its loss is the cross entropy of its
        logits.

        Collective, with the same result on all ranks. If the loss fits both alignments or neither,
        the labels count as shifted if the loss does not depend on the first label of each row.
        Raises ValueError on all ranks if a mean over examples is wanted, and the loss cannot be
        separated by example.
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
        """Use the loss that the model returns from now on, not the cross entropy of its logits.

        Collective. Raises ValueError on all ranks if a mean over examples is wanted, because the
        model's loss cannot be separated by example. With scores its loss is not used.
        """
        self.objective, self.from_logits = replace(self.objective, own=True), False
        if self.scores:
            return
        if isinstance(batch, dict) and WEIGHTS in batch:
            raise ValueError(
                "the model's own loss is not the cross entropy of its logits, of which the losses "
                "of single examples are made. Losses of another kind can be neither selected by "
                "nor weighted."
            )
        size = num_examples(batch) if needs_row_losses(batch, self.objective) else 0
        largest = self.comm.max_over_ranks(size)
        if largest:
            raise ValueError(refusal_of_examples(int(largest)))

    def find_logits(self, outputs: Any, batch: Any) -> None:
        """Find whether the model gives its logits without labels, and at given positions alone.

        The model's own loss over all logits is not computed then. In 16 bits it would take five
        times their memory. Collective, with the same result on all ranks. outputs: of a batch with
        labels, of whose logits the model's loss is the cross entropy.
        """
        self.from_logits = self.takes_positions = False
        whole, inputs = logits_of(outputs), self.without_loss(batch)
        if whole is None or "labels" in inputs:
            return
        trial = LogitsTrial(self.deepspeed, self.comm)
        self.takes_positions = trial.takes_positions(whole, self.outputs, inputs)
        self.from_logits = self.takes_positions or trial.gives(whole, self.outputs, inputs)

    def positions(self, batch: Any) -> torch.Tensor | None:
        """The positions (n,) of the logits that the loss of a batch needs; None for all.

        A user's score may read other logits and entries of the batch.
        """
        objective = self.objective
        reads_labelled = objective.score in (None, *SCORES.values())
        if not self.takes_positions or not objective.shifted or not reads_labelled:
            return None
        return positions_before_labels(batch["labels"])

    def own_and_logits_loss(self, outputs: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss that the model returned, and the loss computed from its logits.

        Raises ValueError if the shapes of logits and labels fit no cross entropy.
        """
        batch = without_weights(batch)  # a weighted loss is always computed from the logits
        over_tokens = replace(self.objective, loss_mean="tokens", own=False, score=None)
        return batch_loss(outputs, batch, over_tokens), batch_loss(
            {"logits": logits_of(outputs)}, batch, over_tokens
        )

    def rounding_of_loss(self, outputs: Any, count: float) -> float:
        """Return the difference that rounding may make between losses of two forwards.

        count: number of labels that the loss is the mean over. In bfloat16, logits near 20 make a
        difference of 0.3 for one label.
        """
        largest = logits_in(outputs).amax(-1).abs()
        largest = largest[largest.isfinite()]
        if not largest.numel():
            return 0.0
        return 2.0 * torch.finfo(self.dtype).eps * float(largest.max()) / math.sqrt(count)

    def loss_at(self, point: Point | None, batch: Any) -> torch.Tensor:
        """Return the mean loss of a point's rows; None: of all, at the parameters as they are."""
        part = take_rows(batch, None if point is None else point.rows)
        return self.loss_by(lambda inputs: self.outputs_at(point, inputs), part)

    def loss_by(self, forward: Callable[[Any], Any], batch: Any) -> torch.Tensor:
        """Return the mean loss of a batch. forward: maps the inputs of the model to its outputs."""
        has_labels = isinstance(batch, dict) and isinstance(batch.get("labels"), torch.Tensor)
        if not self.from_logits or not has_labels:
            return self.mean_of(forward(batch), batch)
        inputs, positions = self.without_loss(batch), self.positions(batch)
        if positions is not None:
            inputs = {**inputs, POSITIONS_OF_LOGITS: positions}
            batch = labelled_part(batch, positions)
        return self.losses_of_logits(logits_in(forward(inputs)), batch)[0]

    def logits_at(self, point: Point, batch: Any) -> torch.Tensor:
        """Return the logits at a point. Raises NotStackable if the outputs have none."""
        return logits_in(self.outputs_at(point, batch))

    def without_loss(self, batch: Any) -> Any:
        """Return the batch without labels, unless the model's forward requires them.

        The model's own loss over a whole stack would be of no use.
        """
        if self._needs_labels or not isinstance(batch, dict):
            return batch
        return {key: value for key, value in batch.items() if key != "labels"}

    def outputs_at(self, point: Point | None, batch: Any) -> Any:
        """Return the model's outputs at a point; None: at the parameters as they are."""
        with self._point_runner.at(point):
            return self.outputs(batch)


def logits_in(outputs: Any) -> torch.Tensor:
    """Return the logits among a model's outputs. Raises NotStackable if there are none."""
    logits = logits_of(outputs)
    if logits is None:
        raise NotStackable("the model gives no logits without labels")
    return logits
