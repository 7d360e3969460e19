"""The weight of the anchor in the steps of MeZO-SVRG, `"anchor_weight": "auto"`.

With the weight w the estimate of a step is

    mean_k (c_k - w a_k) z_k + w g

with c_k and a_k the projected gradients at the parameters and at the anchor, along one direction
z_k, and g the anchor gradient. Its mean is the gradient for any w. The noise of its d-dimensional
directions is d E[(c - w a)^2], which is least for

    w = E[c a] / E[a^2]

the coefficient of a control variate: 1 just after a refresh, and less as the parameters move away
from the anchor. The means are over the directions of earlier steps since the refresh: with its own
c and a, the correction of a step with one direction would be 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zods.core.ordered_sum import ordered_sum

DECAY = 0.9  # of the means, per step


@dataclass(frozen=True)
class AnchorWeight:
    """State of the weight: running sums of c a and of a^2 since the refresh."""

    ca: float = 0.0
    aa: float = 0.0

    @property
    def value(self) -> float:
        """The weight, from 0 to 1; 1 in the first step after a refresh."""
        return min(1.0, max(0.0, self.ca / self.aa)) if self.aa > 0.0 else 1.0


def products(coefficients: Sequence[float], anchor_coefficients: Sequence[float]) -> AnchorWeight:
    """The sums of c a and of a^2 of one step.

    >>> products([2.0, 1.0], [1.0, 1.0])
    AnchorWeight(ca=3.0, aa=2.0)
    """
    pairs = list(zip(coefficients, anchor_coefficients, strict=True))
    return AnchorWeight(ordered_sum(c * a for c, a in pairs), ordered_sum(a * a for _, a in pairs))


def record_products(state: AnchorWeight, step: AnchorWeight) -> AnchorWeight:
    """Add the sums of a step."""
    return AnchorWeight(DECAY * state.ca + step.ca, DECAY * state.aa + step.aa)
