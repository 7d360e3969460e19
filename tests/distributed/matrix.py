"""The fault matrix: the faults, and what is expected of the runs that they strike.

Each `Cell` is one fault of a run of `zods.finetune` under the `deepspeed` launcher. It lists the
starts of the run. The first start meets the fault, and the following starts repeat the command
until the run is finished. `tests/distributed/fault_runs.py` runs a cell and compares the run with
an undisturbed one. `tests/distributed/test_faults.py` and `benchmarks/faults.py` run the cells.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.distributed.command_line import MODEL
from tests.distributed.ranks import REPOSITORY

RUN = Path("disk/run")  # the run's folder in the folder of a cell

# Exit codes of the `deepspeed` command, read in DeepSpeed 0.19.8:
# - launch.py looks at the ranks every second and exits with the code of the rank that it finds
#   ended first. The runner passes positive codes on.
# - A rank that SIGKILL ends has the code -9, which the shell's eight bits make 247. The other rank
#   loses its connections, exits with 1, and may be found first.
# - launch.py exits with 1 after a SIGTERM of its own.
# - The runner drops negative codes: after kill -9 of launch.py it exits with 0.
# - On one node the runner handles no signal, so a signal ends it.
RANK_KILLED = (247, 1)
BAD_INPUT = (2,)
FAILED = (1,)
TO_BE_CONTINUED = (75,)  # zods.comm.stop_request.EXIT_CODE, after a request to stop or a hang


class End(StrEnum):
    """The way in which a start ends."""

    KILLED = "killed"
    STOPPED = "stops on request"
    ERROR = "stops with an error"
    FINISHED = "finishes the run"


@dataclass(frozen=True)
class Signal:
    """A signal that the driver sends once the run has made two steps.

    target: "runner" (the `deepspeed` command), "launch.py" or "ranks" (both).
    """

    number: signal.Signals
    target: str

    @property
    def mark(self) -> str:
        """Name of the file that the driver leaves once the signal has been sent."""
        return f"{self.number.name}-{self.target}"


@dataclass(frozen=True)
class Disk:
    """A small file system. Mounting it needs root.

    folder: "disk" holds the run's folder, "log_disk" its log alone, "nvme" the anchor's files.
    """

    folder: str
    kib: int

    @property
    def mark(self) -> str:
        """Name of the file that the driver leaves once the file system is mounted."""
        return f"mounted-{self.folder}"


@dataclass(frozen=True)
class Start:
    """One start of a cell's run, and the end that is expected of it.

    codes: the exit codes of the `deepspeed` command that are accepted.
    says: a part of a message that one of the processes has to write.
    strikes: faults that `scripts/faulty.py` inflicts in this start, as WHAT:WHERE:RANK:STEP.
    before: damages or mends something in the cell's folder before this start.
    """

    end: End
    codes: tuple[int, ...]
    says: str = ""
    strikes: tuple[str, ...] = ()
    before: Callable[[Path], None] | None = None

    @property
    def marks(self) -> list[str]:
        """Names of the files that the script leaves, one for each fault that has struck."""
        return [strike.replace(":", "-") for strike in self.strikes]


@dataclass(frozen=True)
class Cell:
    """One fault of the matrix.

    fault, phase, rank: the name of the cell in the table.
    starts: every start of the run. The last one finishes the run.
    signal: sent by the driver in the first start. Forwards take longer in such a cell, so that the
        signal arrives in a step.
    disk: a small file system for a part of the run's files.
    variant: the configuration of the run; see `fault_runs.VARIANTS`.
    """

    fault: str
    phase: str
    rank: str
    starts: tuple[Start, ...]
    signal: Signal | None = None
    disk: Disk | None = None
    variant: str = "svrg"

    @property
    def name(self) -> str:
        return f"{self.fault}, {self.phase}, {self.rank}"

    @property
    def strikes(self) -> list[str]:
        """The faults of all starts. The command names all of them in every start."""
        return [strike for start in self.starts for strike in start.strikes]

    @property
    def marks(self) -> list[str]:
        """Names of the files that show, after the first start, that the fault has struck."""
        driver = [made.mark for made in (self.signal, self.disk) if made is not None]
        return [*driver, *self.starts[0].marks]


def killed(*strikes: str, says: str = "") -> Start:
    return Start(End.KILLED, RANK_KILLED, says, strikes)


def fails(says: str, *strikes: str, codes: tuple[int, ...] = FAILED) -> Start:
    return Start(End.ERROR, codes, says, strikes)


def finishes(says: str = "", *strikes: str, before: Callable[[Path], None] | None = None) -> Start:
    return Start(End.FINISHED, (0,), says, strikes, before)


# --- damage and repair between two starts ---------------------------------------------------------


def tear_the_last_record(folder: Path) -> None:
    log = folder / RUN / "trajectory.log"
    log.write_bytes(log.read_bytes()[:-20])


def flip_a_byte_of_the_log(folder: Path) -> None:
    """Flip a bit in the middle of the log. A second call restores the log."""
    log = folder / RUN / "trajectory.log"
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    log.write_bytes(data)


def damage_the_newest_checkpoint(folder: Path) -> None:
    checkpoints = folder / RUN / "checkpoints"
    newest = checkpoints / (checkpoints / "latest").read_text()
    with open(newest / "parameters-rank00001-of-00002.safetensors", "r+b") as file:
        file.seek(100_000)
        file.write(b"damage")


def empty_log_disk(folder: Path) -> None:
    (folder / "log_disk" / "filler").unlink()


def enlarge_disk(folder: Path) -> None:
    command = ["mount", "-o", "remount,size=64m", folder / "nvme"]
    subprocess.run(command, check=True)


def change_the_code(folder: Path) -> None:
    """Copy the package for one rank and add a line, so that the digest of its code differs."""
    shutil.copytree(
        REPOSITORY / "zods",
        folder / "changed" / "zods",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    with open(folder / "changed" / "zods" / "core" / "update_rule.py", "a") as file:
        file.write("# another version\n")


def change_the_weights(folder: Path) -> None:
    """Copy the model for one rank and change one number of its weights."""
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


def _kills_in_each_phase() -> list[Cell]:
    cells = []
    for phase, where in _PHASES.items():
        step = 2 if where == "checkpoint" else 3 if "refresh" in where else 4
        for rank in (0, 1):
            strike = f"kill:{where}:{rank}:{step}"
            first = killed(strike, says=f"zods: rank {rank} (process ")
            cells.append(Cell("kill -9", phase, f"rank {rank}", (first, finishes())))
    return cells


def _kill(phase: str, rank: str, strike: str, *, restart_says: str = "") -> Cell:
    return Cell("kill -9", phase, rank, (killed(strike), finishes(restart_says)))


def _signal(fault: str, number: signal.Signals, target: str, rank: str, first: Start) -> Cell:
    return Cell(fault, "in a step", rank, (first, finishes()), signal=Signal(number, target))


def _kill_launcher(target: str, rank: str, code: int) -> Cell:
    first = Start(End.KILLED, (code,), "the launcher is gone")
    return _signal("kill -9", signal.SIGKILL, target, rank, first)


def _terminate(target: str, rank: str, code: int) -> Cell:
    first = Start(End.STOPPED, (code,), "stopped after step")
    return _signal("SIGTERM", signal.SIGTERM, target, rank, first)


def _hang(phase: str, rank: str, strike: str, says: str) -> Cell:
    return Cell("hang", phase, rank, (fails(says, strike, codes=TO_BE_CONTINUED), finishes()))


def _differs(
    what: str, says: str, *, prepare: Callable[[Path], None] | None = None, **cell: str
) -> Cell:
    """Rank 1 is given something else than rank 0. `prepare` makes it."""
    first = Start(End.ERROR, FAILED, says, (f"other:{what}:1:0",), prepare)
    return Cell(f"other {what}", cell.pop("phase", "start"), "rank 1", (first, finishes()), **cell)


CELLS: list[Cell] = [
    *_kills_in_each_phase(),
    _kill("in the middle of a record", "rank 0", "kill:log:0:4",
          restart_says="the last record is torn"),
    _kill("before a checkpoint is renamed", "rank 0", "kill:rename:0:2"),
    _kill("after a checkpoint is renamed", "rank 0", "kill:after_rename:0:5"),
    Cell("kill -9", "while the log is replayed", "rank 1",
         (killed("kill:scalars:1:5"), killed("kill:resume:1:-1"), finishes())),
    _kill("between scalars and application", "all ranks", "kill_all:after_scalars:0:4"),
    _kill("in the first step", "rank 1", "kill:after_scalars:1:0"),
    _kill_launcher("runner", "the runner", -signal.SIGKILL),
    _kill_launcher("launch.py", "launch.py", 0),
    _terminate("runner", "the runner", -signal.SIGTERM),
    _terminate("launch.py", "launch.py", 1),
    _terminate("ranks", "all ranks", *TO_BE_CONTINUED),
    Cell("SIGTERM", "in a forward", "rank 1",
         (Start(End.STOPPED, TO_BE_CONTINUED, "stopped after step 5", ("term:forward:1:4",)), finishes())),
    _hang("stopped in a forward", "rank 1", "stop:forward:1:4", "rank 1 does not answer"),
    _hang("stopped in a forward", "rank 0", "stop:forward:0:4", "rank 0, which keeps"),
    _hang("asleep, loading data", "rank 1", "sleep:data:1:4", "rank 1 hangs"),
    Cell("full disk", "log", "rank 0",
         (fails("the trajectory log cannot be written", "fill_log:scalars:0:3"),
          finishes(before=empty_log_disk)),
         disk=Disk("log_disk", 64), variant="long"),
    Cell("full disk", "checkpoint", "rank 0",
         (finishes("no checkpoint at step 3", "fill:scalars:0:1", "free:scalars:0:6"),),
         disk=Disk("disk", 60_000)),
    Cell("full disk", "NVMe anchor, at the start", "rank 0",
         (fails("is too small: this rank needs", codes=BAD_INPUT), finishes(before=enlarge_disk)),
         disk=Disk("nvme", 1000)),
    Cell("corrupted NVMe anchor", "gradient", "rank 1",
         (finishes("rebuilt exactly", "corrupt_gradient:forward:1:4"),)),
    Cell("corrupted NVMe anchor", "point", "rank 0",
         (fails("rebuilds the anchor exactly", "corrupt_point:forward:0:4"), finishes()),
         variant="point on nvme"),
    Cell("log", "its last record torn", "manually",
         (killed("kill:scalars:0:5"),
          finishes("the last record is torn", before=tear_the_last_record))),
    Cell("log", "a byte flipped", "manually",
         (killed("kill:scalars:0:5"),
          Start(End.ERROR, BAD_INPUT, "its checksum is wrong", before=flip_a_byte_of_the_log),
          finishes(before=flip_a_byte_of_the_log))),
    Cell("checkpoint", "the newest damaged", "manually",
         (killed("kill:scalars:0:7"),
          finishes("its fingerprint is not the one it was saved with",
                   before=damage_the_newest_checkpoint))),
    _differs("seed", "rank 1: the configuration differs"),
    _differs("data", "rank 1: the training data differs"),
    _differs("code", "rank 1: the code", prepare=change_the_code),
    _differs("weights", "rank 1: the model", prepare=change_the_weights, phase="start, replicated",
             variant="stage 0"),
    Cell("other record", "a step", "rank 1",
         (fails("rank 1: what was applied up to step 6 differs", "other_record:record:1:4"),
          finishes())),
]  # fmt: skip
