"""The state of a training run beside its tensors, and the state of the step under way.

`TrainState` outlives a step: a checkpoint stores it and a resume restores it. `StepInFlight` does
not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from zods.core.anchor_weight import AnchorWeight
from zods.core.annealing import Annealing
from zods.core.step_scale import StepScale
from zods.forward.loss_sums import PairSums
from zods.training.loss_exchange import ReducedLosses
from zods.training.step_outputs import StepLoss


@dataclass
class TrainState:
    """Counters of a run, and the state of its step sizes.

    global_steps, global_samples, skipped_steps: counters as DeepSpeed's. nonfinite_in_a_row: number
    of steps with a non-finite loss since the last step without one. anchor_step: the step of the
    anchor's last refresh; None where one is due before the next step. annealing: divides the step
    sizes. scale: the running size of the estimates, which divides the steps with "normalize".
    anchor_weight: the weight of the anchor in the next step, where it is measured.
    """

    global_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0
    nonfinite_in_a_row: int = 0
    anchor_step: int | None = None
    annealing: Annealing = field(default_factory=Annealing)
    scale: StepScale = field(default_factory=StepScale)
    anchor_weight: AnchorWeight = field(default_factory=AnchorWeight)


@dataclass
class StepInFlight:
    """The step under way, from its first forward until `step()` has applied it.

    began: time.perf_counter() at its start. bytes_before: bytes that this rank had sent before it.
    sums: for each micro-batch given to `backward`, its losses at pairs of points. pending: the loss
    and the sums of the last forward, not yet given to `backward`; both sums are None where the
    replica does not take part. reduced: the losses of all ranks,
    None before `backward` has reduced them. rechecks: whether the first forward compares the form
    of evaluation with separate forwards. micro_steps: calls of `step()` so far, all before the
    accumulation boundary. left_out: why this replica does not take part in the step; None where it
    does.
    """

    began: float
    bytes_before: int
    sums: list[PairSums | None] = field(default_factory=list)
    pending: tuple[StepLoss, PairSums | None] | None = None
    reduced: ReducedLosses | None = None
    rechecks: bool = False
    micro_steps: int = 0
    left_out: str | None = None
