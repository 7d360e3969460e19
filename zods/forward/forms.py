"""The forms of evaluation: how the losses of a batch at several points are computed.

    sequential   one forward after the other
    stacked      one forward of a stack with the rows of all points
    lockstep     as many forwards as points, which wait for each other at every module

Losses are computed from logits, and logits only where a label follows, if the model can do that and
its own loss is the cross entropy of its logits (`ModelForwards.loss_by`). A stack needs such a loss.
On models that fit the form, all give the same losses up to rounding. How a module runs in each form
is in `zods.forward.module_runners`. `zods.forward.choose_form` chooses a form on the first batch,
and the evaluator uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from zods.core.points import Point
from zods.data.batch import call_model, num_examples, take_rows
from zods.data.labelled_positions import POSITIONS_OF_LOGITS, labelled_part
from zods.forward.model_forwards import ModelForwards, logits_in
from zods.forward.module_runners import LockstepRunner, StackRunner
from zods.forward.stacked import NotStackable
from zods.params.zero3_adapter import stop_nvme_prefetch

# distance of the points at which forms are first compared; weights are commonly that large
CHECK_DISTANCE = 0.02


class PointLosses(NamedTuple):
    """The losses of a batch at points, each of its rows of the batch, float64.

    means: (number of points,). rows: for each point the losses of its rows, which add up to its
    mean times its count (`zods.data.objectives`); None where a form does not compute them.
    """

    means: torch.Tensor
    rows: tuple[torch.Tensor, ...] | None = None


class Form(Protocol):
    """A form of evaluation of one model."""

    name: str

    def prepare(self, batch: Any) -> None:
        """Make the form ready for use on batches like `batch`. All ranks together."""
        ...

    def losses(self, points: Sequence[Point], batch: Any) -> PointLosses:
        """The losses at the points, each of its rows of a batch."""
        ...


class Sequential:
    """One forward after the other."""

    name = "sequential"

    def __init__(self, forwards: ModelForwards) -> None:
        self._forwards = forwards

    def prepare(self, batch: Any) -> None:
        pass

    def losses(self, points: Sequence[Point], batch: Any) -> PointLosses:
        """The losses at the points."""
        return PointLosses(torch.stack([self._forwards.loss_at(point, batch) for point in points]))


class Stacked:
    """One forward of a stack with the rows of all points."""

    name = "stacked"

    def __init__(self, forwards: ModelForwards) -> None:
        self._forwards = forwards
        self._runner = StackRunner(forwards.perturbed)

    @property
    def nested(self) -> set[torch.nn.Module]:
        """Modules that ran inside another one in the last stack, and so once per point."""
        return self._runner.nested

    def prepare(self, batch: Any) -> None:
        self.record(Point(1, CHECK_DISTANCE), batch)

    def record(self, point: Point, batch: Any) -> Any:
        """Outputs of one forward without labels, from which the form learns to split a stack."""
        with self._runner.recording(point, num_examples(batch)):
            return self._forwards.outputs(self._forwards.without_loss(batch))

    def losses(self, points: Sequence[Point], batch: Any) -> PointLosses:
        """The losses at the points.

        Raises NotStackable where the batch or a module cannot be stacked.
        """
        positions = self._forwards.positions(batch)
        all_logits = self.logits(points, batch, positions)
        if positions is not None:
            batch = labelled_part(batch, positions)
        parts = {point.rows: take_rows(batch, point.rows) for point in points}
        losses = [
            self._forwards.losses_of_logits(logits, parts[point.rows])
            for point, logits in zip(points, all_logits, strict=True)
        ]
        rows = tuple(of_rows for _, of_rows in losses if of_rows is not None)
        return PointLosses(
            torch.stack([mean for mean, _ in losses]), rows if len(rows) == len(losses) else None
        )

    def logits(
        self, points: Sequence[Point], batch: Any, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The logits at each point, from one forward of the points' rows of a batch.

        positions: (n,) of the logits, in ascending order; None: all.
        """
        if not isinstance(batch, dict) or "labels" not in batch:
            raise NotStackable("the batch is not a dict with labels")
        size = num_examples(batch)
        rows = [range(size) if point.rows is None else point.rows for point in points]
        stacked = [row for of_point in rows for row in of_point]
        stack = {
            key: _stack(value, stacked, size)
            for key, value in self._forwards.without_loss(batch).items()
        }
        if positions is not None:
            stack[POSITIONS_OF_LOGITS] = positions
        with self._runner.at(points, rows):
            logits = logits_in(self._forwards.outputs(stack))
        if logits.shape[0] != len(stacked):
            raise NotStackable(f"the logits of {len(stacked)} examples have {len(logits)} rows")
        return logits.split([len(of_point) for of_point in rows])


class Lockstep:
    """As many forwards as points, which wait for each other at every module."""

    name = "lockstep"

    def __init__(self, forwards: ModelForwards) -> None:
        self._forwards = forwards
        self._runner = LockstepRunner(forwards.perturbed)

    def prepare(self, batch: Any) -> None:
        stop_nvme_prefetch(self._forwards.deepspeed)

    def losses(self, points: Sequence[Point], batch: Any) -> PointLosses:
        """The losses at the points.

        Raises NotInLockstep where the forwards call different modules.
        """
        forwards = self._forwards
        forwards.into_eval_mode()
        parts = {point.rows: take_rows(batch, point.rows) for point in points}

        def loss(k: int) -> torch.Tensor:
            # DeepSpeed's hooks on the whole model count forwards: they run once, in the first
            # stream
            call = forwards.deepspeed if k == 0 else forwards.module.forward
            return forwards.loss_by(lambda inputs: call_model(call, inputs), parts[points[k].rows])

        return PointLosses(torch.stack(self._runner.run_all(points, loss)))


class Forms:
    """The forms of evaluation of one model."""

    def __init__(self, forwards: ModelForwards) -> None:
        self.sequential = Sequential(forwards)
        self.stacked = Stacked(forwards)
        self.lockstep = Lockstep(forwards)

    def named(self, name: str) -> Form:
        """The form with a name, as the configuration and the log have it."""
        forms: tuple[Form, ...] = (self.sequential, self.stacked, self.lockstep)
        return {form.name: form for form in forms}[name]


def _stack(value: Any, rows: Sequence[int], size: int) -> Any:
    """Take rows, with repetitions, of an entry of a batch of `size` examples; one row serves all
    examples.
    """
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] not in (1, size):
        return value
    return value.expand(size, *value.shape[1:])[torch.tensor(rows, device=value.device)]
