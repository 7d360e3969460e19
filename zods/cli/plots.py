"""Plot a run: `python -m zods.cli.plots RUN_FOLDER` draws curves.png from metrics.jsonl."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from zods.cli.run_folder import read_metrics
from zods.files import atomic_write


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
    left.plot(
        *_series(train, "loss"),
        color="tab:blue",
        alpha=0.25,
        linewidth=0.8,
        label="training, per step",
    )
    left.plot(*_smoothed(train, "loss"), color="tab:blue", label="training, mean of 20 steps")
    left.plot(*_series(held_out, "loss"), color="tab:orange", marker="o", label="held out")
    left.set(xlabel="step", ylabel="loss")
    right.plot(*_series(held_out, "accuracy"), color="tab:green", marker="o", label="held out")
    right.set(xlabel="step", ylabel="accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    path = Path(folder) / "curves.png"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    return path


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The steps and values of a metric, of the records that have it as a number."""
    kept = [r for r in records if isinstance(r.get(key), (int, float))]
    return [r["step"] for r in kept], [r[key] for r in kept]


def _smoothed(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The running mean of 20 values, and of fewer values at the start."""
    steps, values = _series(records, key)
    spans = [values[max(0, i - 19) : i + 1] for i in range(len(values))]
    return steps, [sum(span) / len(span) for span in spans]


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
