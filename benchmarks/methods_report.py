"""Tables and curves of the rows of `methods.py`.

    python benchmarks/methods_report.py FILE.json

prints the tables of a file that `methods.py --json` wrote.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FIRST_ORDER = ("adamw", "lora")


def forwards_per_example(method: str) -> int:
    """The forwards that a step counts for each example of its batch, without a refresh."""
    return 3 if method in FIRST_ORDER else 4 if method.startswith("svrg") else 2


def tables(rows: list[dict[str, Any]]) -> str:
    """The rows at equal numbers of forwards, and without the grids at equal seconds."""
    return f"{equal_forwards(rows)}\n## At equal seconds\n\n{equal_seconds(rows)}"


def equal_forwards(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, with the smallest and largest training loss."""
    lines = [
        [
            *_settings(of_one),
            str(of_one[0]["forwards"]),
            f"{statistics.mean(row['seconds'] for row in of_one):.0f}",
            _spread(of_one, [row["train_loss"] for row in of_one]),
            f"{statistics.mean(row['held_out_loss'] or math.inf for row in of_one):.3f}",
            f"{statistics.mean(row['accuracy'] for row in of_one):.3f}",
        ]
        for of_one in grouped(rows)
    ]
    figures = ("forwards", "seconds", "training loss", "held-out loss", "accuracy")
    return _markdown((*SETTINGS, *figures), lines)


def equal_seconds(rows: list[dict[str, Any]]) -> str:
    """Training losses at the time that the cheapest zeroth-order run of the task takes in all."""
    of_forward = seconds_of_forward(rows)

    def seconds(row: dict[str, Any]) -> float:
        return row["forwards"] * of_forward[row["task"], row["variant"]]

    shown = without_grids(rows)
    budgets: dict[str, float] = {}
    for row in shown:
        if row["method"] not in FIRST_ORDER and not row["diverged"]:
            task = row["task"]
            budgets[task] = min(seconds(row), budgets.get(task, math.inf))
    lines = []
    for of_one in grouped([row for row in shown if row["task"] in budgets]):
        first = of_one[0]
        budget, price = budgets[first["task"]], of_forward[first["task"], first["variant"]]
        losses = [None if row["diverged"] else loss_at(row, budget / price) for row in of_one]
        figures = (f"{1000 * price:.1f}", f"{seconds(first):.0f}", f"{budget:.0f}")
        lines.append([*_settings(of_one), *figures, _spread(of_one, losses)])
    columns = ("ms of a forward", "seconds of the run", "compared at", "training loss then")
    return (
        "A forward takes the time of the fastest median step among the variant's runs, divided by\n"
        "the step's forwards, so that other work on the machine counts little. The losses are\n"
        "interpolated between the points of the curves. A run that ends earlier counts with its\n"
        "last loss; a decay is not at its end in a run that is cut.\n\n"
    ) + _markdown((*SETTINGS, *columns), lines)


def seconds_of_forward(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """The least seconds of a forward by task and variant. A refresh has the price of steps."""
    least: dict[tuple[str, str], float] = {}
    for row in rows:
        key = row["task"], row["variant"]
        found = row["step_seconds"] / (forwards_per_example(row["method"]) * row["batch"])
        least[key] = min(found, least.get(key, math.inf))
    return least


def loss_at(row: dict[str, Any], forwards: float) -> float:
    """The training loss after so many forwards of a run."""
    points = [(point["forwards"], point["train_loss"]) for point in row["curve"]]
    return float(np.interp(forwards, *zip(*points, strict=True)))


def without_grids(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of other kinds than "grid"; all, where there are no others."""
    return [row for row in rows if row["kind"] != "grid"] or rows


def grouped(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows that differ by their seed only."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        lr = "measured" if "lr_measured" in row else row["lr"]
        key = (*(row[name] for name in ("task", "variant", "kind")), lr)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


SETTINGS = ("task", "variant", "kind", "lr", "seeds")


def _settings(of_one: list[dict[str, Any]]) -> list[str]:
    """The cells of a group of rows for SETTINGS."""
    return [
        *(str(of_one[0][key]) for key in ("task", "variant", "kind")),
        " ".join(sorted({f"{row['lr']:g}" for row in of_one if row["lr"] is not None})),
        str(len(of_one)),
    ]


def _spread(of_one: list[dict[str, Any]], losses: Sequence[float | None]) -> str:
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses) or any(row["diverged"] for row in of_one):
        return "diverged"
    return f"{statistics.mean(known):.3f} ({min(known):.3f} to {max(known):.3f})"


def _markdown(columns: Sequence[str], lines: list[list[str]]) -> str:
    return "".join(
        f"| {' | '.join(line)} |\n" for line in [columns, ["---"] * len(columns), *lines]
    )


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Training loss over forwards, a panel per task, the mean over seeds; without the grids."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = without_grids(rows)
    tasks = list(dict.fromkeys(row["task"] for row in shown))
    size = (6 * len(tasks), 4.5)
    figure, axes = plt.subplots(1, len(tasks), figsize=size, layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for of_one in grouped([row for row in shown if row["task"] == task]):
            first = of_one[0]
            curves = zip(*(row["curve"] for row in of_one), strict=False)
            points = [
                (point[0]["forwards"], statistics.mean(seed["train_loss"] for seed in point))
                for point in curves
                if all(seed["train_loss"] is not None for seed in point)
            ]
            label = f"{first['variant']}, {first['kind']}"
            axis.plot(*zip(*points, strict=True), marker=".", label=label)
        axis.set(title=task, xlabel="forwards of one example", ylabel="training loss")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())["rows"]), end="")
