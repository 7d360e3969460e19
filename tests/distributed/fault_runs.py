"""Run a cell of the fault matrix, and compare its run with an undisturbed one.

`run_cell` makes every start of the cell and checks of each that

- the faults of the start struck: `scripts/faulty.py` and the driver leave a mark file for each,
- the `deepspeed` command ended with an accepted exit code, and the promised message was written,
- the run's metrics have a summary if the start is to finish the run, and none otherwise.

At the end the weights and the log have to be those of the undisturbed run, byte by byte.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.command_line import labelled_rows, prompted_options, write_inputs, write_rows
from tests.distributed.matrix import RUN, Cell, Disk, End, Signal
from tests.distributed.models import OF_THE_PAPER
from tests.distributed.ranks import LIMIT, environment_of_ranks, master_port

SCRIPT = Path(__file__).parent / "scripts" / "faulty.py"
STEPS = 8
VARIANTS: dict[str, dict[str, Any]] = {
    "svrg": {},
    "point on nvme": {"anchor": {"point": "nvme", "gradient": "nvme"}},
    "stage 0": {"stage": 0},
    "long": {"steps": 60},
}


@dataclass(frozen=True)
class Ended:
    """A start that has ended: exit code of `deepspeed`, output of all processes, duration."""

    code: int
    output: str
    seconds: float


@dataclass(frozen=True)
class Result:
    """The result of a cell.

    failure: the first expectation that was not met, or "".
    identical: whether the finished run has the weights and the log of the undisturbed run.
    """

    cell: Cell
    ended: tuple[Ended, ...]
    struck: bool
    identical: bool
    failure: str

    def row(self) -> dict[str, Any]:
        """The cell's row in the table."""
        starts = self.cell.starts
        outcome = ", then ".join(
            f"{start.end}: {start.says}" if start.says else str(start.end) for start in starts
        )
        return {
            "cell": self.cell.name,
            "fault": self.cell.fault,
            "phase": self.cell.phase,
            "rank": self.cell.rank,
            "kind": str(starts[0].end),
            "struck": self.struck,
            "exit_code": self.ended[0].code if self.ended else None,
            "outcome": f"failed: {self.failure.splitlines()[0]}" if self.failure else outcome,
            "restarts": max(0, len(self.ended) - 1),
            "identical": self.identical,
            "seconds": round(sum(ended.seconds for ended in self.ended), 1),
        }


def run_cell(cell: Cell, folder: Path) -> Result:
    """Run a cell in a folder of its own below `folder`, up to the first unmet expectation."""
    expected = undisturbed(folder, cell.variant)
    here = folder / re.sub(r"\W+", "-", cell.name)
    shutil.rmtree(here, ignore_errors=True)
    prepare(here, cell.variant)
    ended: list[Ended] = []
    failure = ""
    with _mounted(here, cell.disk):
        try:
            for start in cell.starts:
                if start.before is not None:
                    start.before(here)
                sent = None if ended else cell.signal
                ended.append(start_run(here, cell.variant, cell.strikes, sent))
                _check(cell, here, len(ended) - 1, ended[-1])
        except AssertionError as error:
            failure = str(error)
        struck = all((here / mark).exists() for mark in cell.marks)
        identical = not failure and same(here / RUN, expected)
    return Result(cell, tuple(ended), struck, identical, failure)


def _check(cell: Cell, here: Path, number: int, ended: Ended) -> None:
    """Raise AssertionError, with the output, if start `number` did not end as it is expected to."""
    start = cell.starts[number]
    marks = cell.marks if number == 0 else start.marks
    missing = [mark for mark in marks if not (here / mark).exists()]
    later = [mark for other in cell.starts[number + 1 :] for mark in other.marks]
    early = [mark for mark in later if (here / mark).exists()]
    finished = is_finished(here / RUN)
    wrong = [
        f"did not strike: {', '.join(missing)}" if missing else "",
        f"struck too early: {', '.join(early)}" if early else "",
        f"exit code {ended.code} is not among {start.codes}"
        if ended.code not in start.codes
        else "",
        f"nobody wrote {start.says!r}" if start.says not in ended.output else "",
        "the run is finished" if finished and start.end != End.FINISHED else "",
        "the run is not finished" if not finished and start.end == End.FINISHED else "",
    ]
    found = "; ".join(filter(None, wrong))
    assert not found, f"start {number + 1}: {found}\n{ended.output[-6000:]}"


def undisturbed(folder: Path, variant: str) -> Path:
    """The folder of a run without a fault, which is made at the first call."""
    here = folder / f"undisturbed {variant}"
    run = here / RUN
    if not is_finished(run):
        prepare(here, variant)
        ended = start_run(here, variant)
        assert ended.code == 0, ended.output[-4000:]
    assert is_finished(run)
    return run


def prepare(folder: Path, variant: str) -> None:
    """Write the data and the configuration of a run into `folder`."""
    (folder / "disk").mkdir(parents=True, exist_ok=True)
    (folder / "nvme").mkdir(exist_ok=True)
    rows = labelled_rows()
    rows[0]["text"] = "another example"
    write_rows(folder / "other.jsonl", rows)
    changed = VARIANTS[variant]
    anchor = {
        "point": "cpu",
        "gradient": "nvme",
        "nvme_path": str(folder / "nvme"),
        **changed.get("anchor", {}),
    }
    section = {
        **OF_THE_PAPER,
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
    write_inputs(folder, config)


@contextlib.contextmanager
def _mounted(folder: Path, disk: Disk | None) -> Iterator[None]:
    """Mount a cell's small file system, and leave its mark."""
    if disk is None:
        yield
        return
    path = folder / disk.folder
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={disk.kib}k", "none", path], check=True)
    try:
        (folder / disk.mark).touch()
        if disk.folder == "log_disk":
            (folder / RUN).mkdir()
            (folder / RUN / "trajectory.log").symlink_to(path / "trajectory.log")
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


# --- one start ------------------------------------------------------------------------------------


def start_run(
    folder: Path, variant: str, strikes: list[str] | None = None, sent: Signal | None = None
) -> Ended:
    """Start the command line through the launcher and wait until all its processes have ended.

    strikes: the faults that the script may inflict. sent: a signal of the driver.
    """
    began = time.monotonic()
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    with master_port() as port, open(folder / "output", "w+") as output:
        process = subprocess.Popen(
            [
                *(deepspeed, "--num_gpus", "2", "--master_port", str(port)),
                *(str(SCRIPT), str(folder), *(strikes or []), *(["slow"] if sent else []), "--"),
                *_options(folder, variant),
            ],
            env=environment_of_ranks(),
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if sent is not None:
                _wait_for_steps(folder, 2, process)
                for pid in _targets(process.pid, sent.target, folder):
                    os.kill(pid, sent.number)
                (folder / sent.mark).touch()
            process.wait(LIMIT)
            _wait_for_end(process.pid)
        except subprocess.TimeoutExpired:
            text = (folder / "output").read_text(errors="replace")
            raise AssertionError(
                f"still running after {LIMIT} s. Output:\n{text[-3000:]}"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    text = (folder / "output").read_text(errors="replace")
    return Ended(process.returncode, text, time.monotonic() - began)


def _options(folder: Path, variant: str) -> list[str]:
    """The options of `zods.finetune`, which are the same in every start of a run."""
    return prompted_options(
        folder,
        folder / RUN,
        max_length=32,
        max_steps=VARIANTS[variant].get("steps", STEPS),
        save_interval=3,
        save_total_limit=2,
        resume="auto",
        save_model=True,
    )


def _wait_for_steps(folder: Path, number: int, process: subprocess.Popen[Any]) -> None:
    """Wait until the metrics hold `number` steps. Raise AssertionError if the run ends before."""
    metrics, deadline = folder / RUN / "metrics.jsonl", time.monotonic() + LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count('"train"') >= number:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {number} steps were made:\n{(folder / 'output').read_text()[-3000:]}")


def _targets(runner: int, target: str, folder: Path) -> list[int]:
    """The process ids of a signal's target. launch.py is the only child of the runner."""
    if target == "runner":
        return [runner]
    if target == "launch.py":
        return [int(Path(f"/proc/{runner}/task/{runner}/children").read_text().split()[0])]
    return [int((folder / f"pid{rank}").read_text()) for rank in range(2)]


def _wait_for_end(session: int) -> None:
    """Wait until no process of the session is left. Ranks may outlive their launcher by a step."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if subprocess.run(["pgrep", "-s", str(session)], capture_output=True).returncode:
            return
        time.sleep(0.1)
    raise AssertionError("processes are left after the launcher's end")


# --- what a run has left --------------------------------------------------------------------------


def is_finished(run: Path) -> bool:
    """Whether a run has made all its steps: then its metrics have a summary."""
    return any(record["kind"] == "summary" for record in _metrics(run))


def same(run: Path, expected: Path) -> bool:
    """Whether two runs have the same weights and log, byte by byte, and no step's metrics twice."""
    names = ("model/model.safetensors", "trajectory.log")
    steps = [record["step"] for record in _metrics(run) if record["kind"] == "train"]
    ordered = steps == sorted(set(steps))
    return ordered and all(
        (run / name).read_bytes() == (expected / name).read_bytes() for name in names
    )


def _metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics, without a last line that a killed rank left incomplete."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
