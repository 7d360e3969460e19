"""Annealing of the step sizes: divide them when the mean loss has grown.

There are two rules. `end_epoch` compares epochs, as the configuration says. `back_off` compares
windows of steps, where the step size is measured and no other rule is given. The state is a
function of the losses alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

WINDOW = 20  # steps
ERRORS = 4.0  # a rise is so many standard errors of the difference of two windows' means
RISING = 3  # windows in a row: in a long run noise alone makes single ones
BACKOFF = 2.0


@dataclass(frozen=True)
class Annealing:
    """State of the annealing.

    divisor: the step sizes are divided by it. previous_mean: mean loss of the epoch or window that
    the current one is compared with, None in the first. previous_variance: of this mean, for
    windows. loss_sum, square_sum, num_losses: of the current epoch or window. rising: the number of
    windows in a row whose loss has risen.
    """

    divisor: float = 1.0
    previous_mean: float | None = None
    loss_sum: float = 0.0
    num_losses: int = 0
    previous_variance: float = 0.0
    square_sum: float = 0.0
    rising: int = 0


def record_loss(state: Annealing, loss: float) -> Annealing:
    """Add a loss to the current epoch or window."""
    return replace(
        state,
        loss_sum=state.loss_sum + loss,
        num_losses=state.num_losses + 1,
        square_sum=state.square_sum + loss * loss,
    )


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


def back_off(state: Annealing) -> Annealing:
    """Close a window of WINDOW steps, if it is full, and start the next one.

    The divisor is multiplied by BACKOFF if the mean losses of RISING windows in a row exceed the
    lowest one since the last division by ERRORS standard errors. A single step with a high loss
    raises the standard error with the mean.

    >>> state = Annealing()
    >>> for loss in [1.0, 1.1] * 10 + [0.5, 0.6] * 10 + [0.7, 0.8] * 30:
    ...     state = back_off(record_loss(state, loss))
    >>> state.divisor, round(state.previous_mean, 2)
    (2.0, 0.75)
    """
    n = state.num_losses
    if n < WINDOW:
        return state
    mean = state.loss_sum / n
    variance = max(0.0, state.square_sum / n - mean * mean) / (n - 1)
    rises = False
    if state.previous_mean is not None:
        error = math.sqrt(variance + state.previous_variance)
        rises = mean - state.previous_mean > ERRORS * error
    rising = state.rising + 1 if rises else 0
    divides = rising == RISING
    if not divides and state.previous_mean is not None and mean >= state.previous_mean:
        mean, variance = state.previous_mean, state.previous_variance
    return Annealing(
        state.divisor * (BACKOFF if divides else 1.0),
        previous_mean=mean,
        previous_variance=variance,
        rising=0 if divides else rising,
    )


def compare_anew(state: Annealing) -> Annealing:
    """Forget the losses so far, because those that follow are of other batches."""
    return Annealing(state.divisor)
