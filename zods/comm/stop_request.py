"""Requests to stop a run: by a signal, by the end of the launcher, or by the program itself.

Importing this module remembers the processes that launched this one, and imports nothing heavy. A
program imports it first, because the launcher may end while the program imports the rest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from zods.comm import proc

LOOK_SECONDS = 0.5
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command continues the run
LAUNCHER = "deepspeed.launcher.launch"
OF_THE_LAUNCHER = "CROSS_RANK"  # only launch.py sets this variable, for its ranks
INIT = 1  # process 1, which adopts processes whose parent has ended


class Lineage:
    """The processes that launched this one, as they are when this object is made.

    The launcher is the parent. Where the parent is DeepSpeed's launch.py, its parent counts, too:
    if the `deepspeed` command is killed, it leaves launch.py and the ranks running. This needs
    /proc.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self._parent = os.getppid()
        self._grandparent = proc.parent(self._parent) if _is_launcher(self._parent) else None
        self._was_lost = OF_THE_LAUNCHER in os.environ and _has_no_launcher(self.process)

    def is_lost(self) -> bool:
        """Whether the launcher has ended, now or before this object was made."""
        runner_is_gone = (
            self._grandparent is not None and proc.parent(self._parent) != self._grandparent
        )
        return self._was_lost or os.getppid() != self._parent or runner_is_gone


class StopRequested(Exception):
    """Raised, on all ranks, out of an evaluation or a refresh that a request to stop ended."""


class StopRequest:
    """A request to stop this process. reason: the first reason that was given; None until then."""

    def __init__(self) -> None:
        self.reason: str | None = None
        forked = _AT_IMPORT.process != os.getpid()
        self._lineage = Lineage() if forked else _AT_IMPORT
        self._listens = False
        self._thread = threading.Thread(target=self._watch, name="zods-lineage", daemon=True)

    def request(self, reason: str) -> None:
        """Request the stop. Only the first reason is kept."""
        if self.reason is None:
            self.reason = reason

    def guard_start(self) -> None:
        """Until `listen` is called, end this process with EXIT_CODE when its launcher has ended.

        Call it at most once. There is no step to finish yet, and the run would go on with nothing
        to end it.
        """
        self._thread.start()

    def listen(self) -> None:
        """Take SIGTERM, and the end of this process's launcher, as requests to stop.

        Call it once, in the main thread. SIGTERM no longer ends this process; it still ends
        processes that this process forks.
        """
        self._listens = True
        signal.signal(signal.SIGTERM, self._on_signal)
        # A forked pool is ended with SIGTERM. The signal is blocked during the fork, because Python
        # drops a signal that arrives before the child has its own handler.
        os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_default)
        if not self._thread.is_alive():
            self._thread.start()

    def _on_signal(self, number: int, frame: Any) -> None:
        self.request("SIGTERM")

    def _watch(self) -> None:
        while self.reason is None:
            if self._lineage.is_lost():
                if not self._listens:
                    _end_at_start()
                self.request("the launcher is gone")
            time.sleep(LOOK_SECONDS)


def _end_at_start() -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        said = (
            "zods: the launcher is gone before the first step, so the run ends here. Start it "
            f"again with the same command. (Without DeepSpeed's launcher: unset {OF_THE_LAUNCHER}.)"
        )
        with contextlib.suppress(OSError):  # the launcher may have kept the other end
            os.write(sys.stderr.fileno(), f"{said}\n".encode())
    os._exit(EXIT_CODE)


def _block() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _default() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _unblock()


def _is_launcher(process: int) -> bool:
    path = LAUNCHER.replace(".", "/") + ".py"
    return any(a == LAUNCHER or a.endswith(path) for a in proc.arguments(process))


def _has_no_launcher(process: int) -> bool:
    """Whether launch.py, which has started this process, or the `deepspeed` command, which has
    started launch.py, has ended already.

    There may be wrappers between launch.py and this process.
    """
    while not _is_launcher(process):
        if _is_adopted(process):
            return True
        parent = proc.parent(process)
        if not parent:  # unknown, or the first process of a container
            return False
        process = parent
    if proc.parent(process) == INIT:
        # In a container the `deepspeed` command, a program of Python, may be process 1 itself. With
        # --node_rank launch.py may have been started by another program.
        started_by_hand = any(a.startswith("--node_rank") for a in proc.arguments(process))
        runs_python = any("python" in os.path.basename(a) for a in proc.arguments(INIT)[:1])
        return not started_by_hand and not runs_python
    return _is_adopted(process)


def _is_adopted(process: int) -> bool:
    """Whether the parent of a process is not the one that started it.

    A process has the session of the process that started it, unless it leads a session of its own.
    """
    starter = proc.parent(process)
    if starter == INIT:
        return True
    session = proc.session(process)
    if not starter or session in (None, process):
        return False
    return proc.session(starter) not in (None, session)


_AT_IMPORT = Lineage()
