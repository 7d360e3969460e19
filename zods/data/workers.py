"""The setup of a process that loads batches ahead for `zods.data.loader`."""

from __future__ import annotations

import os
import signal
import threading


def ignore_requests_to_stop(worker: int) -> None:
    """Take SIGTERM from the parent process alone. Call it in a worker process of a DataLoader.

    A launcher or Slurm sends SIGTERM to all processes of a run. The rank then finishes its step and
    saves, but torch's DataLoader raises an error in the rank as soon as a worker ends by a signal.

    worker: number of the worker; not used.
    """
    parent = os.getppid()
    # A blocked signal waits for `sigwaitinfo`, which tells its sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, name="zods-worker", daemon=True).start()
