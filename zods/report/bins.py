"""Reduce a series to few bins for plotting, in which spikes remain. Caller: `zods.report.panels`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from zods.cli.plots import Floats, running_mean

MOST_BINS = 400  # more than a panel has room for


class Bins(NamedTuple):
    """Bins of consecutive values, each array with one entry per bin.

    steps: mean step. low, high: the extremes. mean: of the running mean.
    """

    steps: Floats
    low: Floats
    high: Floats
    mean: Floats


def binned(steps: Floats, values: Floats, smooth: bool) -> Bins:
    """Divide a series of any length into at most MOST_BINS bins of nearly equal counts.

    smooth: whether `mean` is of the running mean over the steps, and not of the values.
    """
    if not len(values):
        return Bins(steps, values, values, values)
    starts = np.arange(min(len(values), MOST_BINS)) * len(values) // min(len(values), MOST_BINS)
    counts = np.diff(starts, append=len(values))

    def mean(of: Floats) -> Floats:
        return np.add.reduceat(of, starts) / counts

    return Bins(
        mean(steps),
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
        mean(running_mean(values) if smooth else values),
    )
