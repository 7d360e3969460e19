"""Report which rank of this machine was killed, and by which signal.

The kernel kills the process with the most memory when there is none left. DeepSpeed's launcher then
ends with code 247, and the other ranks with a lost connection. Used by `zods.finetune`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading

from zods.comm import proc

# sent on purpose, by a launcher or a user
ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Siblings:
    """The other ranks that the same launcher has started on this machine, from now on.

    Needs /proc and file descriptors of processes (Linux 5.3). Without them there are no siblings.
    """

    def __init__(self) -> None:
        self._rank = int(os.environ.get("RANK", "0"))
        self._oom_kills = proc.oom_kills()
        self._is_over = threading.Event()
        self._living: dict[int, tuple[int, int]] = {}  # descriptor -> (rank, process)
        for process in proc.children(os.getppid()):
            rank = proc.environment(process).get("RANK", "")
            if process != os.getpid() and rank.isdigit():
                with contextlib.suppress(OSError, AttributeError):
                    self._living[os.pidfd_open(process)] = (int(rank), process)

    def watch(self) -> None:
        """Watch them, in a thread. The lowest rank that lives reports the first that is killed."""
        threading.Thread(target=self._watch, name="zods-siblings", daemon=True).start()

    def wait_for_report(self, seconds: float) -> None:
        """Give the thread the time to report. Call it before this rank ends with an error, which
        may be the consequence of another rank's end.
        """
        if self._living:
            self._is_over.wait(seconds)

    def _watch(self) -> None:
        poll = select.poll()
        for descriptor in self._living:
            poll.register(descriptor, select.POLLIN)
        while self._living:
            for descriptor, _ in poll.poll():
                rank, process = self._living.pop(descriptor)
                # the launcher takes the status within a second
                number = proc.ending_signal(process)
                poll.unregister(descriptor)
                os.close(descriptor)
                if number and number not in ASKED:
                    if self._rank < min((rank for rank, _ in self._living.values()), default=1e9):
                        os.write(sys.stderr.fileno(), self._report(rank, process, number).encode())
                    self._is_over.set()
                    return  # the launcher ends the others

    def _report(self, rank: int, process: int, number: int) -> str:
        name = signal.Signals(number).name if number in signal.valid_signals() else str(number)
        cause = ""
        if number == signal.SIGKILL:
            cause = (
                " The kernel has killed a process for lack of host memory since this run began."
                if proc.oom_kills() > self._oom_kills
                else " That is usually the kernel, for lack of host memory (see `dmesg`), or a "
                "batch system at its limit."
            )
            cause += (
                " To need less: a smaller train_micro_batch_size_per_gpu, NVMe in place of "
                '"cpu" for parameters and the anchor, or fewer ranks per machine.'
            )
        return f"zods: rank {rank} (process {process}) was killed by {name}.{cause}\n"
