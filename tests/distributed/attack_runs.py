"""Runs of the command line for `benchmarks/attack.py`: their kinds, starts of them, comparisons.

A start forks the ranks from a server that has the imports made, and each rank runs the main program
of `zods.finetune` as it would under a launcher: own signals, messages and exit codes.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.distributed.attack_verdicts import Ended, is_finished
from tests.distributed.command_line import MODEL, prompted_options, write_rows
from tests.distributed.ranks import (
    ENVIRONMENT,
    PRELOADED,
    master_port,
    restore_compilers,
)

STEPS = 8
LIMIT = 240.0  # seconds of a start, after which it counts as hanging; a quiet machine takes 10
GRACE = 10.0  # seconds that the other ranks have after one has failed; launch.py gives none
RUN = "run"

LOG = Path(RUN) / "trajectory.log"
SVRG = {"method": "mezo_svrg", "anchor_interval": 3}


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    section: keys of "zeroth_order" ("NVME" stands for a folder of the trial). deepspeed: other keys
    of the JSON. options: of the command line. model: "small", or "wide" with parameters so large
    that DeepSpeed keeps them on NVMe. examples: number of rows of the data.
    """

    section: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    ranks: int = 2
    model: str = "small"
    examples: int = 24

    @property
    def is_first_order(self) -> bool:
        return "optimizer" in self.options


def _anchor(point: str, gradient: str) -> dict[str, Any]:
    path = {"nvme_path": "NVME"} if "nvme" in (point, gradient) else {}
    return {**SVRG, "anchor": {"point": point, "gradient": gradient, **path}}


def _stage(stage: int, **others: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **others}}


_ON_NVME = {"device": "nvme", "nvme_path": "NVME", "buffer_size": 3_000_000}
_ADAMW = {"optimizer": "adamw", "lr": 1e-3}
KINDS: dict[str, Kind] = {
    "MeZO": Kind(examples=200),
    "MeZO-SVRG, anchor on the device": Kind(_anchor("device", "device")),
    "MeZO-SVRG, anchor on the CPU": Kind(_anchor("cpu", "cpu")),
    "MeZO-SVRG, anchor on NVMe": Kind(_anchor("nvme", "nvme")),
    "MeZO-SVRG, anchor as terms": Kind(_anchor("terms", "terms")),
    "parameters on NVMe": Kind(deepspeed=_stage(3, offload_param=_ON_NVME), model="wide"),
    "parameters and anchor on NVMe": Kind(
        _anchor("terms", "nvme"), _stage(3, offload_param=_ON_NVME), model="wide"
    ),
    "bf16": Kind(_anchor("cpu", "nvme"), {"bf16": {"enabled": True}}),
    "stage 0, bf16": Kind(deepspeed={**_stage(0), "bf16": {"enabled": True}}),
    "low-rank": Kind({**SVRG, "direction": {"distribution": "low_rank", "rank": 2}}),
    "Rademacher": Kind({"direction": "rademacher", "num_directions": 2}),
    "selector": Kind({"selector": {"candidates": 16, "num_directions": 4, "rank": 1}}),
    "selector with weights": Kind(
        {
            **SVRG,
            "selector": {
                **{"candidates": 16, "num_directions": 4, "rank": 1, "weights": "cluster"},
                **{"interval": 2, "warmup_steps": 1},
            },
        }
    ),
    "a direction per example": Kind(
        {**SVRG, "examples_per_direction": 1, "num_directions": 2, "anchor_directions": 4}
    ),
    "mean over examples": Kind({"loss_mean": "examples"}, {"gradient_accumulation_steps": 2}),
    "schedule, decay and annealing": Kind(
        {"weight_decay": 0.1, "anneal": {"alpha": 2.0, "threshold": 0.5}},
        {
            "scheduler": {
                "type": "WarmupLR",
                "params": {"warmup_max_lr": "auto", "warmup_num_steps": 5},
            }
        },
    ),
    "one point per forward": Kind({**SVRG, "evaluation": "sequential", "share_direction": False}),
    "LoRA": Kind(options={"lora_rank": 2}),
    "AdamW, stage 0": Kind(deepspeed=_stage(0), options=_ADAMW),
    "AdamW, one rank": Kind(deepspeed=_stage(0), options=_ADAMW, ranks=1),
    "AdamW, stage 1": Kind(deepspeed=_stage(1), options=_ADAMW),
    "AdamW, stage 3": Kind(deepspeed=_stage(3), options=_ADAMW),
}


# --- a run's folder -------------------------------------------------------------------------------


def rows_of(kind: Kind) -> list[dict[str, Any]]:
    return [
        {"text": f"return the value of {i}", "label": ("code", "text")[i % 2]}
        for i in range(kind.examples)
    ]


def prepare(folder: Path, kind: Kind, nvme: Path | None = None) -> None:
    """Write the data and the configuration of a run into a new folder."""
    nvme = nvme or folder / "nvme"
    for made in (folder, nvme):
        made.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", rows_of(kind))
    section = {
        **{"method": "mezo", "lr": 1e-3, "agreement_interval": 2, "hang_timeout": 60.0},
        **kind.section,
    }
    if kind.is_first_order:
        section = {}
    config = {"train_batch_size": 8, **_stage(3), **kind.deepspeed, "zeroth_order": section}
    (folder / "config.json").write_text(json.dumps(config).replace('"NVME"', json.dumps(str(nvme))))


def options(folder: Path, kind: Kind, **changes: Any) -> list[str]:
    """The options of `zods.finetune` for a run in `folder`. None leaves an option out."""
    values = {
        **{"max_length": 24, "max_steps": STEPS, "save_interval": 3, "save_total_limit": 2},
        **{"eval_interval": 4, "resume": "auto", "save_model": True},
        **({"model": folder.parent / "wide model"} if kind.model == "wide" else {}),
        **kind.options,
        **changes,
    }
    output = values.pop("output_dir", folder / RUN)
    given = {name: value for name, value in values.items() if value is not None}
    return prompted_options(folder, output, **given)


def make_wide_model(folder: Path) -> None:
    """Write a model with a matrix of more than 1 MiB on each of two ranks."""
    if (folder / "model.safetensors").exists():
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    shape = {"hidden_size": 320, "intermediate_size": 1664, "num_hidden_layers": 1}
    config = AutoConfig.from_pretrained(folder, num_attention_heads=10, num_key_value_heads=10)
    config.update(shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


# --- starts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hooks:
    """What is done to a rank's steps. pace: seconds that each takes longer. die_at: rank 0 kills
    itself before it makes this step. fill: a folder whose disk is full when the engine's method
    `fill_at` is called.
    """

    pace: float = 0.0
    die_at: int | None = None
    fill: str | None = None
    fill_at: str = "save_pretrained"


class World:
    """The ranks of one start, forked."""

    def __init__(
        self,
        folder: Path,
        words: list[str],
        ranks: int = 2,
        hooks: Hooks | None = None,
        *,
        program: str = "finetune",
    ) -> None:
        """words: the command line's words. program: "finetune" or "trajectory"."""
        self._stack = contextlib.ExitStack()
        self._began = time.monotonic()
        port = self._stack.enter_context(master_port())
        self._output = folder / f"output-{port}-{time.monotonic_ns()}"
        restore_compilers()
        context = server()
        self.processes = [
            context.Process(
                target=_rank,
                args=(rank, ranks, port, str(self._output), words, hooks or Hooks(), program),
                daemon=True,  # they end with this process
            )
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def signal(self, number: int, rank: int | None = None) -> bool:
        """Send a signal to a rank, or to all. Returns whether one of them was alive."""
        chosen = self.processes if rank is None else [self.processes[rank]]
        alive = [process for process in chosen if process.is_alive()]
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        return bool(alive)

    @property
    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def text(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def wait(self, limit: float = LIMIT) -> Ended:
        """Wait until all ranks have ended. Ranks that a failed one leaves are killed after GRACE."""
        deadline, hung = time.monotonic() + limit, False
        while self.is_alive and not hung:
            if any(process.exitcode for process in self.processes):
                deadline = min(deadline, time.monotonic() + GRACE)
            time.sleep(0.02)
            hung = time.monotonic() > deadline
        failed = any(process.exitcode for process in self.processes)
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        self._stack.close()
        return Ended(
            tuple(process.exitcode or 0 for process in self.processes),
            self.text(),
            time.monotonic() - self._began,
            hung and not failed,
        )


def run(folder: Path, words: list[str], ranks: int = 2, hooks: Hooks | None = None) -> Ended:
    return World(folder, words, ranks, hooks).wait()


def server() -> Any:
    """The context of multiprocessing whose processes have the imports made."""
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("forkserver")
    own = ["common", "tests.distributed.attack_files", "zods.trajectory.replay", "peft"]
    context.set_forkserver_preload([*PRELOADED, *own])
    return context


def _rank(
    rank: int, ranks: int, port: int, output: str, words: list[str], hooks: Hooks, program: str
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    torch.set_num_threads(1)
    if program == "trajectory":
        os.environ.update(RANK="0", WORLD_SIZE="1")
        sys.argv = ["zods.trajectory", *words]
        runpy.run_module("zods.trajectory", run_name="__main__", alter_sys=True)
    import zods.finetune

    _hook(rank, hooks)
    sys.argv = [zods.finetune.__file__, f"--local_rank={rank}", *words]
    zods.finetune.main()


def _hook(rank: int, hooks: Hooks) -> None:
    from zods.training.engine import ZerothOrderEngine
    from zods.training.first_order import FirstOrderEngine

    for engine in (ZerothOrderEngine, FirstOrderEngine):
        _wrap(engine, "train_batch", lambda self: _before_step(self, rank, hooks))
        if hooks.fill is not None:
            disk = Path(hooks.fill)
            _wrap(engine, hooks.fill_at, lambda self, disk=disk: fill_disk(disk, rank))


def _wrap(owner: Any, name: str, before: Callable[[Any], None]) -> None:
    original = getattr(owner, name)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        before(self)
        return original(self, *args, **kwargs)

    setattr(owner, name, wrapped)


def _before_step(engine: Any, rank: int, hooks: Hooks) -> None:
    if rank == 0 and engine.global_steps == hooks.die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(hooks.pace)


def fill_disk(folder: Path, rank: int = 0) -> None:
    """Write a file until the disk of `folder` is full."""
    if rank == 0:
        with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A file system of `mib` MiB at `folder`. Mounting it needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


# --- runs that several attacks start from -------------------------------------------------------


def undisturbed(work: Path, name: str) -> Path:
    """The folder of an undisturbed run of a kind, which is made at the first call."""
    folder, kind = work / f"undisturbed {name}", KINDS[name]
    if not is_finished(folder / RUN):
        shutil.rmtree(folder, ignore_errors=True)
        make_wide_model(work / "wide model")
        prepare(folder, kind)
        ended = run(folder, options(folder, kind), kind.ranks)
        if not ended.succeeded or not is_finished(folder / RUN):
            raise RuntimeError(f"the undisturbed run of {name} failed:\n{ended.output[-4000:]}")
        (folder / "seconds").write_text(f"{ended.seconds:.2f}")
    return folder


def interrupted(work: Path, name: str, at: int = STEPS - 1) -> Path:
    """The folder of a run whose rank 0 was killed before step `at`, with checkpoints at 3 and 6."""
    folder, kind = work / f"interrupted {name}", KINDS[name]
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_wide_model(work / "wide model")
        prepare(folder, kind)
        ended = run(folder, options(folder, kind), kind.ranks, Hooks(die_at=at))
        if -signal.SIGKILL not in ended.codes or is_finished(folder / RUN):
            raise RuntimeError(f"the run of {name} was not interrupted:\n{ended.output[-4000:]}")
        (folder / "made").touch()
    return folder


def copy_of(source: Path, to: Path, kind: Kind) -> Path:
    """A copy of a prepared folder, whose configuration names the folders of the copy."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(source, to, ignore=shutil.ignore_patterns("output-*"))
    shutil.rmtree(to / "nvme", ignore_errors=True)
    prepare(to, kind)
    return to
