"""A run that is asked to stop learns it from one place: a signal, the end of what launched it, or
the program itself.
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
    """Whether this process has been asked to stop. reason: None until someone asks; then what was
    said first.

    Made early, it knows the process's launcher even if that is gone before anyone listens.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._parent = os.getppid()
        self._grandparent = _parent_of(self._parent) if _is_launcher(self._parent) else None

    def request(self, reason: str) -> None:
        """Ask by program. Once there is a reason, another changes nothing."""
        if self.reason is None:
            self.reason = reason

    def listen(self) -> None:
        """Take SIGTERM, and the end of this process's launcher, as requests to stop.

        Call it once, in the main thread.

        The launcher is the parent; and where that is DeepSpeed's launch.py, its own parent too: the
        `deepspeed` command, which, if it is killed, leaves launch.py and the ranks running. That is
        seen where there is a /proc. SIGTERM no longer ends this process; the processes that it
        forks are ended as before.
        """
        signal.signal(signal.SIGTERM, self._on_signal)
        # A forked pool is ended with SIGTERM, and then waited for. Blocked meanwhile: Python drops
        # what comes in between.
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
