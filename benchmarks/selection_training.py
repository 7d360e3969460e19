"""The effect of selection on first-order training: a part of `benchmarks/selection.py`."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from selection_models import (
    BUDGET,
    CANDIDATES,
    TOKENIZER,
    Row,
    chosen_by,
    decoder,
    first_order,
    prepared,
    single_process,
)

from zods.forward.peak_memory import peak_memory
from zods.training.first_order import FirstOrderEngine


def training(data: Path | None, steps: int, seeds: int, rounds: int, smoke: bool) -> list[Row]:
    """Measure the costs of a step, and the curves of training.

    smoke: short examples, one method's curve, and for the costs a model of 2 blocks instead of 12,
    with LoRA only.
    """
    single_process()
    length, shape = (64, (32, 2)) if smoke else (192, (256, 12))
    methods = ("64 of 128, greedy",) if smoke else tuple(METHODS)
    adapters = (True,) if smoke else (False, True)
    return [
        *costs(data, length, shape, adapters, rounds),
        *curves(data, min(length, 128), methods, steps, seeds),
    ]


def costs(
    data: Path | None, length: int, shape: tuple[int, int], adapters: Sequence[bool], rounds: int
) -> list[Row]:
    """Measure a step's time and memory.

    The time is the median over rounds, in micro-batches of 16. The configurations take turns in
    each round. The peak of allocated memory is that of the whole batch as one micro-batch.

    shape: (width, blocks) of the model. adapters: for each value, whether the model has LoRA.
    """
    task, rows, _ = prepared(data, length)
    found = []
    for lora in adapters:
        engines = {}
        for name, batch, selector in (
            ("batch 128", CANDIDATES, None),
            ("64 of 128", BUDGET, chosen_by("greedy")),
            ("batch 64", BUDGET, None),
        ):
            for micro in (16, batch):
                model = decoder(*shape, seed=0)
                if lora:
                    import peft

                    model = peft.get_peft_model(model, peft.LoraConfig(r=8, task_type="CAUSAL_LM"))
                engines[name, micro] = first_order(
                    model, task, rows, batch=batch, micro=micro, lr=1e-3, seed=0, selector=selector
                )
        seconds: dict[str, list[float]] = {name: [] for name, micro in engines if micro == 16}
        selecting = []
        for _ in range(rounds + 1):
            for name in seconds:
                began = time.perf_counter()
                engines[name, 16].train_batch()
                seconds[name].append(time.perf_counter() - began)
            report = engines["64 of 128", 16].last_step
            selecting.append(report.selection_seconds)
        peaks = {}
        for (name, micro), engine in engines.items():
            if micro != 16:
                with peak_memory(torch.device("cpu")) as peak:
                    engine.train_batch()
                peaks[name] = peak.bytes
        ratios = {
            name: [a / b for a, b in zip(seconds[name], seconds["batch 128"], strict=True)][1:]
            for name in seconds
        }
        for name in seconds:
            found.append(
                {
                    "part": "training",
                    "what": "step",
                    "model": f"{shape[1]} blocks, width {shape[0]}"
                    + (", LoRA rank 8" if lora else ""),
                    "batch": name,
                    "step_seconds": statistics.median(seconds[name][1:]),
                    "ratio_to_batch_128": statistics.median(ratios[name]),
                    "selection_seconds": statistics.median(selecting[1:])
                    if name == "64 of 128"
                    else 0.0,
                    "peak_bytes": peaks[name],
                    "peak_ratio_to_batch_128": peaks[name] / peaks["batch 128"],
                }
            )
            print(found[-1], file=sys.stderr)
    return found


METHODS: dict[str, tuple[int, Row | None]] = {
    "batch 128": (CANDIDATES, None),
    "64 of 128, greedy": (BUDGET, chosen_by("greedy")),
    "64 of 128, structured random": (BUDGET, chosen_by("structured_random")),
    "64 of 128, random": (BUDGET, chosen_by("random")),
    "batch 64": (BUDGET, None),
}


def curves(
    data: Path | None, length: int, methods: Sequence[str], steps: int, seeds: int
) -> list[Row]:
    """Train the quickstart's pretrained decoder (4 blocks) and measure the held-out loss."""
    task, rows, held_out = prepared(data, length)
    found = []
    for seed in range(seeds):
        for name in methods:
            batch, selector = METHODS[name]
            model = transformers.AutoModelForCausalLM.from_pretrained(
                TOKENIZER, dtype=torch.float32
            )
            engine = first_order(
                model, task, rows, batch=batch, micro=16, lr=1e-3, seed=seed, selector=selector
            )
            seconds, passes, curve = 0.0, 0.0, []
            for step in range(steps + 1):
                if step % max(1, steps // 10) == 0:
                    metrics = engine.evaluate(held_out, task.collate_eval, task.measure)
                    curve.append({"step": step, "seconds": seconds, "passes": passes, **metrics})
                if step < steps:
                    engine.train_batch()
                    seconds += engine.last_step.seconds
                    measured = 0 if engine.selection is None else num_measured(engine)
                    passes += 3 * batch + measured  # a backward pass is worth two forwards
            found.append(
                {"part": "training", "what": "curve", "method": name, "seed": seed, "curve": curve}
            )
            print(name, seed, curve[-1], file=sys.stderr)
    return found


def num_measured(engine: FirstOrderEngine) -> int:
    """The number of candidates that went through the model for the last choice."""
    report = engine.selection.report
    if engine.selection.selector.config.strategy != "greedy":
        return 0
    return report.candidates - sum(report.quotas[name] for name in report.kept_whole)
