"""Check on a GPU what the tests cannot show without one, in less than 8 minutes.

    bash launch/gpu_check.sh          (or python benchmarks/gpu_check.py [--output FILE.json])

kernels  The Triton kernels compute the bits of the reference (tests/gpu).
learn    200 steps of MeZO with a direction per example lower the quickstart's held-out loss.
1.3b     Seconds of a step over its two bare forwards, in bfloat16, with random weights in the shape
7b       of OPT-1.3B and of Llama-7B, for shared directions and a direction per example.
offload  The shape of OPT-1.3B under ZeRO-3 with one rank: parameters on the GPU, in pinned host
         memory and on NVMe give the loss of a model that is not sharded.

Each part is a process with a time limit. A part for which no time is left is reported as not run.
Prints a table on stderr; the last line of the output is one JSON object. The exit code is 1 if a
part failed, and 2 without a GPU. --smoke runs the parts on a CPU with tiny shapes, without limits.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

IS_SMOKE = "--smoke" in sys.argv
os.environ["DS_ACCELERATOR"] = "cpu" if IS_SMOKE else "cuda"  # read when DeepSpeed is imported

import torch
from common import (
    add_smoke_option,
    examples_of,
    launcher,
    machine,
    single_rank_engine,
    token_batch,
)
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

from zods.cli.run_folder import read_metrics
from zods.planning.calibration import WARM_UP

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = REPOSITORY / "launch" / "quickstart"
LIMITS = {"kernels": 120, "learn": 120, "1.3b": 80, "7b": 100, "offload": 100}  # seconds
WHOLE = 470.0  # seconds for all parts
BATCH, LENGTH, ROUNDS = 16, 256, 5
CASES: tuple[tuple[str, int | str], ...] = (
    *(("low_rank", "all"), ("low_rank", 1), ("rademacher", "all"), ("gaussian", "all")),
)
TOLERANCE = 0.02  # relative, of a loss in bfloat16


def shape(name: str) -> PretrainedConfig:
    """The configuration of a shape; the tiny one in a smoke run."""
    if IS_SMOKE:
        tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        return LlamaConfig(vocab_size=128, intermediate_size=16, use_cache=False, **tiny)
    if name == "7b":
        return LlamaConfig(use_cache=False)  # the defaults have the shape of Llama-7B
    large = {"hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192}
    return OPTConfig(num_hidden_layers=24, num_attention_heads=32, use_cache=False, **large)


def model_of(name: str) -> torch.nn.Module:
    """Random weights in bfloat16, made on the device."""
    torch.manual_seed(0)
    with torch.device("cpu" if IS_SMOKE else "cuda"):
        return AutoModelForCausalLM.from_config(shape(name), dtype=torch.bfloat16).eval()


def batch_of(name: str) -> dict[str, torch.Tensor]:
    size = (4, 8) if IS_SMOKE else (BATCH, LENGTH)
    batch = token_batch(*size, vocab_size=shape(name).vocab_size)
    return {key: value.to("cpu" if IS_SMOKE else "cuda") for key, value in batch.items()}


def engine_of(model: torch.nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    """A MeZO engine. options: zero_optimization, and keys of the section "zeroth_order"."""
    zero = options.pop("zero_optimization", {"stage": 0})
    size = len(batch["labels"])
    data = examples_of(batch)
    section = {"method": "mezo", "lr": 1e-9, "evaluation": "stacked", **options}
    return single_rank_engine(
        model,
        section,
        data,
        train_batch_size=size,
        bf16={"enabled": True},
        zero_optimization=zero,
    )


def seconds(call: Callable[[], object], untimed: int = 1) -> float:
    """The median time of a call, after some that are not timed."""
    times = []
    for _ in range(untimed + ROUNDS):
        began = time.perf_counter()
        call()
        if not IS_SMOKE:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[untimed:])


# --- parts ----------------------------------------------------------------------------------------


def kernels() -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    if IS_SMOKE:
        command += ["--collect-only"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return {"passed": done.returncode == 0, "outcome": done.stdout.strip().splitlines()[-1]}


def learn() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, QUICKSTART / "make_data.py", folder], check=True)
        config = {"train_batch_size": 16, "zero_optimization": {"stage": 3}, "zeroth_order": {}}
        (folder / "config.json").write_text(json.dumps(config))
        options = {
            "deepspeed_config": folder / "config.json",
            "model": QUICKSTART / "model",
            "output_dir": folder / "run",
            "task": "prompted",
            "template": r"{text}\nKind: {label}",
            "train_file": folder / "train.jsonl",
            "validation_file": folder / "validation.jsonl",
            "max_length": 64,
            "max_steps": 2 if IS_SMOKE else 200,
            "max_eval_examples": 8 if IS_SMOKE else 400,
        }
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        command = [*launcher(1), "--module", "zods.finetune", *words]
        done = subprocess.run(command, cwd=REPOSITORY, stdout=sys.stderr, check=False)
        if done.returncode:
            return {"passed": False, "outcome": f"exit code {done.returncode}"}
        losses = [line["loss"] for line in read_metrics(folder / "run") if line["kind"] == "eval"]
    found = {"before": losses[0], "after": losses[-1]}
    return {"passed": IS_SMOKE or losses[-1] < losses[0], **found}


def step(name: str) -> dict[str, Any]:
    model, batch = model_of(name), batch_of(name)

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(2):
            model(**batch)

    floor = seconds(forwards)
    rows = []
    for direction, size in CASES:
        engine = engine_of(model, batch, direction=direction, examples_per_direction=size)
        took = seconds(lambda engine=engine: engine.train_batch(), WARM_UP)
        row = {"direction": direction, "examples_per_direction": size, "step_s": took}
        rows.append({**row, "floor_s": floor, "ratio_to_floor": took / floor})
        engine.close()
    return {"passed": True, "rows": rows}


def offload() -> dict[str, Any]:
    batch, rows = batch_of("1.3b"), []
    with tempfile.TemporaryDirectory() as folder:
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        nvme = {"device": "nvme", "nvme_path": folder, "buffer_size": 2 * 10**8}
        kinds: dict[str, dict[str, Any]] = {
            "none": {"stage": 0},
            "sharded": zero,
            "cpu": {**zero, "offload_param": {"device": "cpu", "pin_memory": not IS_SMOKE}},
            "nvme": {**zero, "offload_param": nvme},
        }
        if IS_SMOKE:  # a shard on NVMe has at least 1 MiB
            del kinds["nvme"]
        for kind, keys in kinds.items():
            model = model_of("1.3b")
            engine = engine_of(model, batch, zero_optimization=keys, direction="low_rank")
            loss = engine.train_batch()
            took = seconds(lambda engine=engine: engine.train_batch(), WARM_UP)
            rows.append({"offload": kind, "loss": loss, "step_s": took})
            engine.close()
            del engine, model
    expected = rows[0]["loss"]
    passed = all(abs(row["loss"] - expected) <= TOLERANCE * expected for row in rows)
    return {"passed": passed, "rows": rows}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "kernels": kernels,
    "learn": learn,
    "1.3b": lambda: step("1.3b"),
    "7b": lambda: step("7b"),
    "offload": offload,
}


# --- all parts ------------------------------------------------------------------------------------


def in_a_process(name: str, limit: float) -> dict[str, Any]:
    """Run a part in a process of its own. Returns its row."""
    if limit < 10.0:
        return {"part": name, "passed": None, "outcome": "not run: no time left"}
    began = time.perf_counter()
    command = [sys.executable, __file__, "--part", name, *(["--smoke"] if IS_SMOKE else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=None if IS_SMOKE else limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it has started
        process.wait()
        return {"part": name, "passed": False, "outcome": f"took more than {limit:.0f} s"}
    took = {"seconds": round(time.perf_counter() - began, 1)}
    if process.returncode:
        outcome = f"exit code {process.returncode}; see above"
        return {"part": name, "passed": False, "outcome": outcome, **took}
    return {"part": name, **json.loads(output.splitlines()[-1]), **took}


def lines(row: dict[str, Any]) -> list[str]:
    """A part in the table."""
    verdict = {True: "passed", False: "FAILED", None: "-"}[row["passed"]]
    known = {k: v for k, v in row.items() if k not in ("part", "passed", "rows")}
    shown = [f"{row['part']:8} {verdict:7} " + ", ".join(f"{k} {v}" for k, v in known.items())]
    for inner in row.get("rows", ()):
        values = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in inner.values())
        shown.append(" " * 17 + ", ".join(f"{k} {v}" for k, v in zip(inner, values, strict=True)))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the JSON object there, too")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # one part, here
    add_smoke_option(parser)
    arguments = parser.parse_args()
    if arguments.part is not None:
        print(json.dumps(PARTS[arguments.part]()))
        return
    if not IS_SMOKE and not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA device; --smoke runs on a CPU.", file=sys.stderr)
        raise SystemExit(2)
    end = time.perf_counter() + WHOLE
    rows = []
    for name, limit in LIMITS.items():
        if IS_SMOKE and name == "7b":  # the code of 1.3b
            continue
        rows.append(in_a_process(name, min(limit, end - time.perf_counter())))
        print("\n".join(lines(rows[-1])), file=sys.stderr, flush=True)
    device = "cpu" if IS_SMOKE else torch.cuda.get_device_name()
    head = {"benchmark": "gpu_check", "date": datetime.date.today().isoformat(), "device": device}
    report = json.dumps({**head, "machine": machine(), "rows": rows})
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(report + "\n")
    print(report)
    if any(row["passed"] is False for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
