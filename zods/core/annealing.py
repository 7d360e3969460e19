"""Annealing of the step sizes: divide them when the mean loss of an epoch has grown.

The state is a function of the losses alone. `record_loss` and `end_epoch` are its transitions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Annealing:
    """State of the annealing.

    divisor: the step sizes are divided by it. previous_mean: mean loss of the previous epoch, None
    in the first. loss_sum, num_losses: of the current epoch.
    """

    divisor: float = 1.0
    previous_mean: float | None = None
    loss_sum: float = 0.0
    num_losses: int = 0


def record_loss(state: Annealing, loss: float) -> Annealing:
    """Add a loss to the current epoch."""
    return replace(state, loss_sum=state.loss_sum + loss, num_losses=state.num_losses + 1)


def end_epoch(state: Annealing, *, alpha: float, threshold: float) -> Annealing:
    """Close an epoch and start the next one.

    The divisor is multiplied by `alpha` if the epoch's mean loss exceeds `threshold` times the
    previous epoch's mean loss. An epoch without losses changes nothing.

    >>> first = end_epoch(record_loss(Annealing(), 1.0), alpha=5.0, threshold=1.05)
    >>> end_epoch(record_loss(first, 2.0), alpha=5.0, threshold=1.05).divisor
    5.0
    """
    if state.num_losses == 0:
        return state
    mean = state.loss_sum / state.num_losses
    worse = state.previous_mean is not None and mean > threshold * state.previous_mean
    return Annealing(divisor=state.divisor * (alpha if worse else 1.0), previous_mean=mean)
