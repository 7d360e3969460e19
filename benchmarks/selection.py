"""Measure the selector's speed, scaling and quality, and its effect on training.

    python benchmarks/selection.py [--part NAME]

speed     The time from features to ids: n / 10 of n candidates are chosen by facility location (64
          features, Euclidean), by zods, apricot-select and submodlib-py. `objective` is that of the
          chosen ids. It is recomputed in the same way for all libraries.
scaling   k = 1,000 of up to 100,000 candidates on 1 and 2 ranks under the real launcher: seconds,
          peak memory of a rank, bytes sent.
quality   On a 12-block decoder of width 192 after 60 steps on the data. `agreement` compares the
          examples that features choose with the examples that whole gradients of the same matrix
          choose: 0 is chance, 1 the same examples. `relative_error` is that of the mean gradient
          of the chosen examples, over the whole model. Costs are in forwards with their loss.
          `total_forwards` is the whole time of the features. `cost_forwards` leaves out the blocks
          before the last, which run once for any features.
mixture   Synthetic gradients of six sources: `relative_error` of the mean gradient of 64 chosen of
          128, by random, facility location and mean matching. Mean over ten mixtures.
training  Step time and peak memory of AdamW on 128 examples, and on 64 chosen of 128. Held-out loss
          over steps, over examples passed through the model, and over seconds, for three seeds.
recipes   Where selection pays: AdamW on examples with 40% of their responses permuted (32 of 128
          chosen), with a rare target (8 of 160), with nine near-copies in ten, and clean. Every
          arm trains for --seconds, selection included, and is judged by clean held-out loss. With
          the defaults it takes about 20 minutes. A table is printed to stderr.

The part speed needs the extra `benchmark`. quality, training and recipes use --data, JSON lines with source,
instruction and output. Without --data they use prose of Python's own manual. The last line of the
output is one JSON object. --output writes BASE.json, and pictures beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import add_smoke_option, machine
from selection_mixture import mixture
from selection_models import Row
from selection_quality import quality
from selection_recipes import ARMS, RECIPES, recipes
from selection_speed import scaling, speed
from selection_training import training

from zods.comm.process import end_process

PARTS = ("speed", "scaling", "quality", "mixture", "training", "recipes")


def pictures(rows: list[Row], base: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure: Any, name: str) -> None:
        figure.savefig(base.with_name(f"{base.name}_{name}.png"), dpi=120)
        plt.close(figure)

    timed = [row for row in rows if row["part"] == "speed"]
    if timed:
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for library in dict.fromkeys(row["library"] for row in timed):
            of_library = [row for row in timed if row["library"] == library]
            axes.loglog(
                [r["n"] for r in of_library],
                [r["seconds"] for r in of_library],
                marker="o",
                label=library,
            )
        axes.set(xlabel="candidates", ylabel="seconds, n / 10 chosen")
        axes.legend()
        axes.grid(alpha=0.3)
        save(figure, "speed")
    judged = [row for row in rows if row["part"] == "quality" and row["total_forwards"] > 0]
    if judged:
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for kind in dict.fromkeys(row["features"] for row in judged):
            of_kind = [row for row in judged if row["features"] == kind]
            axes.semilogx(
                [r["total_forwards"] for r in of_kind],
                [r["agreement"] for r in of_kind],
                marker="o",
                label=kind,
            )
            for r in of_kind:
                axes.annotate(f"m={r['m']}", (r["total_forwards"], r["agreement"]), fontsize=7)
        axes.set(
            xlabel="cost in forwards over the candidates, prefix included",
            ylabel="agreement with whole gradients",
        )
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
        save(figure, "quality")
    trained = [row for row in rows if row.get("what") == "curve"]
    if trained:
        figure, panels = plt.subplots(1, 3, figsize=(14, 4), layout="constrained", sharey=True)
        for panel, key, label in zip(
            panels,
            ("step", "passes", "seconds"),
            ("step", "examples forward", "seconds"),
            strict=True,
        ):
            for method in dict.fromkeys(row["method"] for row in trained):
                of_method = [row["curve"] for row in trained if row["method"] == method]
                x = [
                    statistics.mean(c[i][key] for c in of_method) for i in range(len(of_method[0]))
                ]
                y = torch.tensor([[point["loss"] for point in c] for c in of_method])
                panel.plot(x, y.mean(0), marker=".", label=method)
                panel.fill_between(x, y.min(0).values, y.max(0).values, alpha=0.15)
            panel.set(xlabel=label, ylabel="held-out loss" if key == "step" else None)
            panel.grid(alpha=0.3)
        panels[0].legend(fontsize=8)
        save(figure, "training")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, help="default: all")
    parser.add_argument("--data", type=Path, help="default: Python's manual")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--batches", type=int, default=3, help="candidate batches of the part quality"
    )
    parser.add_argument("--steps", type=int, default=40, help="of a training curve")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a training of recipes")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="of recipes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="BASE", help="write BASE.json and pictures")
    add_smoke_option(parser)
    arguments = parser.parse_args()
    smoke = arguments.smoke
    if smoke:
        arguments.rounds = arguments.batches = arguments.steps = arguments.seeds = 1
    wanted = (arguments.part,) if arguments.part else PARTS
    parts: dict[str, Callable[[], list[Row]]] = {
        "speed": lambda: speed(arguments.rounds, (128,) if smoke else (128, 1000, 8000)),
        "scaling": lambda: (
            scaling((128,), (2,)) if smoke else scaling((1000, 8000, 100_000), (1, 2))
        ),
        "quality": lambda: quality(arguments.data, arguments.batches, smoke),
        "mixture": lambda: mixture(1 if smoke else 10),
        "training": lambda: training(
            arguments.data, arguments.steps, arguments.seeds, arguments.rounds, smoke
        ),
        "recipes": lambda: recipes(
            arguments.data,
            arguments.seconds,
            arguments.seeds,
            smoke,
            arguments.recipes,
            arguments.arms,
        ),
    }
    rows = [row for part in wanted for row in parts[part]()]
    report = {
        "benchmark": "selection",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "rows": rows,
    }
    if arguments.output is not None:
        arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        pictures(rows, arguments.output)
    print(json.dumps(report), flush=True)
    if {"quality", "training", "recipes"} & set(wanted):  # these parts start a process group
        end_process(0)


if __name__ == "__main__":
    main()
