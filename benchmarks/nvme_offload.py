"""Measure training of a model that is larger than the memory: parameters on NVMe, memory capped.

    python benchmarks/nvme_offload.py [--json FILE] [--markdown FILE] [--plot FILE]

A decoder of 24 blocks of width 2,048 (1.23 B parameters, float32, random weights) is trained with and
without a limit on the memory, which is below the model's size. The limit is a cgroup's, with the
launcher, the ranks, and the page cache of the files that they read. A row is one run:

zods, NVMe  MeZO, stacked, with the default directions under DeepSpeed's ZeRO-3 with offload_param on NVMe, two
            ranks under the real launcher
in memory   MeZO as published, one process: the parameters are in memory and walked in place

The figures are those of the run's last step: before it zods chooses the form of evaluation and checks
it, with more forwards. step_s is its time. `read` and `written` are its bytes of files (the kernel's
count of the ranks) over those of the model. `losses` are those of all steps; in memory, of the end.
The outcome "killed" is that of a run which the kernel killed at its limit. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    GIVES_BACK,
    Report,
    add_report_options,
    add_smoke_option,
    examples_of,
    launcher,
    load_sharded,
    report_head,
    save_opt,
    token_batch,
)
from memory_cgroup import MemoryCgroup, lacking
from step_time import published_mezo_step
from transformers import AutoModelForCausalLM

import zods
from zods.comm.process import connect_ranks, end_process

RANKS, VOCABULARY, BATCH, LENGTH = 2, 8192, 2, 16
STEPS = {"zods, NVMe": 4, "in memory": 2}
SMOKE_LIMIT = 8 << 30  # nothing is killed
COLUMNS = (
    *("training", "capped", "seed", "outcome", "limit_bytes", "peak_bytes"),
    *("step_s", "read", "written", "losses"),
)


# --- in a capped process --------------------------------------------------------------------------


def moved() -> dict[str, int]:
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"read": int(io["read_bytes"]), "written": int(io["write_bytes"])}


def zods_rank(model: Path, steps: int, seed: int) -> dict[str, Any]:
    """Train under ZeRO-3 with the parameters on NVMe. Collective."""
    comm = connect_ranks()
    width = json.loads((model / "config.json").read_text())["hidden_size"]
    offload: dict[str, Any] = {
        "device": "nvme",
        "nvme_path": str(model.parent),
        "buffer_size": max(4 * width, VOCABULARY) * width // RANKS,  # the largest shard
    }
    config: dict[str, Any] = {
        "train_batch_size": BATCH,
        "zero_optimization": {
            "stage": 3,
            "offload_param": offload,
            # DeepSpeed's defaults keep up to 1e9 gathered elements, here the whole model
            "stage3_max_live_parameters": 2 * RANKS * offload["buffer_size"],
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": width * width,
            "stage3_param_persistence_threshold": 10 * width,
        },
        "steps_per_print": 10**9,
    }
    module = load_sharded(model, config, BATCH // RANKS)
    section = {"method": "mezo", "evaluation": "stacked", "lr": 1e-4, "seed": seed}
    rows = token_batch(BATCH, LENGTH, VOCABULARY)
    tokens = examples_of(rows)
    engine = zods.initialize(
        model=module.eval(), config={**config, "zeroth_order": section}, training_data=tokens
    )[0]
    own = BATCH // RANKS
    batch = {key: value[comm.rank * own :][:own] for key, value in rows.items()}
    losses = []
    for _ in range(steps):
        before, began = moved(), time.perf_counter()
        engine.backward(engine(batch))
        engine.step()
        seconds = time.perf_counter() - began
        losses.append(engine.last_step.loss)
    own_moved = {key: value - before[key] for key, value in moved().items()}
    of_ranks = comm.gather_objects(own_moved)
    size = sum(p.whole_numel * p.dtype.itemsize for p in engine.sharded_parameters)
    engine.flush()
    engine.close()
    per_step = {key: round(sum(m[key] for m in of_ranks) / size, 3) for key in own_moved}
    return {"step_s": round(seconds, 2), "losses": losses, "model_bytes": size, **per_step}


@torch.no_grad()
def in_memory(folder: Path, steps: int, seed: int) -> dict[str, Any]:
    """Train as published, with the parameters in memory."""
    torch.set_num_threads(RANKS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = token_batch(BATCH, LENGTH, VOCABULARY)
    for step in range(steps):
        before, began = moved(), time.perf_counter()
        published_mezo_step(model, batch, seed * steps + step, eps=1e-3, lr=1e-7)
    seconds = time.perf_counter() - began
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    per_step = {key: round((value - before[key]) / size, 3) for key, value in moved().items()}
    losses = [model(**batch).loss.item()]  # after the steps
    return {"step_s": round(seconds, 2), "losses": losses, "model_bytes": size, **per_step}


# --- on this machine ------------------------------------------------------------------------------


def forget_pages(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that the next run reads them itself."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(training: str, limit: int | None, model: Path, seed: int) -> dict[str, Any]:
    """Run a training in processes of its own."""
    forget_pages(model)
    found = model.parent / "found.json"
    found.unlink(missing_ok=True)
    case = json.dumps({"training": training, "model": str(model), "seed": seed})
    start = launcher(RANKS) if training == "zods, NVMe" else [sys.executable]
    command = [*start, __file__, "--case", case, "--rows", str(found)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **GIVES_BACK}
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "-")
    row |= {"training": training, "capped": limit is not None, "seed": seed, "outcome": "trains"}
    if limit is None:
        subprocess.run(command, stdout=sys.stderr, env=variables, check=True)
    else:
        with MemoryCgroup(limit) as group:
            command = group.command(command)
            code = subprocess.run(command, stdout=sys.stderr, env=variables, check=False).returncode
            row |= {"limit_bytes": limit, "peak_bytes": group.peak()}
            if group.kills():
                return {**row, "outcome": "killed"}
        if code:
            raise SystemExit(f"{training}: ended with code {code}; its output is above.")
    return {**row, **json.loads(found.read_text())}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the seconds per step of each training, a point per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    names = dict.fromkeys((row["training"], row["capped"]) for row in rows)
    for k, name in enumerate(names):
        own = [row for row in rows if (row["training"], row["capped"]) == name]
        times = [row["step_s"] for row in own if row["outcome"] == "trains"]
        axis.plot([k] * len(times), times, "o")
        if not times:
            axis.text(k, 0, "killed", ha="center", va="bottom")
    labels = [f"{training}\n{'capped' if capped else 'no cap'}" for training, capped in names]
    axis.set_xticks(range(len(names)), labels)
    axis.set(ylabel="seconds per step", ylim=(0, None), xlim=(-0.5, len(names) - 0.5))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=0.85, help="over the bytes of the model")
    parser.add_argument("--plot", type=Path, help="draw the times there")
    add_report_options(parser)
    add_smoke_option(parser)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # given to a process of a run
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        case = json.loads(arguments.case)
        training = case["training"]
        run = zods_rank if training == "zods, NVMe" else in_memory
        figures = run(Path(case["model"]), STEPS[training], case["seed"])
        if arguments.local_rank == 0:
            arguments.rows.write_text(json.dumps(figures))
        if run is zods_rank:
            end_process(0)
        return
    runs = [(training, capped) for capped in (True, False) for training in STEPS]
    if arguments.smoke:
        runs, arguments.seeds = [("zods, NVMe", True), ("in memory", False)], 1
    reason = lacking()
    if reason is not None:
        print(f"nothing is capped: {reason}", file=sys.stderr)
        runs = [(training, False) for training in STEPS]
    report = Report(
        report_head("nvme_offload", arguments), arguments.json, key="run", passed=lambda row: True
    )
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:  # /tmp may be in memory
        model = Path(name) / "model"
        size = save_opt(model, *((1024, 1) if arguments.smoke else (2048, 24)), VOCABULARY)
        limit = SMOKE_LIMIT if arguments.smoke else round(arguments.limit * size)
        for seed in range(arguments.seeds):
            for training, capped in runs:
                run_name = f"{training}, {'capped' if capped else 'no cap'}, seed {seed}"
                row = report.done(run_name)
                if row is None:
                    cap = limit if capped else None
                    row = measured(training, cap, model, seed)
                report.add({"run": run_name, **row})
                print(report.rows[-1], file=sys.stderr, flush=True)
    if arguments.markdown is not None:
        text = f"a model of {size / 1e9:.2f} GB in float32, {BATCH} sequences of {LENGTH} tokens"
        arguments.markdown.write_text(report.markdown("Parameters on NVMe", text, COLUMNS))
    if arguments.plot is not None:
        draw(report.rows, arguments.plot)
    report.print_and_exit()


if __name__ == "__main__":
    main()
