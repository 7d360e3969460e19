"""Measure the peak memory of a rank in training: zeroth-order and first-order, under the same ZeRO-3.

    python benchmarks/training_memory.py [--json FILE] [--markdown FILE] [--plot FILE]

Two ranks under the real launcher train a decoder of 24 blocks of width 512 with a vocabulary of
8,192 (80.0 M parameters), in float32, with random weights that from_pretrained shards. Batches (of
both ranks together) grow at one length, and lengths at one batch. stage3_max_live_parameters and
stage3_max_reuse_distance are a seventh of the parameters, as their default of 1e9 is of a model of
7 B: with the default, each rank keeps the whole of so small a model gathered. A row is a method at
one of these points:

peak_bytes  the peak of the resident memory (VmHWM) of two steps, with a refresh of the anchor, less
            `process_bytes`, on the rank with the larger peak
process_bytes  the resident memory of that rank before the model is made; the method has run once on a
            tiny model by then, so that libraries are loaded
host_bytes  the part of the peak that is an anchor in host memory, which is not the memory of a GPU

First-order steps are those of DeepSpeed's engine, with torch's SGD or AdamW. "checkpointing" is that of
activations. The points of a zeroth-order step are evaluated one by one, as in the papers, but for
"SVRG, stacked": all in one forward, as by default, with the anchor as terms. glibc returns freed memory at
once in all of them. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from common import (
    SHARED_DIRECTION,
    Report,
    add_report_options,
    add_smoke_option,
    examples_of,
    launcher,
    load_sharded,
    report_head,
    reset_peak,
    resident,
    run_ranks,
    save_opt,
    token_batch,
)

import zods
from zods.comm.process import connect_ranks, end_process

RANKS, VOCABULARY, STEPS = 2, 8192, 2
ROWS = "rows.jsonl"
WIDTH, BLOCKS = 512, 24
BATCHES, LENGTH = (8, 16), 128
LENGTHS, BATCH = (128, 256), 8
POINTS = sorted({(n, LENGTH) for n in BATCHES} | {(BATCH, n) for n in LENGTHS})
REPEATED = (BATCHES[0], LENGTH)  # the point with all seeds
ZEROTH_ORDER: dict[str, dict[str, Any]] = {
    "MeZO": {"method": "mezo"},
    **{
        f"SVRG, {place}": {"method": "mezo_svrg", "anchor": {"point": place, "gradient": place}}
        for place in ("terms", "nvme", "cpu", "device")
    },
    "SVRG, stacked": {
        "method": "mezo_svrg",
        "evaluation": "stacked",
        "anchor": {"point": "terms", "gradient": "terms"},
    },
}
# (optimizer, whether it trains LoRA adapters, whether activations are checkpointed)
FIRST_ORDER: dict[str, tuple[str, bool, bool]] = {
    "SGD": ("SGD", False, False),
    "AdamW": ("AdamW", False, False),
    "LoRA + AdamW": ("AdamW", True, False),
    "SGD, checkpointing": ("SGD", False, True),
}
METHODS = (*ZEROTH_ORDER, *FIRST_ORDER)
KEYS = ("method", "batch", "length", "seed")  # of a case
Step = Callable[[dict[str, torch.Tensor]], None]


# --- on a rank ------------------------------------------------------------------------------------


def rank_of_cases(cases: list[list[Any]], folder: Path, file: Path) -> None:
    """Measure cases (method, batch, length, seed), each in a fork of this process.

    A closed engine leaves memory behind, and the imports take longer than a case.
    """
    first_port = int(os.environ["MASTER_PORT"])
    for number, case in enumerate(cases):
        fork = os.fork()
        if fork == 0:
            # The store of the case before may still listen at its port.
            os.environ["MASTER_PORT"] = str(first_port + number)
            rank_of_case(case, folder, file)
            end_process(0)
        status = os.waitpid(fork, 0)[1]
        if status:
            raise SystemExit(f"{case}: ended with status {status}, see its output above.")


def rank_of_case(case: list[Any], folder: Path, file: Path) -> None:
    """Measure a case. Rank 0 appends a line to the file."""
    comm = connect_ranks()
    measured(case[0], RANKS, 16, 0, folder / "tiny", comm.rank)
    gc.collect()
    process_bytes = resident()
    figures = measured(*case, folder / "model", comm.rank)
    figures |= {"process_bytes": process_bytes, "peak_bytes": figures["peak_bytes"] - process_bytes}
    largest = max(comm.gather_objects(figures), key=lambda of_rank: of_rank["peak_bytes"])
    if comm.rank == 0:
        row = {**dict(zip(KEYS, case, strict=True)), **largest}
        with file.open("a") as rows:
            rows.write(json.dumps(row) + "\n")
        print(row, file=sys.stderr, flush=True)


def measured(
    method: str, batch: int, length: int, seed: int, model_folder: Path, rank: int
) -> dict[str, int]:
    """Train for STEPS steps. `peak_bytes` includes the process's own."""
    shape = json.loads((model_folder / "config.json").read_text())
    width = shape["hidden_size"]
    gathered = (12 * shape["num_hidden_layers"] * width**2 + VOCABULARY * width) // 7
    config: dict[str, Any] = {
        "train_batch_size": batch,
        "zero_optimization": {  # as transformers' Trainer resolves "auto"
            "stage": 3,
            "reduce_bucket_size": width * width,
            "stage3_prefetch_bucket_size": width * width * 9 // 10,
            "stage3_param_persistence_threshold": 10 * width,
            "stage3_max_live_parameters": gathered,
            "stage3_max_reuse_distance": gathered,
        },
        "steps_per_print": 10**9,
    }
    own = batch // RANKS
    model = load_sharded(model_folder, config, own)
    rows = token_batch(batch, length, VOCABULARY)
    if method in FIRST_ORDER:
        step, close, host_bytes = first_order(method, model, config)
    else:
        tokens = examples_of(rows)
        step, close, host_bytes = zeroth_order(
            method, model, config, tokens, model_folder.parent, seed
        )
    micro = {key: value[rank * own :][:own] for key, value in rows.items()}
    gc.collect()  # of what the load has left
    reset_peak()
    for _ in range(STEPS):
        step(micro)
    figures = {"peak_bytes": resident("VmHWM"), "host_bytes": host_bytes()}
    close()
    return figures


def zeroth_order(
    method: str, model: Any, config: dict[str, Any], tokens: list, folder: Path, seed: int
) -> tuple[Step, Callable[[], None], Callable[[], int]]:
    section = {**SHARED_DIRECTION, "evaluation": "sequential", **ZEROTH_ORDER[method]}
    if "nvme" in method:
        section["anchor"] = {**section["anchor"], "nvme_path": str(folder)}
    config = {**config, "zeroth_order": {**section, "lr": 1e-9, "seed": seed}}
    engine = zods.initialize(model=model.eval(), config=config, training_data=tokens)[0]

    def step(batch: dict[str, torch.Tensor]) -> None:
        engine.backward(engine(batch))
        engine.step()

    def close() -> None:
        engine.close()
        engine.deepspeed.destroy()

    return step, close, lambda: engine.anchor.offloaded_bytes if "cpu" in method else 0


def first_order(
    method: str, model: Any, config: dict[str, Any]
) -> tuple[Step, Callable[[], None], Callable[[], int]]:
    optimizer, lora, checkpointing = FIRST_ORDER[method]
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=8, task_type="CAUSAL_LM"))
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch_adam = {"torch_adam": True} if optimizer == "AdamW" else {}
    config = {
        **config,
        "optimizer": {"type": optimizer, "params": {"lr": 1e-6, **torch_adam}},
        "zero_allow_untested_optimizer": True,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=model.train(), model_parameters=trained, config=config)[0]

    def step(batch: dict[str, torch.Tensor]) -> None:
        engine.backward(engine(**batch, use_cache=False).loss)
        engine.step()

    return step, engine.destroy, lambda: 0


# --- on this machine ------------------------------------------------------------------------------


def summary(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], float]:
    """A row per point: mean peaks by method in MiB, and first-order peaks over those of SVRG. Also
    the largest range of a method's peaks at a point, over their mean.
    """
    peaks: dict[tuple[int, int], dict[str, list[int]]] = {}
    for row in rows:
        of_point = peaks.setdefault((row["batch"], row["length"]), {})
        of_point.setdefault(row["method"], []).append(row["peak_bytes"])
    table, spread = [], 0.0
    for (batch, length), of_point in sorted(peaks.items()):
        mean = {method: statistics.mean(found) for method, found in of_point.items()}
        sizes = {method: round(peak / 2**20) for method, peak in mean.items()}
        ratios = {
            f"{first} / {zeroth}": round(mean[first] / mean[zeroth], 2)
            for first in ("SGD", "AdamW")
            for zeroth in mean
            if first in mean and zeroth.startswith("SVRG")
        }
        table.append({"batch": batch, "length": length, **sizes, **ratios})
        ranges = [(max(found) - min(found)) / mean[m] for m, found in of_point.items()]
        spread = max(spread, *ranges)
    return table, spread


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Draw the peaks over the batch and over the length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for axis, along, fixed, at in (
        (axes[0], "batch", "length", LENGTH),
        (axes[1], "length", "batch", BATCH),
    ):
        rows = [row for row in table if row[fixed] == at]
        for method in (method for method in METHODS if method in table[0]):
            style = "o--" if method in FIRST_ORDER else "s-"
            sizes = [row[method] for row in rows]
            axis.plot([row[along] for row in rows], sizes, style, label=method, markersize=4)
        axis.set(xlabel=along, title=f"{fixed} {at}", xscale="log")
        axis.set_xticks([row[along] for row in rows], [str(row[along]) for row in rows])
        axis.minorticks_off()
    axes[0].set(ylabel="peak per rank without the process's own, MiB", ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="at one point; one at the others")
    parser.add_argument("--point", type=int, nargs=2, metavar=("BATCH", "LENGTH"), help="only this")
    parser.add_argument("--plot", type=Path, help="draw the peaks there")
    add_report_options(parser)
    add_smoke_option(parser)
    # given to a rank: its cases, and the folder of the model and of the file for the rows
    parser.add_argument("--cases", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cases is not None:
        rank_of_cases(arguments.cases, arguments.folder, arguments.folder / ROWS)
        return
    points, seeds = POINTS, arguments.seeds
    if arguments.point:
        points, seeds = [tuple(arguments.point)], 1
    if arguments.smoke:
        points, seeds, arguments.methods = [(2, 16)], 1, ["SVRG, terms", "SGD"]
    cases = {
        f"{method}, {batch} x {length}, seed {seed}": (method, batch, length, seed)
        for seed in range(seeds)
        for method in arguments.methods
        for batch, length in (points if seed == 0 else [REPEATED])
    }
    head = report_head("training_memory", arguments)
    report = Report(head, arguments.json, key="run", passed=lambda row: True)
    rows = {run: report.done(run) for run in cases}
    left = [run for run, row in rows.items() if row is None]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_opt(folder / "tiny", 32, 1, VOCABULARY)
        save_opt(folder / "model", *((32, 1) if arguments.smoke else (WIDTH, BLOCKS)), VOCABULARY)
        command = [*launcher(RANKS), __file__, "--folder", name]
        command += ["--cases", json.dumps([cases[run] for run in left])]
        try:
            if left:
                run_ranks(command)
        finally:  # rows of an interrupted launch are not measured again
            done = folder / ROWS
            lines = done.read_text().splitlines() if done.exists() else []
            rows |= {run: json.loads(line) for run, line in zip(left, lines, strict=False)}
            for run, row in rows.items():
                if row is not None:
                    report.add({"run": run, **row})
    table, spread = summary(report.rows)
    report.head |= {"table": table, "largest_spread": round(spread, 4)}
    if arguments.markdown is not None:
        text = "peaks per rank in MiB without the process's own, two ranks, float32"
        arguments.markdown.write_text(
            report.markdown("Memory of training", text, list(table[0]), table)
        )
    if arguments.plot is not None:
        draw(table, arguments.plot)
    report.print_and_exit()


if __name__ == "__main__":
    main()
