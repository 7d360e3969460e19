"""The running size of a run's estimates, by which `"normalize": true` divides a step.

An estimate is sum_k c_k z_k over d elements. Directions are nearly orthogonal, with E|z_k|^2 = d, so
the root mean square of its elements is near r = sqrt(sum_k c_k^2). With s = the root of a running
mean of r^2, a step

    theta <- theta - lr * estimate / s

changes an element by about lr (root mean square), whatever the scale of the loss. The mean is that
of Adam's second moment (Kingma & Ba 2015, arXiv:1412.6980): exponential, with the current step in
it, and corrected for its start at 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

DECAY = 0.99  # of the mean, per step


@dataclass(frozen=True)
class StepScale:
    """State of the scale.

    mean_square: the running mean of r^2, not corrected. num_steps: number of steps in it.
    """

    mean_square: float = 0.0
    num_steps: int = 0

    @property
    def rms(self) -> float:
        """The scale s; 1 where all estimates were 0 and nothing can be divided."""
        corrected = self.mean_square / (1.0 - DECAY**self.num_steps) if self.num_steps else 0.0
        return math.sqrt(corrected) or 1.0


def record_estimate(state: StepScale, coefficients: Iterable[float]) -> StepScale:
    """Add a step's estimate, by the coefficients of its terms.

    >>> record_estimate(StepScale(), [3.0, 4.0]).rms
    5.0
    """
    square = math.fsum(c * c for c in coefficients)
    mean = DECAY * state.mean_square + (1.0 - DECAY) * square
    return StepScale(mean, state.num_steps + 1)
