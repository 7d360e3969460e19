"""A run of zods.finetune that real faults strike, each once. For the fault matrix.

Usage: faulty.py FOLDER FAULT... [slow] -- OPTIONS_OF_FINETUNE

A fault is WHAT:WHERE:RANK:STEP, e.g. kill:scalars:1:4. STEP -1 is any step.

WHAT: kill, stop, term   send a signal to the rank's own process
      kill_all           send SIGKILL to all ranks
      sleep              never return
      corrupt_point, corrupt_gradient   write over the anchor's file
      fill, fill_log, free   fill the run's disk or its log's disk; remove the filling of the first
      other_record       the rank applies another record
      other              give the rank another seed, or other data, code or weights (named by WHERE)
WHERE: see `LOCATIONS`; also data (a batch is loaded) and record (a record is applied).
slow: every forward takes 0.4 s longer.

FOLDER gets a mark file for each fault that has struck. When the run is started again, the fault
does not strike again.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

own, options = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
local_rank = [option for option in own if option.startswith("--local_rank")]
folder, *given = [option for option in own if option not in local_rank]
FOLDER, FAULTS = Path(folder), [fault.split(":") for fault in given if fault != "slow"]
SLOW = "slow" in given
RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def differing():
    """The differences between this rank's input and that of other ranks.

    They apply to the first start only.
    """
    found = [
        (where, FOLDER / "-".join((what, where, rank, step)))
        for what, where, rank, step in FAULTS
        if what == "other" and int(rank) == RANK
    ]
    new = [where for where, mark in found if not mark.exists()]
    for _, mark in found:
        mark.touch()
    return new


DIFFERING = differing()
if "code" in DIFFERING:  # another copy of the package; it has to come before the first import
    sys.path.insert(0, str(FOLDER / "changed"))

import zods.finetune
from zods.core.directions import Direction
from zods.data.loader import TrainingLoader
from zods.forward.evaluator import Evaluator
from zods.training import checkpoint, checkpoint_files, resume
from zods.training.engine import ZerothOrderEngine
from zods.training.loss_exchange import LossExchange
from zods.training.recorder import Recorder
from zods.trajectory.log import LogFile

STEP = [0]  # the step that is under way
# The number of updates of a parameter since the last forward. It starts so low that the updates of
# a resume do not count.
CALLS = [-(10**6)]


def do(what):
    """Inflict a fault on this process, or on something that it uses."""
    if what in ("kill", "stop", "term"):
        os.kill(
            os.getpid(),
            {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[what],
        )
    elif what == "kill_all":
        for rank in [*(r for r in range(WORLD_SIZE) if r != RANK), RANK]:
            os.kill(int((FOLDER / f"pid{rank}").read_text()), signal.SIGKILL)
    elif what == "sleep":
        time.sleep(10**6)
    elif what.startswith("corrupt_"):
        config = json.loads(Path(options[options.index("--deepspeed_config") + 1]).read_text())
        drive = Path(config["zeroth_order"]["anchor"]["nvme_path"])
        with open(
            drive / "zods_anchor" / f"rank{RANK}" / f"{what.removeprefix('corrupt_')}.bin", "r+b"
        ) as file:
            file.seek(5000)
            file.write(b"nothing that was written here")
    elif what in ("fill", "fill_log", "free"):
        disk = Path(options[options.index("--output_dir") + 1]).parent
        filler = (FOLDER / "log_disk" if what == "fill_log" else disk) / "filler"
        if what == "free":
            filler.unlink()
            return
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return


def strike(where):
    """Inflict the fault that is due here, if there is one. Returns its WHAT, or None."""
    for fault in FAULTS:
        what, due, rank, step = fault
        mark = FOLDER / "-".join(fault)
        if due == where and int(rank) == RANK and int(step) in (STEP[0], -1) and not mark.exists():
            mark.touch()
            do(what)
            return what
    return None


def around(holder, name, before=None, after=None):
    """Wrap a method: call `before` with its arguments, and strike at the location `after`."""
    original = getattr(holder, name)

    def replaced(*args, **kwargs):
        if before is not None:
            before(*args)
        result = original(*args, **kwargs)
        if after is not None:
            strike(after)
        return result

    setattr(holder, name, replaced)


def forward(engine, *_):
    if engine.training:
        STEP[0], CALLS[0] = engine.global_steps, 0
        if SLOW:
            time.sleep(0.4)
        strike("forward")


def in_application(*_):
    CALLS[0] += 1
    if CALLS[0] == 4:
        strike("application")


def half_a_line(file, line, _then):
    for fault in FAULTS:
        due = (
            fault[1] == "log"
            and int(fault[2]) == RANK
            and int(fault[3]) == STEP[0]
            and b'"step":' in line
        )
        if due and not (FOLDER / "-".join(fault)).exists():
            os.write(file._descriptor, line[: len(line) // 2])
    strike("log")


def half_a_file(tensors, path, *_):
    if any(fault[1] == "checkpoint" and int(fault[2]) == RANK for fault in FAULTS):
        Path(path).write_bytes(b"half of a file")
    strike("checkpoint")


# WHERE: wraps the function in which the fault strikes
LOCATIONS = {
    "forward": lambda: around(ZerothOrderEngine, "forward", before=forward),
    "scalars": lambda: around(
        LossExchange, "step_losses", before=lambda *_: strike("scalars"), after="after_scalars"
    ),
    "application": lambda: around(Direction, "replay_", before=in_application),
    "log": lambda: around(LogFile, "_append", before=half_a_line),
    "checkpoint": lambda: around(checkpoint_files, "save_tensors", before=half_a_file),
    "rename": lambda: around(
        checkpoint, "put_in_place", before=lambda *_: strike("rename"), after="after_rename"
    ),
    "refresh": lambda: around(
        Evaluator, "differences_over", before=lambda *_: strike("refresh"), after="after_refresh"
    ),
    "resume": lambda: around(resume, "replay_", before=lambda *_: strike("resume")),
}


def main():
    (FOLDER / f"pid{RANK}").write_text(str(os.getpid()))
    for wrap in LOCATIONS.values():
        wrap()
    batches, add = TrainingLoader._epoch_batches, Recorder.add

    def loading(loader):
        for batch in batches(loader):
            strike("data")
            yield batch

    def recording(recorder, record):
        what = strike("record")
        return (
            add(recorder, record)
            if what is None
            else add(recorder, type(record)(**{**vars(record), "lr": 1.0}))
        )

    TrainingLoader._epoch_batches, Recorder.add = loading, recording
    changed = list(options)
    for where in DIFFERING:
        changed += {
            "code": [],
            "seed": ["--seed", "43"],
            "data": ["--train_file", str(FOLDER / "other.jsonl")],
            "weights": ["--model", str(FOLDER / "other")],
        }[where]
    sys.argv = [zods.finetune.__file__, *local_rank, *changed]
    zods.finetune.main()


if __name__ == "__main__":
    main()
