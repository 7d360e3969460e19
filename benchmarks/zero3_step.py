"""Measure the time of a step on ZeRO-3 over the forwards that it needs, and the bytes it moves.

    python benchmarks/zero3_step.py [--output FILE]

Runs 1 and 2 ranks under the real launcher, with the parameters in memory, offloaded to the CPU and
offloaded to NVMe, with stacked and with sequential evaluation. The floor is two forwards of
unperturbed parameters through DeepSpeed, which gather and load each parameter once per forward.

Bytes are per step and over the bytes of this rank's shards. `gathered` is the rank's input to
DeepSpeed's all-gathers. `read` and `written` are files (direct I/O, as the kernel counts it in
/proc/self/io). Ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    SHARED_DIRECTION,
    add_smoke_option,
    launcher,
    machine,
    opt_125m,
    tiny_opt,
    token_batch,
)
from deepspeed.comm.comm import comms_logger

import zods
from zods.comm.process import end_process
from zods.params.zero3_adapter import release_gathered

BATCH, LENGTH, LAYERS = 8, 64, 3


def moved() -> dict[str, int]:
    """Count the bytes moved so far: all-gathers by DeepSpeed's logger, files by the kernel."""
    gathers = [by_size for name, by_size in comms_logger.get_raw_data().items() if "gather" in name]
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {
        "gathered": sum(
            size * record[0] for by_size in gathers for size, record in by_size.items()
        ),
        "read": int(io["read_bytes"]),
        "written": int(io["write_bytes"]),
    }


@torch.no_grad()
def measured(
    offload: str, evaluation: str, model: torch.nn.Module, rounds: int, folder: Path
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if offload == "nvme":
        zero["offload_param"] = {
            "device": "nvme",
            "nvme_path": str(folder),
            "buffer_size": 40_000_000,
        }
    elif offload == "cpu":
        zero["offload_param"] = {"device": "cpu"}
    whole = token_batch(BATCH, LENGTH)
    config = {
        "train_batch_size": BATCH,
        "zero_optimization": zero,
        "comms_logger": {"enabled": True, "verbose": False, "prof_all": True},
        "steps_per_print": 10**9,
        "zeroth_order": {
            **SHARED_DIRECTION,
            "method": "mezo",
            "lr": 1e-9,
            "evaluation": evaluation,
        },
    }
    engine = zods.initialize(model=model, config=config, training_data=[0] * BATCH)[0]
    size = BATCH // engine.world_size
    batch = {key: value[engine.global_rank * size :][:size] for key, value in whole.items()}
    shard_bytes = sum(p.padded_numel * p.dtype.itemsize for p in engine.sharded_parameters)

    def floor() -> None:
        for _ in range(2):
            engine.deepspeed(**batch)
            release_gathered(engine.deepspeed)

    def step() -> None:
        engine.backward(engine(batch))
        engine.step()

    for _ in range(2):
        step()
        engine.flush()
        floor()
    ratios, seconds, bytes_moved = [], [], []
    for _ in range(rounds):
        began = time.perf_counter()
        floor()
        floor_ended = time.perf_counter()
        # This step is not timed. Where parameters are offloaded, its update is deferred to the next
        # step, as in the middle of a run.
        step()
        before, step_began = moved(), time.perf_counter()
        step()
        seconds.append(time.perf_counter() - step_began)
        ratios.append(seconds[-1] / (floor_ended - began))
        bytes_moved.append({key: value - before[key] for key, value in moved().items()})
        engine.flush()
    return {
        "ranks": engine.world_size,
        "offload": offload,
        "evaluation": engine.evaluation,
        "ratio_to_floor": round(statistics.median(ratios), 3),
        "step_s": round(statistics.median(seconds), 3),
        **{
            key: round(statistics.median(m[key] for m in bytes_moved) / shard_bytes, 3)
            for key in moved()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    add_smoke_option(parser)
    parser.add_argument("--output", type=Path)
    # given to a rank: the file for its rows
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows is not None:
        cases = [
            (offload, evaluation)
            for offload in ("none", "cpu", "nvme")
            for evaluation in ("stacked", "sequential")
        ]
        if arguments.smoke:
            cases = cases[-2:]
        rows = []
        for case in cases:
            model = tiny_opt() if arguments.smoke else opt_125m(LAYERS)
            rows.append(measured(*case, model, arguments.rounds, arguments.rows.parent))
        if torch.distributed.get_rank() == 0:
            arguments.rows.write_text(json.dumps(rows))
        end_process(0)
    if arguments.smoke:
        arguments.rounds = 1
    rows = []
    for ranks in (2,) if arguments.smoke else (1, 2):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            file = Path(folder) / "rows.json"
            command = [*launcher(ranks), __file__]
            command += ["--rounds", str(arguments.rounds)]
            command += ["--smoke"] if arguments.smoke else []
            threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
            subprocess.run(
                [*command, "--rows", str(file)],
                check=True,
                stdout=sys.stderr,
                env=os.environ | threads,
            )
            rows += json.loads(file.read_text())
    report = {
        "benchmark": "zero3_step",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "rows": rows,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
