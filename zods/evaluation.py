"""Losses and outputs of a sharded model on batches, at given points, and in which form its forwards are run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from zods.batch import Inputs, Signature, call_model, num_examples, to_device
from zods.comm import Communicator
from zods.data import WholePass
from zods.deferral import DeferredUpdate
from zods.directions import Direction
from zods.memory import peak_memory
from zods.objectives import IGNORE_INDEX, batch_loss, logits_of, weights_of
from zods.sharding import ShardedParameters, is_sharded, release_gathered, stop_nvme_prefetch
from zods.stacking import NotStackable
from zods.streams import PerturbedForward, Point

logger = logging.getLogger(__name__)

CHECK_DISTANCE = 0.02  # of the points at which forms of evaluation are compared; weights are commonly that large


class Evaluator:
    """Runs a model under DeepSpeed. `micro_batch`: examples per forward and rank of a pass over a whole dataset."""

    def __init__(
        self,
        deepspeed_engine: Any,
        comm: Communicator,
        parameters: ShardedParameters,
        deferred: DeferredUpdate | None,
        *,
        direction: Direction,
        evaluation: str,
        stream_memory_gb: float | None,
        micro_batch: int,
        most_points: int,
        beat: Callable[[], None],
    ) -> None:
        """most_points: that are ever evaluated together. beat: called before each batch of losses, so that it can be told who
        hangs in it."""
        self._most_points, self._beat = most_points, beat
        self._deepspeed = deepspeed_engine
        self._comm = comm
        self._micro_batch = micro_batch
        self._forward_at = PerturbedForward(deepspeed_engine.module, parameters.slices, direction, deferred)
        self._sharded = is_sharded(parameters.slices[0].param)
        self._signature = Signature(deepspeed_engine.module)
        takes = inspect.signature(deepspeed_engine.module.forward).parameters
        self._needs_labels = "labels" in takes and takes["labels"].default is inspect.Parameter.empty
        self._has_cache = "use_cache" in takes  # keys and values for generation, of all layers: a loss needs none
        self._asked = evaluation
        self.evaluation: str | None = None  # how points are evaluated; chosen on the first batch
        self._known: tuple[str, int] | None = None
        self._stream_memory_gb = stream_memory_gb
        self.streams_per_forward = 2

    def adopt(self, known: tuple[str, int] | None) -> None:
        """Evaluate as (form, points per forward) that were chosen before, under the same conditions; None: choose."""
        self._known, self.evaluation = known, None

    def inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any] | Inputs:
        """A batch on the device, as the model's forward is given it; see `zods.batch.Signature.bind`."""
        return to_device(self._signature.bind(*args, **kwargs), self._comm.device)

    def outputs(self, batch: Any) -> Any:
        """The model's outputs for what `inputs` gave, or for a batch that it would take."""
        return call_model(self._deepspeed, self._signature.bind(batch))

    def losses(self, points: Sequence[Point | None], batch: Any) -> torch.Tensor:
        """Mean losses of a batch on the device, (number of points,) in float64; None is the parameters as they are.

        Before the first: does the model give a loss, which modules use which parameters, and does one forward give what
        separate ones do? Raises ValueError where the model gives no loss, or cannot be evaluated as was asked.
        """
        if self._has_cache and isinstance(batch, dict):
            batch = {"use_cache": False, **batch}
        if self.evaluation is None:
            self.evaluation = self._choose(batch)
        at = [point for point in points if point is not None]
        if len(at) < max(len(points), 2):
            return torch.stack([self._loss(point, batch) for point in points])
        losses = self._losses_by[self.evaluation]
        size = self.streams_per_forward
        return torch.cat([losses(self, at[k : k + size], batch) for k in range(0, len(at), size)])

    def _loss(self, point: Point | None, batch: Any) -> torch.Tensor:
        return batch_loss(self._outputs_at(point, batch), batch).double()

    def _losses_one_by_one(self, points: Sequence[Point], batch: Any) -> torch.Tensor:
        return torch.stack([self._loss(point, batch) for point in points])

    def _losses_of_a_stack(self, points: Sequence[Point], batch: Any) -> torch.Tensor:
        logits = self._stacked_logits(points, batch)
        return torch.stack([batch_loss({"logits": part}, batch).double() for part in logits])

    def _losses_in_lockstep(self, points: Sequence[Point], batch: Any) -> torch.Tensor:
        def loss(k: int) -> torch.Tensor:
            # DeepSpeed's hooks on the whole model count forwards: they run once, in the first stream
            call = self._deepspeed if k == 0 else self._deepspeed.module.forward
            return batch_loss(call_model(call, batch), batch).double()

        return torch.stack(self._forward_at.in_lockstep(points, loss))

    _losses_by = {  # noqa: RUF012 (a constant)
        "sequential": _losses_one_by_one,
        "stacked": _losses_of_a_stack,
        "lockstep": _losses_in_lockstep,
    }

    def _stacked_logits(self, points: Sequence[Point], batch: Any) -> tuple[torch.Tensor, ...]:
        """The logits of a batch at each point, from one forward of as many copies of it."""
        if not isinstance(batch, dict) or "labels" not in batch:
            raise NotStackable("the batch is not a dict with labels")
        size = num_examples(batch)
        stack = {key: _stacked(value, len(points), size) for key, value in self._without_loss(batch).items()}
        with self._forward_at.at_all(points, size):
            logits = logits_of(self.outputs(stack))
        if logits is None:
            raise NotStackable("the model gives no logits without labels")
        return logits.chunk(len(points))

    def _without_loss(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch without labels, where the model takes that: its own loss, over a whole stack, is spared."""
        return batch if self._needs_labels else {key: value for key, value in batch.items() if key != "labels"}

    # --- how to evaluate ----------------------------------------------------------------------------------------------

    def _choose(self, batch: Any) -> str:
        """The first of the forms that are asked for which gives what separate forwards give; a word on those that do not."""
        with self._forward_at.observing():
            outputs = self.outputs(batch)
        batch_loss(outputs, batch)
        if self._known is not None:
            form, self.streams_per_forward = self._known
            if form == "lockstep":
                stop_nvme_prefetch(self._deepspeed)
            if form == "stacked":  # which calls carry the batch is told from those of one batch
                self._outputs_at(Point(1, CHECK_DISTANCE), self._without_loss(batch), record=num_examples(batch))
            return form
        if self._asked == "sequential":
            return self._asked
        del outputs
        wanted = ("stacked", "lockstep") if self._asked == "auto" else (self._asked,)
        for form in wanted:
            reason = self._misfit(form, batch)
            if reason is None:
                return form
            if self._asked != "auto":
                raise ValueError(f'zeroth_order.evaluation: "{form}" does not fit this model: {reason}. Use "auto".')
            logger.warning("evaluation: %s does not fit this model: %s", form, reason)
        return "sequential"

    def _misfit(self, form: str, batch: Any) -> str | None:
        """Why `form` does not give what separate forwards do, or None. The same on all ranks.

        Far from the parameters, so that what one point gives is nothing like what the other does.
        """
        if form == "lockstep":
            stop_nvme_prefetch(self._deepspeed)
        points = [Point(seed, CHECK_DISTANCE) for seed in (1, 2)]
        self._forward_at.stacking.forget()
        alone = self._without_loss(batch) if form == "stacked" and isinstance(batch, dict) else batch
        separate = [self._outputs_at(point, batch) for point in points]
        losses = torch.stack([batch_loss(outputs, batch).double() for outputs in separate])
        try:
            with peak_memory(self._comm.device) as of_one:
                self._outputs_at(points[0], alone, record=num_examples(batch))
            self._forward_at.nested.clear()
            copies = self._forward_at.scratch_bytes
            with peak_memory(self._comm.device) as of_two:
                evaluate = self._stacked_logits if form == "stacked" else self._losses_in_lockstep
                found = list(evaluate(points, batch))
            if form == "stacked":
                reason = self._stack_misfit(found, points, batch, separate, losses)
            else:
                same = torch.allclose(torch.stack(found), losses, rtol=1e-6, atol=0.0, equal_nan=True)
                reason = None if same else "its losses differ from those of separate forwards"
            copies = self._forward_at.scratch_bytes - copies  # which more points do not make larger
            needed = of_two.bytes - of_one.bytes - copies
        except Exception as error:  # whatever a model does in a form that it was not written for
            reason = f"{type(error).__name__}: {error}"
            release_gathered(self._deepspeed)
            needed = 0
        (failures,) = self._comm.sum_over_ranks([float(reason is not None)])
        if reason is None and not failures:
            self.streams_per_forward = self._fitting(needed * self._micro_batch / num_examples(batch))
        return reason or ("it fails on another rank" if failures else None)

    def _fitting(self, needed: float) -> int:
        """How many points of so many bytes fit one forward: whole pairs, the same on all ranks.

        Raises ValueError where a budget was given and not even a pair fits it.
        """
        given, shared_by = self._stream_memory_gb, self._comm.world_size if self._comm.device.type == "cpu" else 1
        free = get_accelerator().available_memory() / 2 / shared_by
        rows = self._comm.gather_scalars([needed, free if given is None else given * 2**30])
        needed, budget = max(row[0] for row in rows), min(row[1] for row in rows)
        if given is not None and budget < 2 * needed:
            raise ValueError(
                f"zeroth_order.stream_memory_gb: found {given}, but a pair of points takes {2 * needed / 2**30:.3g} GiB "
                f"with micro-batches of {self._micro_batch}. Give that much, a smaller micro-batch, or evaluation: sequential."
            )
        return 2 * min(max(1, int(budget / max(2 * needed, 1.0))), self._most_points // 2)

    def _outputs_at(self, point: Point | None, batch: Any, **record: int) -> Any:
        with self._forward_at.at(point, **record):
            return self.outputs(batch)

    def _stack_misfit(
        self,
        stacked: Sequence[torch.Tensor],
        points: list[Point],
        batch: dict[str, Any],
        separate: list[Any],
        losses: torch.Tensor,
    ) -> str | None:
        nested = sorted({type(module).__name__ for module in self._forward_at.nested})
        if nested and self._sharded and self._asked == "auto":
            return (
                f"{', '.join(nested)} would be gathered once per point, as a part of a module with its own parameters"
            )
        logits = [found for outputs in separate if (found := logits_of(outputs)) is not None]
        if len(logits) < len(separate):
            return "the model gives no logits"
        holed = _with_padding(batch)
        on_holed = self._outputs_at(points[0], holed)
        expected = torch.cat([losses, batch_loss(on_holed, holed).double()[None]])
        from_logits = [batch_loss({"logits": part}, batch).double() for part in logits]
        from_logits.append(batch_loss({"logits": logits_of(on_holed)}, holed).double())
        if not torch.allclose(torch.stack(from_logits), expected, rtol=1e-5, atol=1e-6, equal_nan=True):
            return "its loss is not the cross entropy of its logits"
        apart = (logits[0].float() - logits[1].float()).norm()
        size = logits[0].float().norm()
        tolerance = 1e-4 * apart + 1e-5 * size if logits[0].dtype == torch.float32 else 0.05 * apart + 0.01 * size
        errors = [(a.float() - b.float()).norm() for a, b in zip(stacked, logits, strict=True)]
        if all(bool(error <= tolerance) for error in errors):
            return None
        return f"its logits are {max(map(float, errors)) / float(size):.1e} off those of separate forwards (relative)"

    def loss_sums(self, points: Sequence[Point | None], batch: Any) -> torch.Tensor:
        """Losses times the number of examples, or their weight, then that: (number of points + 1,) in float64."""
        self._beat()
        losses = self.losses(points, batch)
        weights = weights_of(batch)
        size = num_examples(batch) if weights is None else float(weights.sum())
        return torch.cat([losses * size, losses.new_tensor([size])])

    def whole_set_losses(
        self,
        points: Sequence[Point],
        dataset: Any,
        collate_fn: Callable | None,
        *,
        title: str,
        micro_batch: int,
        share: tuple[int, int],
        total: Callable[[Sequence[float]], Sequence[float]],
    ) -> list[float]:
        """Mean losses over a whole dataset, each micro-batch weighted by its examples.

        share: this rank's place among so many that share the dataset, in micro-batches of one size. total: sums over those.
        """
        rounds = WholePass(dataset, micro_batch, *share, collate_fn)
        sums = torch.zeros(len(points) + 1, dtype=torch.float64, device=self._comm.device)
        for batch, counted in tqdm(rounds, desc=title, leave=False, disable=self._comm.rank != 0):
            found = self.loss_sums(points, self.inputs(batch))
            if counted:
                sums += found
        *totals, count = total(sums.tolist())
        return [of_point / count for of_point in totals]

    def mean_loss(self, batches: Iterator[Any]) -> float:
        """Mean loss at the parameters over `batches` and all ranks; the same number of batches on every rank."""
        sums = torch.stack([self.loss_sums([None], self.inputs(batch)) for batch in batches]).sum(0)
        total, count = self._comm.sum_over_ranks(sums.tolist())
        return total / count


def _stacked(value: Any, num_points: int, size: int) -> Any:
    """An entry of a batch of `size` examples, for each point; one row serves all examples."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] not in (1, size):
        return value
    return value.expand(size, *value.shape[1:]).repeat(num_points, *[1] * (value.ndim - 1))


def _with_padding(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with the third quarter of its first example unlabelled and the last one masked, where these go by token.

    A loss of its own may show only there.
    """
    changed = dict(batch)
    for key, value, quarters in (("labels", IGNORE_INDEX, (2, 3)), ("attention_mask", 0, (3, 4))):
        entry = batch.get(key)
        if isinstance(entry, torch.Tensor) and entry.ndim == 2:
            start, stop = (entry.shape[1] * quarter // 4 for quarter in quarters)
            changed[key] = entry.clone()
            changed[key][0, start:stop] = value
    return changed
