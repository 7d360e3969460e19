"""Agree, during a long pass over a dataset, on whether to abandon it for a request to stop.

The engines call a `StopPoll` before each micro-batch of an evaluation or of a refresh.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from zods.comm.communicator import Communicator
from zods.comm.stop_request import StopRequested

SECONDS = 1.0  # between two questions, as long as micro-batches take less
MOST_BATCHES = 100  # between two questions


class StopPoll:
    """Ask all ranks every few micro-batches whether one was asked to stop.

    Clocks of ranks differ, so the ranks count micro-batches. After each question they know the
    slowest rank's time per micro-batch, and derive from it the number to the next question.
    """

    def __init__(self, comm: Communicator, is_asked: Callable[[], bool]) -> None:
        """is_asked: whether this rank was asked to stop."""
        self._comm, self._is_asked = comm, is_asked
        self._count, self._until_next = 0, 1
        self._since = time.perf_counter()

    def __call__(self) -> None:
        """Raise StopRequested, on all ranks, if one was asked to stop. All ranks call it together.

        Sends 16 bytes where it asks.
        """
        self._count += 1
        if self._count < self._until_next:
            return
        own = (time.perf_counter() - self._since) / self._count
        answers = self._comm.gather_scalars([float(self._is_asked()), own])
        if any(asked for asked, _ in answers):
            raise StopRequested("the evaluation under way is abandoned; nothing of it is recorded")
        slowest = max(seconds for _, seconds in answers)
        self._until_next = max(1, min(MOST_BATCHES, int(SECONDS / max(slowest, 1e-9))))
        self._count, self._since = 0, time.perf_counter()
