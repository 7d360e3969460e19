"""What an engine shows of its steps: a report of each, and the optimizer that holds the step size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    loss: mean of the losses at theta +- eps z, over the global batch. projected_grad: mean over the directions; None of a
    first-order step. scalar_bytes: sent by this rank. seconds: with the refresh of the anchor and the choice of the sub-batch
    (selection_seconds), where the step began with them.
    """

    step: int
    loss: float
    projected_grad: float | None
    lr: float
    scalar_bytes: int
    seconds: float
    skipped: bool
    selection_seconds: float = 0.0


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """Holds the step size where schedulers look for it. `engine.step()` is what updates the parameters."""

    def __init__(self, params: Sequence[torch.nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("ZerothOrderOptimizer holds the step size only; call engine.step().")
