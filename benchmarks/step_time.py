"""Measure the time of a step over the time of the bare forwards that it needs.

    python benchmarks/step_time.py [--quick] [--output FILE.json]

floor      The bare forwards of the same model on the same batch, in the same process, before each
           step.
published  MeZO's procedure (Malladi et al. 2023, algorithm 1), written from its description: +eps,
           -2 eps, +eps and the update, each an in-place pass with torch.normal.
stack      Not a step, but one bare forward over the doubled batch: the gain or loss that a stacked
           batch has on this machine.

A ratio is the median over rounds of step / floor of the same round. The first steps of an engine are
not timed, because they choose and check the form of evaluation. "feeding" is the share of a
step's time that is spent in the loader (`feeding_share.py`). Rows are printed on stderr as
they are measured. The last line of the output is one JSON object. --quick measures only the rows of
the README's table. --output writes the object, a table (.md) and a plot (.png). `zero3_step.py`
measures several ranks, and the bytes that a step moves.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import add_smoke_option, machine, opt_125m, single_rank_engine, tiny_opt, token_batch
from feeding_share import rows_of as feeding_rows
from kernel_speed import measure as measure_kernels

from zods.core.estimators import Term, Update
from zods.planning.calibration import WARM_UP


class Case(NamedTuple):
    """One row of the table.

    method: mezo, mezo_svrg, published or stack.
    num_layers: of OPT-125M's shape; 0: the tiny model.
    anchor_age: for mezo_svrg, the number of updates since the refresh. An anchor point that is kept
        as terms takes these updates back.
    adapted_layers: number of last layers with LoRA adapters, which alone are trained; 0: the whole
        model is. The floor is the same forwards of the whole model.
    """

    method: str = "mezo"
    direction: str = "gaussian"
    dtype: str = "float32"
    evaluation: str = "auto"
    num_directions: int = 1
    examples_per_direction: int | str = "all"
    batch_size: int = 8
    num_layers: int = 12
    anchor_age: int = 0
    adapted_layers: int = 0

    @property
    def num_forwards(self) -> int:
        return (4 if self.method == "mezo_svrg" else 2) * self.num_directions


def smoke_cases() -> Iterator[Case]:
    """Each method and each direction, once."""
    yield Case(method="stack", direction="", num_layers=0)
    yield Case(method="published", num_layers=0)
    yield Case(direction="rademacher", dtype="bfloat16", num_layers=0)
    yield Case(method="mezo_svrg", direction="low_rank", num_layers=0, anchor_age=WARM_UP + 2)
    yield Case(direction="low_rank", num_layers=0, examples_per_direction=1)
    yield Case(direction="low_rank", num_layers=0, num_directions=2, adapted_layers=1)


def quick_cases() -> Iterator[Case]:
    for dtype in ("float32", "bfloat16"):
        yield Case(method="stack", direction="", dtype=dtype)
        for direction in ("rademacher", "gaussian", "low_rank"):
            yield Case(direction=direction, dtype=dtype)
        yield Case(method="mezo_svrg", direction="low_rank", dtype=dtype)
        for batch_size in (8, 32):
            yield Case(
                direction="low_rank", dtype=dtype, batch_size=batch_size, examples_per_direction=1
            )
    yield Case(method="published")
    for num_directions in (1, 4):
        yield Case(direction="low_rank", num_directions=num_directions, adapted_layers=3)


def all_cases() -> Iterator[Case]:
    yield from quick_cases()
    for evaluation in ("lockstep", "sequential"):
        for direction in ("gaussian", "low_rank"):
            yield Case(direction=direction, evaluation=evaluation)
    yield Case(method="mezo_svrg")
    for direction in ("gaussian", "low_rank"):
        yield Case(method="mezo_svrg", direction=direction, anchor_age=50)
    for direction in ("gaussian", "low_rank"):
        yield Case(direction=direction, dtype="bfloat16", num_directions=4)
        for batch_size in (1, 16):
            yield Case(direction=direction, dtype="bfloat16", batch_size=batch_size)
        yield Case(direction=direction, dtype="bfloat16", num_layers=3)


def model_of(case: Case) -> torch.nn.Module:
    return opt_125m(case.num_layers) if case.num_layers else tiny_opt()


def adapted(model: Any, num_layers: int) -> torch.nn.Module:
    """The model with LoRA adapters in its last layers."""
    import peft

    last = list(range(model.config.num_hidden_layers))[-num_layers:]
    return peft.get_peft_model(model, peft.LoraConfig(r=8, layers_to_transform=last))


def published_mezo_step(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], seed: int, eps: float, lr: float
) -> None:
    """Make one MeZO step as published.

    Each of the four in-place passes draws the direction anew from the seed.
    """

    def walk(scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            z = torch.normal(
                mean=0.0, std=1.0, size=parameter.shape, generator=generator, dtype=parameter.dtype
            )
            parameter.data.add_(z, alpha=scale)

    walk(eps)
    loss_plus = model(**batch).loss.item()
    walk(-2 * eps)
    loss_minus = model(**batch).loss.item()
    walk(eps)
    walk(-lr * (loss_plus - loss_minus) / (2 * eps))


def zods_step(case: Case, batch: dict[str, torch.Tensor]) -> tuple[Callable[[], object], Any]:
    section: dict[str, Any] = {
        "method": case.method,
        "direction": case.direction,
        "evaluation": case.evaluation,
    }
    section |= {
        "lr": 1e-9,
        "num_directions": case.num_directions,
        "examples_per_direction": case.examples_per_direction,
    }
    if case.method == "mezo_svrg":
        section |= {"anchor_interval": 10**6, "anchor": {"point": "terms", "gradient": "terms"}}
    model = model_of(case)
    engine = single_rank_engine(
        adapted(model, case.adapted_layers) if case.adapted_layers else model,
        section,
        train_batch_size=case.batch_size,
        bf16={"enabled": case.dtype == "bfloat16"},
    )

    def step() -> None:
        engine.backward(engine(batch))
        engine.step()

    return step, engine


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@torch.no_grad()
def measured(case: Case, rounds: int, length: int) -> dict[str, Any]:
    batch = token_batch(case.batch_size, length)
    bare = model_of(case).to(getattr(torch, case.dtype))
    engine = None
    if case.method == "published":

        def step() -> object:
            return published_mezo_step(bare, batch, seed=7, eps=1e-3, lr=0.0)
    elif case.method == "stack":
        stack = {key: torch.cat([value] * 2) for key, value in batch.items()}

        def step() -> object:
            return bare(**stack)
    else:
        step, engine = zods_step(case, batch)

    def floor() -> None:
        for _ in range(case.num_forwards):
            bare(**batch)

    # not timed: builds kernels, refreshes the anchor, chooses the form of evaluation and checks it
    for _ in range(1 if engine is None else WARM_UP):
        step()
    for k in range(case.anchor_age - WARM_UP):  # the steps above are updates, too
        engine.anchor.record(Update((Term(1000 + k, 1e-9),)))
    floor()
    floors, steps = zip(*((seconds(floor), seconds(step)) for _ in range(rounds)), strict=True)
    ratios = [s / f for s, f in zip(steps, floors, strict=True)]
    return {
        **case._asdict(),
        "evaluation": "stacked"
        if case.method == "stack"
        else "sequential"
        if engine is None
        else engine.evaluation,
        "ratio_to_floor": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        "step_s": round(statistics.median(steps), 4),
        "floor_s": round(statistics.median(floors), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="the README's table alone, in under 5 minutes"
    )
    add_smoke_option(parser)
    parser.add_argument("--rounds", type=int, help="default: 3 with --quick, else 7")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--output", type=Path, help="a .json file")
    arguments = parser.parse_args()
    cases, rounds, numel = all_cases(), 7, 1 << 26
    if arguments.smoke:
        cases, rounds, numel, arguments.length = smoke_cases(), 1, 1 << 14, 8
    elif arguments.quick:
        cases, rounds = quick_cases(), 3
    arguments.rounds = arguments.rounds or rounds
    rows = []
    for case in cases:
        rows.append(measured(case, arguments.rounds, arguments.length))
        print(json.dumps(rows[-1]), file=sys.stderr)
    kernels = {
        dtype: measure_kernels(numel, numel // 16, min(3, arguments.rounds), getattr(torch, dtype))
        for dtype in ("float32", "bfloat16")
    }
    asked = {"quick": arguments.quick, "rounds": arguments.rounds, "length": arguments.length}
    report = {
        "benchmark": "step_time",
        "date": datetime.date.today().isoformat(),
        "arguments": asked,
    }
    feeding = feeding_rows(smoke=arguments.smoke, quick=arguments.quick)
    report |= {"machine": machine(), "rows": rows, "kernels": kernels, "feeding": feeding}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(table(rows))
        plot(rows, arguments.output.with_suffix(".png"))
    print(json.dumps(report))


def label(row: dict[str, Any]) -> str:
    parts = [row["method"].replace("mezo_svrg", "svrg"), row["direction"]]
    parts += [row["evaluation"]] if row["evaluation"] != "stacked" else []
    parts += [f"{row['num_directions']} directions"] if row["num_directions"] > 1 else []
    parts += ["a direction per example"] if row["examples_per_direction"] == 1 else []
    parts += [f"batch {row['batch_size']}"] if row["batch_size"] != 8 else []
    parts += [f"{row['num_layers']} layers"] if row["num_layers"] != 12 else []
    parts += [f"LoRA in {row['adapted_layers']} layers"] if row["adapted_layers"] else []
    parts += [f"{row['anchor_age']} updates since the refresh"] if row["anchor_age"] else []
    return ", ".join(part for part in parts if part)


def table(rows: list[dict[str, Any]]) -> str:
    """The ratios of step and floor by case and dtype, as Markdown."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        low, high = row["ratios"][0], row["ratios"][-1]
        cells.setdefault(label(row), {})[row["dtype"]] = (
            f"{row['ratio_to_floor']:.2f} ({low:.2f} to {high:.2f})"
        )
    lines = [
        "Step over floor: median (lowest to highest) of the rounds.",
        "",
        "| | float32 | bfloat16 |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {by.get('float32', '')} | {by.get('bfloat16', '')} |"
        for name, by in cells.items()
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(map(label, rows)))
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(names) + 1.2), layout="constrained")
    for dtype, marker in (("float32", "o"), ("bfloat16", "s")):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        middle = [row["ratio_to_floor"] for row in of_dtype]
        spread = [[m - row["ratios"][0] for m, row in zip(middle, of_dtype, strict=True)]]
        spread += [[row["ratios"][-1] - m for m, row in zip(middle, of_dtype, strict=True)]]
        heights = [names.index(label(row)) for row in of_dtype]
        axes.errorbar(middle, heights, xerr=spread, fmt=marker, label=dtype, capsize=2)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="step over the bare forwards it needs", xlim=(0.5, None))
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
