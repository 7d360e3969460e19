"""Measure where selection saves memory and time in first-order training on ZeRO-3.

    python benchmarks/selection_zero3.py [--json FILE] [--markdown FILE] [--plot FILE]

AdamW on all parameters and on LoRA adapters, by DeepSpeed's engine on two ranks under the real
launcher, on a decoder with random weights. A row is a batch at a size of micro-batches:

batch       "128"; "64 of 128", chosen by facility location on the default features; "64"
blocks      of the decoder; what a selection costs beside a step falls with them
micro_batch a rank's part of the batch as one micro-batch ("whole"), or micro-batches of 8

peak_bytes is the peak of the resident memory (VmHWM) of the steps, less what was resident before the
model was made, on the rank with the larger peak. step_s is the median of the steps after the first,
and selection_s the selection's part. Ratios are over batch 128 with the same micro-batches. Quality
is measured by `selection.py --part training`. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    Report,
    add_report_options,
    add_smoke_option,
    launcher,
    report_head,
    reset_peak,
    resident,
    run_ranks,
)
from selection_models import BUDGET, CANDIDATES, chosen_by, decoder, first_order, prepared

from zods.comm.process import connect_ranks, end_process

RANKS, SMALL_MICRO, LENGTH, WIDTH = 2, 8, 64, 128
ARMS: dict[str, tuple[int, dict[str, Any] | None]] = {
    "128": (CANDIDATES, None),
    "64 of 128": (BUDGET, chosen_by("greedy")),
    "64": (BUDGET, None),
}
COLUMNS = (
    *("blocks", "training", "batch", "micro_batch", "peak_bytes", "peak_ratio"),
    *("step_s", "selection_s", "time_ratio", "fastest", "slowest"),
)


def measured(lora: bool, arm: str, whole: bool, steps: int, data: Any, shape: tuple) -> dict:
    """Train a model of a width and a number of blocks for `steps` steps and one before them.
    Collective.
    """
    task, rows, _ = data
    batch, selector = ARMS[arm]
    gc.collect()
    before = resident()
    model = decoder(*shape, seed=0)
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=8, task_type="CAUSAL_LM"))
    engine = first_order(
        *(model, task, rows),
        batch=batch,
        micro=batch // RANKS if whole else SMALL_MICRO,
        lr=1e-3,
        seed=0,
        selector=selector,
        stage=3,
    )
    reset_peak()
    times, selecting = [], []
    for _ in range(steps + 1):
        began = time.perf_counter()
        engine.train_batch()
        times.append(time.perf_counter() - began)
        selecting.append(engine.last_step.selection_seconds)
    peak = max(engine.comm.gather_objects(resident("VmHWM") - before))
    engine.close()
    engine.deepspeed.destroy()
    return {
        "blocks": shape[1],
        "training": "LoRA + AdamW" if lora else "AdamW",
        "batch": arm,
        "micro_batch": "whole" if whole else str(SMALL_MICRO),
        "peak_bytes": peak,
        "step_s": round(statistics.median(times[1:]), 3),
        "selection_s": round(statistics.median(selecting[1:]), 3),
        "times": [round(seconds, 3) for seconds in times[1:]],
    }


def rank_of_cases(file: Path, steps: int, blocks: int, smoke: bool) -> None:
    comm = connect_ranks()
    data = prepared(None, LENGTH)
    cases = [
        (lora, arm, whole) for lora in (False, True) for whole in (True, False) for arm in ARMS
    ]
    rows: list[dict[str, Any]] = []
    shape = (32, 2) if smoke else (WIDTH, blocks)
    for lora, arm, whole in cases[:2] if smoke else [cases[1], *cases]:  # the first loads libraries
        rows.append(measured(lora, arm, whole, steps, data, shape))
        if comm.rank == 0:
            print(rows[-1], file=sys.stderr, flush=True)
            file.write_text(json.dumps(rows if smoke else rows[1:]))


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with ratios over batch 128 of the same training and micro-batches."""
    for row in rows:
        base = next(
            other
            for other in rows
            if other["batch"] == "128"
            and (other["training"], other["micro_batch"]) == (row["training"], row["micro_batch"])
        )
        row["peak_ratio"] = round(row["peak_bytes"] / base["peak_bytes"], 2)
        row["time_ratio"] = round(row["step_s"] / base["step_s"], 2)
        row["fastest"], row["slowest"] = min(row["times"]), max(row["times"])
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratios of time against those of memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    for row in rows:
        marker = "o" if row["micro_batch"] == "whole" else "s"
        label = f"{row['training']}, {row['batch']}, micro-batch {row['micro_batch']}"
        axis.plot(row["peak_ratio"], row["time_ratio"], marker, label=label)
    axis.set(xlabel="peak memory over batch 128", ylabel="time of a step over batch 128")
    axis.set(xlim=(0, 1.2), ylim=(0, None))
    axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each row")
    parser.add_argument("--blocks", type=int, default=24, help="of the decoder")
    parser.add_argument("--plot", type=Path, help="draw the ratios there")
    add_report_options(parser)
    add_smoke_option(parser)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # given to a rank
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows is not None:
        rank_of_cases(arguments.rows, arguments.steps, arguments.blocks, arguments.smoke)
        end_process(0)
    report = Report(
        report_head("selection_zero3", arguments),
        arguments.json,
        key="run",
        passed=lambda row: True,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [*launcher(RANKS), __file__, "--rows", str(file)]
        command += ["--blocks", str(arguments.blocks)]
        command += (
            ["--smoke", "--steps", "1"] if arguments.smoke else ["--steps", str(arguments.steps)]
        )
        run_ranks(command)
        rows = json.loads(file.read_text())
    for row in with_ratios(rows):
        name = f"{row['blocks']} blocks, {row['training']}, {row['batch']}, {row['micro_batch']}"
        report.add({"run": name, **row})
    if arguments.markdown is not None:
        text = "AdamW on ZeRO-3, two ranks, float32"
        arguments.markdown.write_text(report.markdown("Selection on ZeRO-3", text, COLUMNS))
    if arguments.plot is not None:
        draw(report.rows, arguments.plot)
    report.print_and_exit()


if __name__ == "__main__":
    main()
