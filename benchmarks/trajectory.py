"""Measure the trajectory log: its size and cost, the speed of a replay, and the time of a restart.

    python benchmarks/trajectory.py [--part log replay restart whole] [--rounds 3]
                                    [--output FILE.json] [--smoke]

log      Bytes per step of real runs of a tiny model, extrapolated to 20,000 steps. The time of
         `add` and `wait` beside a step of 100 ms, with work between the two calls in place of
         applying the step. The time to read a log of 20,000 steps.
replay   The time of `python -m zods.trajectory replay` on OPT-125M's shape. A ratio is this time
         over (terms x parameters) / rate. The rate is that of `combine_` with one term, or that of
         `replay_` on a block in the cache. Both are measured before and after the replay.
restart  The time from the start of the processes to the next step: 100 steps after a checkpoint,
         and from the log alone.
whole    The replay of a log of 20,000 rademacher steps on OPT-125M's shape. It takes minutes, and
         runs only if --part names it.

Prints one JSON object. Figures are medians over the rounds. The load averages in it tell of other
jobs on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STARTED = time.time()

import torch
from common import (
    SHARED_DIRECTION,
    add_smoke_option,
    free_port,
    machine,
    opt_125m,
    single_rank_engine,
    tiny_opt,
    token_batch,
)
from transformers import OPTForCausalLM

import zods
from zods.comm.process import end_process
from zods.config.schema import parse_section
from zods.core.directions import Direction
from zods.kernels import Sweep, backend, fingerprint
from zods.trajectory.log import LogFile, Trajectory, read_log
from zods.trajectory.records import Evaluation, Header, ParameterRecord, Record, RunRecord, Step

WEEK = 20_000  # steps of a long run
STEP_SECONDS = 0.1
BASE_SECTION = {**SHARED_DIRECTION, "method": "mezo", "lr": 1e-6}


@dataclass(frozen=True)
class Sizes:
    """The sizes of all parts.

    model: the model that is replayed and restarted.
    week: the steps of a whole log.
    timed: the number of records whose writing is timed.
    replayed: the steps of a replay by direction, for each of `dtypes`.
    restarts: (direction, ranks) of each restarted run.
    starts: what the run is restarted from.
    """

    model: Callable[[], OPTForCausalLM] = opt_125m
    week: int = WEEK
    timed: int = 500
    replayed: dict[str, int] = field(
        default_factory=lambda: {"gaussian": 200, "rademacher": 600, "low_rank": 600}
    )
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    restarts: tuple[tuple[str, int], ...] = (
        ("gaussian", 2),
        ("gaussian", 1),
        ("rademacher", 2),
        ("low_rank", 2),
    )
    starts: tuple[str, ...] = ("checkpoint and tail", "log alone")


SMOKE = Sizes(
    tiny_opt,
    50,
    5,
    {"rademacher": 3},
    (torch.bfloat16,),
    (("gaussian", 1),),
    ("checkpoint and tail",),
)


# --- the log --------------------------------------------------------------------------------------

LOGGED: dict[str, dict[str, Any]] = {
    "mezo": {"method": "mezo"},
    "mezo_svrg": {},
    "mezo, 16 directions": {"method": "mezo", "num_directions": 16},
    "mezo, 64 of 128 selected": {
        "method": "mezo",
        "selector": {"candidates": 128, "strategy": "structured_random"},
    },
    "mezo, 64 of 128 selected, weighted": {
        "method": "mezo",
        "selector": {"candidates": 128, "num_directions": 4, "weights": "cluster"},
    },
}


def bytes_per_step(folder: Path, name: str, steps: int) -> dict[str, Any]:
    selected = "selector" in LOGGED[name]
    batch = 64 if selected else 8
    rows = token_batch(20 * batch, 8, vocab_size=64)
    data = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    section = {**BASE_SECTION, "method": "mezo_svrg", **LOGGED[name]}
    engine = single_rank_engine(tiny_opt(64), section, data, train_batch_size=batch)
    engine.resume(folder / name)
    for _ in range(steps):
        engine.train_batch()
    engine.close()
    log = read_log(folder / name / "trajectory.log")
    middle = next(k for k, record in enumerate(log.records, start=1) if record.step == steps // 2)
    per_step = (log.ends[-1] - log.ends[middle]) / (steps - steps // 2)
    longest = max(
        b - a
        for a, b, record in zip(log.ends, log.ends[1:], log.records, strict=False)
        if isinstance(record, Step)
    )
    return {
        "log": name,
        "steps": steps,
        "header_and_run_bytes": log.ends[1],
        "bytes_per_step": round(per_step, 1),
        "longest_step_bytes": longest,
        "megabytes_of_20000_steps": round((log.ends[1] + WEEK * (per_step + 1)) / 1e6, 3),
    }


def steps_of(number: int, coefficients: int = 1, first: int = 0) -> list[Record]:
    """Records of `number` steps, as a long run has them."""
    rng = random.Random(0)
    return [
        Step(
            step,
            2 + rng.random(),
            1e-6 * rng.random(),
            single(rng, coefficients),
            (step // 1000, 1 + step % 1000),
        )
        for step in range(first, first + number)
    ]


def single(rng: random.Random, number: int) -> tuple[float, ...]:
    """Random numbers in single precision."""
    return tuple(torch.tensor([rng.gauss(0, 1) for _ in range(number)]).tolist())


def write(path: Path, header: Header, records: list[Record], sync: bool = False) -> None:
    trajectory = Trajectory()
    trajectory.file = LogFile(path)
    for record in [header, *records]:
        trajectory.add(record)
    trajectory.wait()
    trajectory.file.close()


def cost_of_steps(folder: Path, where: str, work_seconds: float, number: int) -> dict[str, Any]:
    """Measure the time that `add` and `wait` take, over `number` records.

    work_seconds: the work between a record's `add` and its `wait`, in place of applying the step.
    """
    trajectory, spent, x = Trajectory(), [], torch.zeros(2**16)
    trajectory.file = LogFile(folder / f"cost-{work_seconds}.log")
    for record in steps_of(number):
        began = time.perf_counter()
        trajectory.add(record)
        added = time.perf_counter()
        while time.perf_counter() - added < work_seconds:
            x.add_(1.0)
        waits = time.perf_counter()
        trajectory.wait()
        spent.append(added - began + time.perf_counter() - waits)
    trajectory.file.close()
    p99 = sorted(spent)[math.ceil(0.99 * number) - 1]
    return {
        "where": where,
        "work_ms": 1e3 * work_seconds,
        "median_ms": round(1e3 * statistics.median(spent), 4),
        "mean_ms": round(1e3 * statistics.fmean(spent), 4),
        "p99_ms": round(1e3 * p99, 4),
        "median_of_step": round(statistics.median(spent) / STEP_SECONDS, 5),
        "mean_of_step": round(statistics.fmean(spent) / STEP_SECONDS, 5),
        "p99_of_step": round(p99 / STEP_SECONDS, 5),
    }


def part_log(folder: Path, sizes: Sizes, rounds: int, steps: int) -> dict[str, Any]:
    rows = [
        print_row(bytes_per_step(folder, name, steps // 4 if "selected" in name else steps))
        for name in LOGGED
    ]
    costs = [cost_of_steps(folder, "disk", work, sizes.timed) for work in (0.0, 0.005, 0.02)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        costs.append(cost_of_steps(Path(memory), "memory", 0.0, sizes.timed))
    parse = {}
    for coefficients in (1, 16):
        path = folder / f"week-{coefficients}.log"
        section = parse_section({**BASE_SECTION, "num_directions": coefficients})
        write(
            path,
            Header("Tiny", ()),
            [RunRecord(0, section, 8, 2), *steps_of(sizes.week, coefficients)],
        )
        parse[f"{coefficients} coefficients"] = {
            "megabytes": round(path.stat().st_size / 1e6, 3),
            "seconds": round(
                statistics.median(seconds(lambda path=path: read_log(path)) for _ in range(rounds)),
                3,
            ),
        }
    return {"size": rows, "add_and_wait": costs, "parse_of_20000_steps": parse}


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# --- replay ---------------------------------------------------------------------------------------


class Matrix:
    """A stand-in for a shard of 4 Mi elements, with the attributes that `Direction` reads."""

    ordinal, shape = 1, (4096, 1024)


def rates(distribution: str, dtype: torch.dtype) -> dict[str, float]:
    """The elements times terms that are applied per second.

    "combine_" applies one term in a sweep over memory, "replay_" 64 terms to elements in the cache.
    """
    direction, x = Direction(distribution), torch.zeros(math.prod(Matrix.shape), dtype=dtype)
    seed = 7 if dtype == torch.bfloat16 else None
    sweeps = [Sweep(1.0, [k], [1e-3], rounding_seed=seed) for k in range(64)]

    def combine() -> None:
        direction.combine_(x, Matrix, weight=x, seeds=[1], coefficients=[1e-3], rounding_seed=seed)

    def replay() -> None:
        direction.replay_(x, Matrix, 0, sweeps)

    combine()
    one = statistics.median(seconds(combine) for _ in range(9))
    many = statistics.median(seconds(replay) for _ in range(3))
    return {"combine_": x.numel() / one, "replay_": 64 * x.numel() / many}


def base_and_log(
    folder: Path, model: torch.nn.Module, distribution: str, dtype: torch.dtype, steps: int
) -> tuple[Path, Path]:
    """Write the model in `dtype`, and a log of `steps` MeZO steps that start from it."""
    base, log = folder / f"base-{dtype}", folder / f"{distribution}-{dtype}-{steps}.log"
    model = model.to(dtype)
    if not base.exists():
        model.save_pretrained(base)
    entries = [
        ParameterRecord(
            name,
            tuple(p.shape),
            str(dtype).removeprefix("torch."),
            True,
            fingerprint(p.detach().view(-1)),
        )
        for name, p in model.named_parameters()
    ]
    header = Header(
        type(model).__name__,
        tuple(entries),
        {"lm_head.weight": "model.decoder.embed_tokens.weight"},
    )
    section = parse_section({**BASE_SECTION, "direction": distribution})
    if not log.exists():
        write(
            log,
            header,
            [RunRecord(0, section, 8, 2), Evaluation(0, "stacked", 2), *steps_of(steps)],
        )
    return base, log


def replayed(base: Path, log: Path, out: Path) -> dict[str, float]:
    """Run a replay by the command line: the time that it prints, and that of the whole process."""
    began = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "zods.trajectory",
        "replay",
        "--base",
        base,
        "--log",
        log,
        "--out",
        out,
    ]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    steps, took, rate = words[0], words[3], words[5]
    return {
        "steps": int(steps),
        "seconds": float(took),
        "rate": float(rate),
        "process_seconds": time.perf_counter() - began,
    }


def row_of_replay(
    folder: Path,
    model: torch.nn.Module,
    distribution: str,
    dtype: torch.dtype,
    steps: int,
    rounds: int,
) -> dict[str, Any]:
    base, log = base_and_log(folder, model, distribution, dtype, steps)
    numel = sum(parameter.numel for parameter in read_log(log).header.parameters)
    found = []
    for _ in range(rounds):
        before = rates(distribution, dtype)
        with tempfile.TemporaryDirectory(dir=folder) as out:
            found.append(replayed(base, log, Path(out)))
        after = rates(distribution, dtype)
        for name in before:
            found[-1][name] = (before[name] + after[name]) / 2
            found[-1][f"over {name}"] = found[-1]["seconds"] * found[-1][name] / (numel * steps)
    median = {name: statistics.median(row[name] for row in found) for name in found[0]}
    return {
        "direction": distribution,
        "dtype": str(dtype).removeprefix("torch."),
        "steps": steps,
        "parameters": numel,
        "seconds": round(median["seconds"], 1),
        "process_seconds": round(median["process_seconds"], 1),
        "element_terms_per_s": round(median["rate"] / 1e6) * 1e6,
        "combine_per_s": round(median["combine_"] / 1e6) * 1e6,
        "replay_kernel_per_s": round(median["replay_"] / 1e6) * 1e6,
        "ratio_to_combine_": round(median["over combine_"], 3),
        "ratio_to_replay_": round(median["over replay_"], 3),
        "ratios_to_replay_": sorted(round(row["over replay_"], 3) for row in found),
        "minutes_of_20000_steps": round(WEEK * numel / median["rate"] / 60, 1),
    }


def part_replay(folder: Path, sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for dtype in sizes.dtypes:
        for distribution, steps in sizes.replayed.items():
            rows.append(
                print_row(row_of_replay(folder, sizes.model(), distribution, dtype, steps, rounds))
            )
    return rows


def print_row(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row on stderr, with the load average, and return it."""
    print(json.dumps({**row, "load": os.getloadavg()[0]}), file=sys.stderr)
    return row


# --- restart --------------------------------------------------------------------------------------

TAIL = 100  # steps after the checkpoint


def restart_engine(folder: Path, distribution: str) -> Any:
    from transformers.integrations import HfDeepSpeedConfig

    config: dict[str, Any] = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": 3},
        "steps_per_print": 10**9,
    }
    held = HfDeepSpeedConfig(config)
    model = OPTForCausalLM.from_pretrained(folder / f"base-{torch.float32}", use_cache=False)
    del held
    rows = token_batch(4000, 16)  # an epoch of 1000 steps
    data = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    section = {**BASE_SECTION, "direction": distribution}
    return zods.initialize(
        model=model, config={**config, "zeroth_order": section}, training_data=data
    )[0]


def make_run(folder: Path, run: Path, distribution: str) -> None:
    """Make one step, a checkpoint, and TAIL steps after it whose losses are random."""
    engine = restart_engine(folder, distribution)
    engine.resume(run)
    engine.train_batch()
    engine.save_checkpoint(run / "checkpoints")
    for record in steps_of(TAIL, first=1):
        engine.run.commit(record)
        engine.run.advance(record)
    engine.trajectory.wait()


def restart(folder: Path, run: Path, distribution: str) -> dict[str, float]:
    imported = time.time()
    engine = restart_engine(folder, distribution)
    loaded = time.time()
    with contextlib.redirect_stderr(io.StringIO()):
        engine.resume(run)
    resumed = time.time()
    assert engine.global_steps == TAIL + 1
    engine.train_batch()
    stepped = time.time()
    engine.train_batch()
    numel = sum(shard.numel for shard in engine.sharded_parameters)
    rate = rates(distribution, torch.float32)["replay_"]
    return {
        "imports": imported - STARTED,
        "model_load": loaded - imported,
        "resume": resumed - loaded,
        "first_step": stepped - resumed,
        "second_step": time.time() - stepped,
        "kernel": TAIL * numel / rate,
    }


def rank_main(arguments: argparse.Namespace) -> None:
    """Run one rank: make the run, or restart it and print the times."""
    folder, run = Path(arguments.folder), Path(arguments.run)
    if arguments.rank_of == "make":
        make_run(folder, run, arguments.direction)
    else:
        print(json.dumps(restart(folder, run, arguments.direction)))
    end_process(0)


def on_ranks(
    world_size: int, what: str, folder: Path, run: Path, distribution: str
) -> list[dict[str, float]]:
    threads = str(max(1, (os.cpu_count() or 1) // world_size))
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
    }
    environment |= {"OMP_NUM_THREADS": threads, "LOCAL_SIZE": str(world_size)}
    command = [
        sys.executable,
        __file__,
        "--rank_of",
        what,
        "--folder",
        folder,
        "--run",
        run,
        "--direction",
        distribution,
    ]
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(error[-2000:] for _, error in outputs))
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in outputs if what == "restart"]


def part_restart(folder: Path, sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    sizes.model().save_pretrained(folder / f"base-{torch.float32}")
    rows = []
    for distribution, world_size in sizes.restarts:
        run = folder / f"{distribution}-{world_size}"
        on_ranks(world_size, "make", folder, run, distribution)
        log = (run / "trajectory.log").read_bytes()
        for start in sizes.starts:
            if start == "log alone":
                (run / "checkpoints").rename(run / "put away")
            found = []
            for _ in range(rounds):
                (run / "trajectory.log").write_bytes(log)
                found.append(on_ranks(world_size, "restart", folder, run, distribution))
            slowest = [
                {name: max(rank[name] for rank in of_round) for name in of_round[0]}
                for of_round in found
            ]
            median = {name: statistics.median(row[name] for row in slowest) for name in slowest[0]}
            ratio = statistics.median(row["resume"] / row["kernel"] for row in slowest)
            row = {
                "direction": distribution,
                "ranks": world_size,
                "from": start,
                **{f"{name}_s": round(value, 2) for name, value in median.items()},
                "resume_over_kernel": round(ratio, 2),
                "resume_rounds_s": sorted(round(row["resume"], 2) for row in slowest),
            }
            rows.append(print_row(row))
    return rows


# --- a whole log ----------------------------------------------------------------------------------


def part_whole(folder: Path, sizes: Sizes) -> dict[str, Any]:
    return print_row(
        row_of_replay(folder, sizes.model(), "rademacher", torch.float32, sizes.week, 1)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("log", "replay", "restart", "whole")
    parser.add_argument("--part", nargs="+", choices=parts, default=parts[:3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000, help="of the real runs of part log")
    parser.add_argument("--output", type=Path, help="a .json file; its results of other parts stay")
    add_smoke_option(parser)
    for name in ("rank_of", "folder", "run", "direction"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of is not None:
        rank_main(arguments)
    sizes = SMOKE if arguments.smoke else Sizes()
    if arguments.smoke:
        arguments.rounds, arguments.steps = 1, 16
    report: dict[str, Any] = {"benchmark": "trajectory"}
    if arguments.output is not None and arguments.output.exists():
        report = json.loads(arguments.output.read_text())
    report |= {
        "date": datetime.date.today().isoformat(),
        "machine": {**machine(), "backend": backend()},
    }
    with tempfile.TemporaryDirectory() as made:
        for part in arguments.part:
            asked = {"rounds": arguments.rounds, "load_before": round(os.getloadavg()[0], 2)}
            folder = Path(made) / part
            folder.mkdir()
            if part == "log":
                found: Any = part_log(folder, sizes, arguments.rounds, arguments.steps)
            elif part == "replay":
                found = part_replay(folder, sizes, arguments.rounds)
            elif part == "restart":
                found = part_restart(folder, sizes, arguments.rounds)
            else:
                found = part_whole(folder, sizes)
            report[part] = {**asked, "load_after": round(os.getloadavg()[0], 2), "found": found}
            if arguments.output is not None:
                arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
