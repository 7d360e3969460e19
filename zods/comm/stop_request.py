"""Requests to stop a run after its current step: by a signal, by the end of the launcher, or by the
program itself.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

LOOK_SECONDS = 0.5
LAUNCHER = "deepspeed.launcher.launch"


class StopRequest:
    """A request to stop this process. reason: the first reason that was given; None until then.

    It remembers the process's launcher from when it was made, so make it early: the launcher may
    end before `listen` is called.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._parent = os.getppid()
        self._grandparent = _parent_of(self._parent) if _is_launcher(self._parent) else None

    def request(self, reason: str) -> None:
        """Request the stop. Only the first reason is kept."""
        if self.reason is None:
            self.reason = reason

    def listen(self) -> None:
        """Take SIGTERM, and the end of this process's launcher, as requests to stop.

        Call it once, in the main thread. The launcher is the parent. Where the parent is
        DeepSpeed's launch.py, its parent counts, too: if the `deepspeed` command is killed, it
        leaves launch.py and the ranks running. This needs /proc. SIGTERM no longer ends this
        process; it still ends processes that this process forks.
        """
        signal.signal(signal.SIGTERM, self._on_signal)
        # A forked pool is ended with SIGTERM. The signal is blocked during the fork, because Python
        # drops a signal that arrives before the child has its own handler.
        os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_default)
        threading.Thread(target=self._watch, name="zods-lineage", daemon=True).start()

    def _on_signal(self, number: int, frame: Any) -> None:
        self.request("SIGTERM")

    def _watch(self) -> None:
        while self.reason is None:
            runner_is_gone = (
                self._grandparent is not None and _parent_of(self._parent) != self._grandparent
            )
            if os.getppid() != self._parent or runner_is_gone:
                self.request("the launcher is gone")
            time.sleep(LOOK_SECONDS)


def _block() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _default() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _unblock()


def _is_launcher(process: int) -> bool:
    try:
        arguments = Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return False
    return any(a == LAUNCHER or a.endswith(LAUNCHER.replace(".", "/") + ".py") for a in arguments)


def _parent_of(process: int) -> int | None:
    """Return the parent of a process, or None if the process is gone or there is no /proc."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(errors="replace")
    except OSError:
        return None
    # the name, in parentheses, may contain any character
    return int(status.rpartition(")")[2].split()[1])
