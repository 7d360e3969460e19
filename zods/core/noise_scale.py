"""The noise scale of a run: how much of an estimate's noise a larger batch, more directions or
other refreshes would remove. Pure: no ranks, no configuration, no modules.

Let g be the gradient, and g_i the gradient of example i, with mean g. Along a Gaussian direction z
an example has the projected gradient x_i = z.g_i, and

    N = sigma^2 / |g|^2,    sigma^2 = E[(x_i - z.g)^2],    |g|^2 = E[(z.g)^2]

is the noise scale. It is measured from losses that a step or a refresh evaluates anyway. A group of
m examples shares z. Its examples are known as U units (single examples where their losses are
known, otherwise the parts of micro-batches and ranks), with sums S_u over n_u examples. With
S = sum_u S_u, and P examples from which the m are drawn without replacement,

    E[sum_u S_u^2 / n_u] = (U - m/P) sigma^2 + m |g|^2
    E[S^2 / m]           = (1 - m/P) sigma^2 + m |g|^2

with the variance of P - 1 degrees of freedom. This gives the unbiased estimates

    sigma^2 = (sum_u S_u^2 / n_u - S^2 / m) / (U - 1)
    |g|^2   = (S^2 / m - (1 - m/P) sigma^2) / m

Both are added up over groups, directions and steps, and N is the ratio of the sums: a mean of
ratios would be biased. The relative error of |g|^2 after D directions is about
sqrt(2 / D) (1 + N / m), and N has the same. Nothing is known where no two units share a direction,
as in a step with a direction per example: E[x_i^2] is |g|^2 (1 + N) then, for any N. There the
refreshes of MeZO-SVRG measure N, if their parts have several examples.

The second moment of an estimate (1/G) sum_g (S_g / m) z_g over d parameters is

    E|estimate|^2 = (d / G) |g|^2 (1 + b),    b = N (1/m - 1/P)

up to a part of G / d, which is the gradient itself. The share 1 / (1 + b) would be there without
batch noise: it is direction noise. The share b / (1 + b) is batch noise. An estimate of MeZO-SVRG,
mean_k (c_k - w a_k) z_k + w sum_j a_j z_j, has the second moment d (C + A), with C the sum of the
squared coefficients of its correction, and A = w^2 sum_j a_j^2. The correction is 0 at the anchor
and grows as the parameters move away: C / (C + A) is the share of anchor staleness. The rest is the
noise of the anchor gradient, with m examples to each of its directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from zods.core.ordered_sum import ordered_sum

DECAY = 0.998  # of the sums, per step: N varies slowly, and one step says little of it
TYPICAL = 32.0  # noise scale for which measurements are weighted; 2 to 100 were seen
# Advice is given where it promises at least so much less noise, or so many fewer forwards.
WORTHWHILE = 1.5


@dataclass(frozen=True)
class NoiseScale:
    """Running sums over directions of sigma^2 and |g|^2, in one unit."""

    noise: float = 0.0
    signal: float = 0.0

    @property
    def value(self) -> float | None:
        """N; None where nothing was measured, or where |g|^2 is lost in its noise."""
        return max(0.0, self.noise) / self.signal if self.signal > 0.0 else None


class Spread(NamedTuple):
    """How examples that share directions differ.

    squares: sum over groups, their directions and their units of S_u^2 / n_u. units: sum over
    groups of their units.
    """

    squares: float
    units: int


def measure(
    sums: Sequence[Sequence[float]], sizes: Sequence[int], spread: Spread, population: int | None
) -> NoiseScale:
    """Measure the noise of one step or one refresh.

    sums: for each group, the sum S over its examples along each of its directions. sizes: the
    number of examples of each group. spread: of the same groups, in the same unit. population:
    number of examples from which those of the groups are drawn; None: unlimited. Returns zeros
    where no two units share a direction, or where the sums are too large for float64.

    >>> measure([[4.0]], [2], Spread(squares=10.0, units=2), None)  # the examples 1 and 3
    NoiseScale(noise=2.0, signal=3.0)
    """
    directions = len(sums[0])
    degrees = (spread.units - len(sums)) * directions
    if degrees <= 0:
        return NoiseScale()
    between = ordered_sum(
        s * s / size for of_group, size in zip(sums, sizes, strict=True) for s in of_group
    )
    variance = (spread.squares - between) / degrees
    drawn = ordered_sum(1.0 - _share(size, population) for size in sizes) * directions
    signal = (between - drawn * variance) / (sum(sizes) * directions)
    number = len(sums) * directions
    found = NoiseScale(number * variance, number * signal)
    return found if math.isfinite(found.noise + found.signal) else NoiseScale()


def record_noise(
    state: NoiseScale, found: NoiseScale, *, weight: float = 1.0, decay: float = DECAY
) -> NoiseScale:
    """Add what a step or, with a decay of 1, a refresh has measured."""
    return NoiseScale(
        decay * state.noise + weight * found.noise, decay * state.signal + weight * found.signal
    )


def precision(examples: float, population: int | None) -> float:
    """The weight of a measurement with so many examples per direction.

    It is inverse to the variance of |g|^2 along one direction. The noise scale in it is a constant:
    with the measured one, a first measurement that is too large would reduce the weight of all
    later ones.
    """
    return (1.0 + TYPICAL * (1.0 - _share(examples, population)) / examples) ** -2


@dataclass(frozen=True)
class Staleness:
    """Running sums of C and A, the squared coefficients of corrections and of anchor gradients."""

    correction: float = 0.0
    anchor: float = 0.0

    @property
    def value(self) -> float:
        """The share of anchor staleness; 0 where nothing was measured."""
        total = self.correction + self.anchor
        return self.correction / total if total > 0.0 else 0.0


def record_staleness(state: Staleness, correction: float, anchor: float) -> Staleness:
    """Add the sums of squared coefficients of a step."""
    return Staleness(DECAY * state.correction + correction, DECAY * state.anchor + anchor)


class Shares(NamedTuple):
    """Shares in an estimate's second moment; they add up to 1."""

    direction: float
    batch: float
    staleness: float


def shares(
    noise_scale: float, examples: float, population: int | None, staleness: float = 0.0
) -> Shares:
    """Divide the second moment of an estimate.

    examples: number of examples that share a direction; for MeZO-SVRG, at its refreshes.
    population: as in `measure`.

    >>> shares(noise_scale=8.0, examples=8, population=None, staleness=0.5)
    Shares(direction=0.25, batch=0.25, staleness=0.5)
    """
    batch = noise_scale * (1.0 - _share(examples, population)) / examples
    rest = 1.0 - staleness
    return Shares(rest / (1.0 + batch), rest * batch / (1.0 + batch), staleness)


def advise(noise_scale: float | None, examples: float) -> str:
    """One line of advice for a run of MeZO.

    examples: number of examples that share a direction, m. At the same number of forwards, the
    second moment with a direction per example is (m + N) / (1 + N) times smaller. Where this is
    little, only more examples help.
    """
    if examples > 1 and noise_scale is None:
        return "none: the noise scale is not known"
    gain = 1.0 if noise_scale is None else (examples + noise_scale) / (1.0 + noise_scale)
    if gain >= WORTHWHILE:
        return (
            f"more directions: examples_per_direction 1 has {gain:.1f} times less noise at as many "
            "forwards"
        )
    return "larger batch: a step's noise falls in proportion to train_batch_size"


def advise_svrg(
    staleness: float,
    interval: int,
    refresh_share: float,
    batch: float | None,
    *,
    examples: float = 1.0,
    splits: bool = False,
) -> str:
    """One line of advice for a run of MeZO-SVRG.

    staleness: its share in the second moment. interval: steps between two refreshes, q.
    refresh_share: the share of refreshes in the run's forwards. batch: the share of batch noise;
    None: not known, or refreshes have the whole training set. examples: number of examples of a
    step that share a direction. splits: whether more directions of a refresh would cost no forwards
    and would have more than their own noise to remove.

    The correction grows with the number of steps since the refresh, and a refresh is divided over q
    steps. With noise A + q c and forwards f + r / q per step, the product is least where
    staleness / (1 - staleness) = r / (f q), that is, where the shares are equal. The two ratios are
    proportional to q and to 1 / q, so the best q is q sqrt(r / (f q) (1 - staleness) / staleness).
    """
    if staleness < 1e-6:
        return "fewer refreshes: the anchor does not age"
    if splits:
        return "more directions: a larger anchor_directions costs no forwards"
    odds = refresh_share / (1.0 - refresh_share) * (1.0 - staleness) / staleness
    best = max(1, round(interval * odds**0.5))
    if best * WORTHWHILE <= interval:
        return f"more refreshes: anchor_interval near {best}"
    if best >= WORTHWHILE * interval:
        return f"fewer refreshes: anchor_interval near {best}"
    if batch is not None and 2.0 * batch > 1.0:
        return "larger batch: most noise is that of the examples of refreshes (anchor_examples)"
    if 2.0 * staleness > 1.0 and examples > 1.0:
        return "more directions: most noise is that of the corrections (examples_per_direction 1)"
    if 2.0 * staleness > 1.0:
        return "larger batch: most noise is that of the corrections (train_batch_size)"
    return "more directions: a larger anchor_directions"


def _share(size: float, population: int | None) -> float:
    return 0.0 if population is None else min(1.0, size / population)
