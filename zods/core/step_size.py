"""The step size that the gradient's noise and the loss's curvature allow, for `"lr": "auto"`.

An estimate is the mean of c_k z_k over K directions, where c_k is the mean projected gradient of E
examples. An example's projected gradient has the mean square s^2, of which the share q is that of
the gradient g, and the rest is noise:

    |g|^2 = q s^2,    noise scale N = 1 / q - 1

The root mean square of the estimate's elements is then t = s sqrt((q + (1 - q) / E) / K). A step
that changes the elements by r (root mean square) changes the loss, in the mean over directions with
E[z z^T] = 1, by

    -r q s^2 / t + r^2 / 2 tr H

with the Hessian H. This is lowest for r* = q s^2 / (t tr H), the best change of a single step.

    tr H    from the mean loss at distance a along directions, whose excess over the loss at the
            parameters is a^2 / 2 z^T H z. The second largest of 8 directions is taken: the mean of
            many is that of a few steep ones, which many small steps follow without harm.
    q       along one direction m examples have U partial sums S_u of n = m / U examples. With
            R = (sum_u S_u)^2 / (U sum_u S_u^2), E[R] is about (1 + N / m) / (1 + N / n). R is at
            most 1 along every direction, so its mean over directions has no outliers. The squares
            themselves have many along directions of rank 1.

Pure: no ranks, no configuration, no modules.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# The noise scale that is assumed lies between these. It is small only until the first steps have
# followed what the examples have in common. A larger one than the second is not told from so few.
NOISE_SCALES = (12.0, 64.0)
NUM_TRIED, ENOUGH = 16, 0.75
MOST_HALVINGS = 16
DIGITS = 2  # of the step size, which is known less well


@dataclass(frozen=True)
class Surroundings:
    """Losses of some examples around the parameters, along some directions.

    trace: tr H, positive. means: for each direction, the mean projected gradient of the examples.
    mean_squares: for each direction, the sum over units of S_u^2 / n, over the number of examples;
    see above; not all 0. units, examples: U and m.
    """

    trace: float
    means: Sequence[float]
    mean_squares: Sequence[float]
    units: int
    examples: int

    @property
    def share(self) -> float:
        """q, a low estimate: less its standard error, and within the noise scales assumed."""
        smallest, largest = (1.0 / (1.0 + scale) for scale in reversed(NOISE_SCALES))
        found = [
            mean**2 / square
            for mean, square in zip(self.means, self.mean_squares, strict=True)
            if square > 0.0
        ]
        if self.units < 2 or len(found) < 2:
            return smallest
        ratio = statistics.mean(found) - statistics.stdev(found) / math.sqrt(len(found))
        of_units = (ratio - 1.0 / self.units) / (1.0 - 1.0 / self.units)
        if of_units <= 0.0:
            return smallest
        scale = self.examples / self.units * (1.0 / of_units - 1.0)
        return min(max(1.0 / (1.0 + scale), smallest), largest)

    @property
    def size(self) -> float:
        """s"""
        n, q = self.examples / self.units, self.share
        return math.sqrt(statistics.mean(self.mean_squares) / (q + (1.0 - q) / n))


def curvature(wanted: float, distance: float, rises: Sequence[float]) -> float:
    """tr H, by the distance at which the loss has risen by `wanted`.

    rises: of the loss at `distance` (at least `wanted`), and before it at the halves of it (less),
    the last two of which are used. Between them the rise is a power of the distance.

    >>> curvature(2.0, 2.0, [0.1, 1.0, 4.0])  # 2 at a distance of sqrt(2)
    2.0
    """
    *halves, there = rises
    if not halves:
        return 2.0 * there / distance**2
    squared, before = distance**2, halves[-1]
    if before > 0.0:
        squared /= (there / wanted) ** (2.0 / math.log2(there / before))
    return 2.0 * wanted / squared


def suggest(around: Surroundings, directions: int, examples: float, *, normalize: bool) -> float:
    """A step size for estimates of `directions` directions with `examples` examples each.

    normalize: whether steps are divided by the size of their estimates.

    >>> around = Surroundings(100.0, means=[0.0] * 9, mean_squares=[65.0] * 9, units=8, examples=8)
    >>> rounded(suggest(around, directions=65, examples=1, normalize=True))  # q is 1 / 65
    0.01
    """
    share, size = around.share, around.size
    of_estimate = size * math.sqrt((share + (1.0 - share) / examples) / directions)
    change = share * size**2 / (of_estimate * around.trace)
    return change if normalize else change / of_estimate


def tried(rise: Callable[[float], float], change: float, tolerance: float) -> float:
    """Find the factor of a step size, 1 or a power of 1/2, with which several steps lower the loss.

    It is halved while the loss rises, and while half of it makes ENOUGH of the fall: a quadratic
    loss falls by 3/4 of the most halfway to its lowest point, so the steps stay below that point.

    change: of a weight in a step, root mean square. NUM_TRIED steps along independent directions
    change a weight by the root of NUM_TRIED times as much, which is tried at once. rise: of the
    loss after a change along an estimate; NaN is a rise. tolerance: a rise or fall that is none,
    because few examples are noisy. Raises RuntimeError where no factor is small enough.

    >>> tried(lambda change: change**2 - change, change=0.5, tolerance=0.0)
    0.125
    """
    before = math.inf
    for halvings in range(MOST_HALVINGS):
        last = rise(change * 0.5**halvings * math.sqrt(NUM_TRIED))
        half_is_enough = last < -tolerance and last <= ENOUGH * before
        if before <= tolerance and not half_is_enough:
            return 0.5 ** (halvings - 1)
        before = last
    raise RuntimeError(
        f'zeroth_order.lr: "auto" cannot be measured: steps that change a weight by {change:.2g} '
        f"raise the loss of other examples, and so do {MOST_HALVINGS - 1} halves of it. Give a number."
    )


def rounded(step_size: float) -> float:
    """A step size with DIGITS digits, which rarely depend on the order of sums."""
    return float(f"{step_size:.{DIGITS}g}")
