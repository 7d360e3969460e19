"""The rule that anneals the step sizes: divide them where an epoch's mean loss has grown.

The state is a function of the losses alone. `record_loss` and `end_epoch` are its transitions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Annealing:
    """Losses of the current epoch, the mean loss of the epoch before, and the divisor of the step
    sizes.
    """

    divisor: float = 1.0
    previous_mean: float | None = None
    loss_sum: float = 0.0
    num_losses: int = 0


def record_loss(state: Annealing, loss: float) -> Annealing:
    return replace(state, loss_sum=state.loss_sum + loss, num_losses=state.num_losses + 1)


def end_epoch(state: Annealing, *, alpha: float, threshold: float) -> Annealing:
    """Close an epoch: divide the step sizes by `alpha` where its mean loss exceeds `threshold`
    times the last one's.
    """
    if state.num_losses == 0:
        return state
    mean = state.loss_sum / state.num_losses
    worse = state.previous_mean is not None and mean > threshold * state.previous_mean
    return Annealing(divisor=state.divisor * (alpha if worse else 1.0), previous_mean=mean)
