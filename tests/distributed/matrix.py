"""The fault matrix: real faults in runs of the command line under the `deepspeed` launcher, and
what becomes of the runs.

A cell ends well where the run, started again with the same command, has the weights and the log of
the undisturbed one, byte by byte; or where it stops with the error that is expected, and goes on so
when its cause is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.distributed.ranks import LIMIT, REPOSITORY, environment_of_ranks, master_port, options_of

SCRIPT = Path(__file__).parent / "scripts" / "faulty.py"
MODEL = REPOSITORY / "launch" / "quickstart" / "model"
STEPS = 8
IDENTICAL = "identical"


@dataclass(frozen=True)
class Cell:
    """fault, phase, rank: what the table says. strikes: the faults of the script. signal: sent by
    the driver to `target`, which is the runner, the launcher or all ranks. before_restart: what is
    damaged, or mended, in the run's folder. stops: what the first start must say where it is to
    stop with an error. says: what some start must say.
    """

    fault: str
    phase: str
    rank: str
    strikes: tuple[str, ...] = ()
    signal: int | None = None
    target: str = ""
    between: Callable[[Path], None] | None = None
    stops: str = ""
    says: str = ""
    restarts: int = 1
    variant: str = "svrg"
    disk_kib: int | None = None  # of a small file system that holds the run's folder
    small_kib: int | None = None  # of one that holds its log alone
    nvme_kib: int | None = None  # of one that holds the anchor's files
    # what the second start says, where the cause has to be removed manually
    refused_again: str = ""
    mend: Callable[[Path], None] | None = None
    code: int | None = None  # exit code of the first start; None: see `_outcome`

    @property
    def marks(self) -> list[str]:
        """The files by which the script marks the faults that have struck, in their order."""
        unmarked = ("slow:", "other:")
        return [fault.replace(":", "-") for fault in self.strikes if not fault.startswith(unmarked)]

    @property
    def name(self) -> str:
        return f"{self.fault}, {self.phase}, {self.rank}"


@dataclass
class Started:
    code: int
    said: str
    seconds: float = field(default=0.0)


VARIANTS: dict[str, dict[str, Any]] = {
    "svrg": {},
    "point on nvme": {"anchor": {"point": "nvme", "gradient": "nvme"}},
    "stage 0": {"stage": 0},
    "long": {"steps": 60},
}


def prepare(folder: Path, variant: str) -> None:
    """Data and configuration in a folder of a run's surroundings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvme").mkdir(exist_ok=True)
    rows = [
        {"text": f"return the value of {i}", "label": ("code", "text")[i % 2]} for i in range(24)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows[0]["text"] = "another example"
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = VARIANTS[variant]
    anchor = {
        "point": "cpu",
        "gradient": "nvme",
        "nvme_path": str(folder / "nvme"),
        **changed.get("anchor", {}),
    }
    section = {
        "lr": 1e-3,
        "anchor_interval": 3,
        "agreement_interval": 2,
        "hang_timeout": 4.0,
        "anchor": anchor,
    }
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": changed.get("stage", 3)},
        "zeroth_order": section,
    }
    (folder / "config.json").write_text(json.dumps(config))


def command(folder: Path, cell: Cell) -> list[str]:
    steps = VARIANTS[cell.variant].get("steps", STEPS)
    options = options_of(
        deepspeed_config=folder / "config.json",
        model=MODEL,
        output_dir=folder / "disk" / "run",
        task="prompted",
        template=r"{text}\nKind: {label}",
        train_file=folder / "train.jsonl",
        max_length=32,
        max_steps=steps,
        save_interval=3,
        save_total_limit=2,
        resume="auto",
        save_model=True,
    )
    return [str(SCRIPT), str(folder), *cell.strikes, "--", *options]


def start(folder: Path, cell: Cell, *, strike: bool) -> Started:
    """One start of the command line through the launcher, to its end, and to that of every process
    it has made.
    """
    began = time.monotonic()
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    with master_port() as port, open(folder / "output", "w+") as output:
        process = subprocess.Popen(
            [deepspeed, "--num_gpus", "2", "--master_port", str(port), *command(folder, cell)],
            env=environment_of_ranks(),
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if strike and cell.signal is not None:
                _wait_for_steps(folder, 2, process)
                for pid in _targets(process.pid, cell.target, folder):
                    os.kill(pid, cell.signal)
            process.wait(LIMIT)
            _wait_for_end(process.pid, LIMIT)
        except subprocess.TimeoutExpired:
            said = (folder / "output").read_text(errors="replace")
            raise AssertionError(
                f"{cell.name}: still running after {LIMIT} s. It said:\n{said[-3000:]}"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return Started(
            process.returncode,
            (folder / "output").read_text(errors="replace"),
            time.monotonic() - began,
        )


def _wait_for_steps(folder: Path, number: int, process: subprocess.Popen[Any]) -> None:
    metrics, deadline = folder / "disk" / "run" / "metrics.jsonl", time.monotonic() + LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count('"train"') >= number:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {number} steps were made:\n{(folder / 'output').read_text()[-3000:]}")


def _targets(runner: int, target: str, folder: Path) -> list[int]:
    if target == "runner":
        return [runner]
    if target == "launch.py":
        return [int(Path(f"/proc/{runner}/task/{runner}/children").read_text().split()[0])]
    return [int((folder / f"pid{rank}").read_text()) for rank in range(2)]


def _wait_for_end(session: int, timeout: float) -> None:
    """Until no process of the session is left: ranks may outlive their launcher for a step."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if subprocess.run(["pgrep", "-s", str(session)], capture_output=True).returncode:
            return
        time.sleep(0.1)
    raise AssertionError("processes are left after the launcher's end")


# --- what is damaged, and mended, manually ---------------------------------------------------------


def tear_the_last_record(run: Path) -> None:
    data = (run / "trajectory.log").read_bytes()
    (run / "trajectory.log").write_bytes(data[:-20])


def flip_a_byte_of_the_log(run: Path) -> None:
    data = bytearray((run / "trajectory.log").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "trajectory.log").write_bytes(data)


def damage_the_newest_checkpoint(run: Path) -> None:
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    with open(newest / "parameters-rank00001-of-00002.safetensors", "r+b") as file:
        file.seek(100_000)
        file.write(b"damage")


def give_room(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)


def change_the_code(folder: Path) -> None:
    """A copy of the package for one rank, with one more line."""
    shutil.copytree(
        REPOSITORY / "zods",
        folder / "changed" / "zods",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    with open(folder / "changed" / "zods" / "core" / "update_rule.py", "a") as file:
        file.write("# another version\n")


def change_the_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, folder / "other")
    state = load_file(folder / "other" / "model.safetensors")
    next(iter(state.values())).view(-1)[0] += 1e-3
    save_file(state, folder / "other" / "model.safetensors", {"format": "pt"})


# --- the cells ------------------------------------------------------------------------------------

_PHASES = {
    "before the scalars, in a forward": "forward",
    "before the scalars": "scalars",
    "between scalars and application": "after_scalars",
    "in the middle of application": "application",
    "in a refresh of the anchor": "refresh",
    "after a refresh's losses": "after_refresh",
    "in the middle of a checkpoint": "checkpoint",
}


def _kills() -> list[Cell]:
    cells = []
    for phase, where in _PHASES.items():
        step = 2 if where == "checkpoint" else 3 if "refresh" in where else 4
        for rank in (0, 1):
            cells.append(Cell("kill -9", phase, f"rank {rank}", (f"kill:{where}:{rank}:{step}",)))
    return cells


CELLS: list[Cell] = [
    *_kills(),
    Cell("kill -9", "in the middle of a record", "rank 0", ("kill:log:0:4",), says="the last record is torn"),
    Cell("kill -9", "before a checkpoint is renamed", "rank 0", ("kill:rename:0:2",)),
    Cell("kill -9", "after a checkpoint is renamed", "rank 0", ("kill:after_rename:0:5",)),
    Cell("kill -9", "while the log is replayed", "rank 1", ("kill:scalars:1:5", "kill:resume:1:-1"), restarts=2),
    Cell("kill -9", "between scalars and application", "all ranks", ("kill_all:after_scalars:0:4",)),
    Cell("kill -9", "in the first step", "rank 1", ("kill:after_scalars:1:0",)),
    Cell("kill -9", "in a step", "the runner", ("slow:forward:0:0",), signal.SIGKILL, "runner", says="the launcher is gone",
         code=-signal.SIGKILL),
    Cell("kill -9", "in a step", "launch.py", ("slow:forward:0:0",), signal.SIGKILL, "launch.py", says="the launcher is gone",
         code=0),
    Cell("SIGTERM", "in a step", "the runner", ("slow:forward:0:0",), signal.SIGTERM, "runner", says="stopped after step",
         code=-signal.SIGTERM),
    Cell("SIGTERM", "in a step", "launch.py", ("slow:forward:0:0",), signal.SIGTERM, "launch.py", says="stopped after step",
         code=1),
    Cell("SIGTERM", "in a step", "all ranks", ("slow:forward:0:0",), signal.SIGTERM, "ranks", says="stopped after step", code=0),
    Cell("SIGTERM", "in a forward", "rank 1", ("term:forward:1:4",), says="stopped after step 5", code=0),
    Cell("hang", "stopped in a forward", "rank 1", ("stop:forward:1:4",), stops="rank 1 does not answer"),
    Cell("hang", "stopped in a forward", "rank 0", ("stop:forward:0:4",), stops="rank 0, which keeps"),
    Cell("hang", "asleep, loading data", "rank 1", ("sleep:data:1:4",), stops="rank 1 hangs"),
    Cell("full disk", "log", "rank 0", ("fill_small:scalars:0:3",), stops="the trajectory log cannot be written", variant="long",
         small_kib=64, between=lambda run: (run.parent.parent / "small" / "filler").unlink()),
    Cell("full disk", "checkpoint", "rank 0", ("fill:scalars:0:1", "free:scalars:0:6"), says="no checkpoint at step 3",
         disk_kib=60_000, restarts=0),
    Cell("full disk", "NVMe anchor, at the start", "rank 0", stops="is too small: this rank needs", nvme_kib=1000,
         between=lambda run: give_room(run.parent.parent / "nvme")),
    Cell("corrupted NVMe anchor", "gradient", "rank 1", ("corrupt_gradient:forward:1:4",), says="rebuilt exactly",
         restarts=0),
    Cell("corrupted NVMe anchor", "point", "rank 0", ("corrupt_point:forward:0:4",), stops="rebuilds the anchor exactly",
         variant="point on nvme"),
    Cell("log", "its last record torn", "manually", ("kill:scalars:0:5",), between=tear_the_last_record,
         says="the last record is torn"),
    Cell("log", "a byte flipped", "manually", ("kill:scalars:0:5",), between=flip_a_byte_of_the_log,
         refused_again="its checksum is wrong", mend=flip_a_byte_of_the_log),
    Cell("checkpoint", "the newest damaged", "manually", ("kill:scalars:0:7",), between=damage_the_newest_checkpoint,
         says="its fingerprint is not the one it was saved with"),
    Cell("other seed", "start", "rank 1", ("other:seed:1:0",), stops="rank 1: the configuration differs"),
    Cell("other data", "start", "rank 1", ("other:data:1:0",), stops="rank 1: the training data differs"),
    Cell("other code", "start", "rank 1", ("other:code:1:0",), stops="rank 1: the code"),
    Cell("other weights", "start, replicated", "rank 1", ("other:weights:1:0",), stops="rank 1: the model", variant="stage 0"),
    Cell("other record", "a step", "rank 1", ("other_record:record:1:4",), stops="rank 1: what was applied up to step 6 differs"),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """outcome: what became of the first start; identical: whether the run's end was that of an
    undisturbed one.
    """

    outcome: str
    identical: bool
    seconds: float
    said: str


def undisturbed(folder: Path, variant: str) -> Path:
    """The folder of a run that nothing happens to, made once."""
    here = folder / f"undisturbed {variant}"
    run = here / "disk" / "run"
    if not (run / "model").exists():
        prepare(here, variant)
        started = start(here, Cell("none", "", "", variant=variant), strike=False)
        assert started.code == 0, started.said[-4000:]
    return run


def run_cell(cell: Cell, folder: Path) -> Outcome:
    """Strike a run, start it again, and compare.

    Raises AssertionError where something expected is not said or done.
    """
    expected = undisturbed(folder, cell.variant)
    here = folder / re.sub(r"\W+", "-", cell.name)
    shutil.rmtree(here, ignore_errors=True)
    prepare(here, cell.variant)
    if "other:code:1:0" in cell.strikes:
        change_the_code(here)
    if "other:weights:1:0" in cell.strikes:
        change_the_weights(here)
    with (
        _disk(here / "disk", cell.disk_kib),
        _disk(here / "small", cell.small_kib),
        _disk(here / "nvme", cell.nvme_kib),
    ):
        if cell.small_kib is not None:
            (here / "disk" / "run").mkdir()
            (here / "disk" / "run" / "trajectory.log").symlink_to(here / "small" / "trajectory.log")
        return _run_cell(cell, here, expected)


@contextlib.contextmanager
def _disk(path: Path, kib: int | None) -> Any:
    path.mkdir(exist_ok=True)
    if kib is not None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", path], check=True)
    try:
        yield
    finally:
        if kib is not None:
            subprocess.run(["umount", "-l", path], check=True)


def _run_cell(cell: Cell, here: Path, expected: Path) -> Outcome:
    run = here / "disk" / "run"
    starts = [start(here, cell, strike=True)]
    assert all((here / mark).exists() for mark in cell.marks[:1]), (
        f"{cell.name}: the fault did not strike:\n{starts[0].said[-3000:]}"
    )
    outcome = _outcome(cell, starts[0])
    if cell.between is not None:
        cell.between(run)
    if cell.refused_again:
        starts.append(start(here, cell, strike=False))
        assert starts[-1].code != 0, starts[-1].said[-3000:]
        assert cell.refused_again in starts[-1].said, starts[-1].said[-3000:]
        outcome += f", then refused: {cell.refused_again}"
    if cell.mend is not None:
        cell.mend(run)
    unlike_others = cell.fault.startswith("other ") and cell.phase.startswith("start")
    again = Cell(cell.fault, cell.phase, cell.rank, variant=cell.variant) if unlike_others else cell
    for _ in range(cell.restarts):
        starts.append(start(here, again, strike=False))
    said = "\n".join(started.said for started in starts)
    assert starts[-1].code == 0, f"{cell.name}: the last start failed:\n{starts[-1].said[-3000:]}"
    assert all((here / mark).exists() for mark in cell.marks), (
        f"{cell.name}: a fault did not strike"
    )
    assert cell.says in said, f"{cell.name}: {cell.says!r} was not said:\n{said[-6000:]}"
    return Outcome(outcome, same(run, expected), sum(started.seconds for started in starts), said)


def _outcome(cell: Cell, first: Started) -> str:
    if cell.stops:
        assert first.code != 0, first.said[-3000:]
        assert cell.stops in first.said, (
            f"{cell.name}: {cell.stops!r} was not said:\n{first.said[-4000:]}"
        )
        return f"stops: {cell.stops} ..."
    if cell.restarts == 0:
        assert first.code == 0, first.said[-3000:]
        return f"goes on, says: {cell.says} ..."
    if cell.code is not None:
        assert first.code == cell.code, f"exit code {first.code}, not {cell.code}"
    else:
        assert first.code != 0, "the exit code is 0 though a rank was killed"
    how = "finishes the step, saves, ends" if cell.fault == "SIGTERM" else "ends"
    return f"{how} with exit code {first.code}"


def same(run: Path, expected: Path) -> bool:
    """Whether two runs have the same weights and logs, byte by byte, and no step's metrics twice."""
    names = ("model/model.safetensors", "trajectory.log")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["kind"] == "train"]
    ordered = steps == sorted(set(steps))
    return ordered and all(
        (run / name).read_bytes() == (expected / name).read_bytes() for name in names
    )
