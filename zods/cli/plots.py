"""Plot a run: `python -m zods.cli.plots RUN_FOLDER` draws curves.png from metrics.jsonl."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zods.cli.run_folder import read_metrics
from zods.files import atomic_write

Floats = npt.NDArray[np.float64]
WINDOW = 20  # steps
LARGEST = 1e300  # a damaged file may hold any number; not-a-number is no larger and no smaller


def plot_curves(folder: str | Path) -> Path:
    """Plot training loss, held-out loss and held-out accuracy over the steps.

    Returns the path of the PNG. Needs matplotlib (the extra `report`).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = list(read_metrics(folder))
    train = [r for r in records if r["kind"] == "train"]
    held_out = [r for r in records if r["kind"] == "eval"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps, losses = series(train, "loss")
    left.plot(
        steps,
        losses,
        color="tab:blue",
        alpha=0.25,
        linewidth=0.8,
        label="training, per step",
    )
    smoothed = running_mean(losses)
    left.plot(steps, smoothed, color="tab:blue", label=f"training, mean of {WINDOW} steps")
    left.plot(*series(held_out, "loss"), color="tab:orange", marker="o", label="held out")
    left.set(xlabel="step", ylabel="loss")
    right.plot(*series(held_out, "accuracy"), color="tab:green", marker="o", label="held out")
    right.set(xlabel="step", ylabel="accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    path = Path(folder) / "curves.png"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    return path


def series(records: Iterable[Mapping[str, Any]], key: str) -> tuple[Floats, Floats]:
    """The steps and values of a metric, of the records that have it as a finite number."""
    found = [(record["step"], record.get(key)) for record in records]
    kept = [
        (step, value)
        for step, value in found
        if isinstance(value, (int, float))
        if not isinstance(value, bool) and -LARGEST < value < LARGEST
    ]
    steps, values = np.array(kept, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def running_mean(values: Floats) -> Floats:
    """The mean of each value and of up to 19 before it."""
    if not len(values):
        return values
    # Each window is summed by itself: a spike would stay in differences of one cumulative sum.
    sums = np.convolve(values, np.ones(WINDOW))[: len(values)]
    return sums / np.minimum(np.arange(1, len(values) + 1), WINDOW)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="a run's folder, with metrics.jsonl")
    folder = parser.parse_args(argv).folder
    try:
        print(plot_curves(folder))
    except (ValueError, OSError) as error:
        print(f"zods.cli.plots: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
