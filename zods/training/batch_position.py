"""The engine's own iterator over the training loader, and the way back to the end of a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zods.training.replica_steps import ReplicaSteps
from zods.training.training_run import TrainingRun


class BatchPosition:
    """The position of a run's loader.

    at_last_step: state of the loader at the end of the last step. It is empty where no pass over
    examples between two steps, and no replica, can need it.
    """

    def __init__(self, run: TrainingRun, replica_steps: ReplicaSteps | None) -> None:
        self._run, self._replica_steps = run, replica_steps
        self._batches: Iterator[Any] | None = None
        self.at_last_step: dict[str, Any] = {}
        self.remember()

    def batches(self) -> Iterator[Any]:
        """An iterator over the loader's batches without end, the same one until `restart`."""
        if self._batches is None:
            if self._run.loader is None:
                raise ValueError(
                    "engine.train_batch(): give an iterator, or training_data to zods.initialize."
                )
            self._batches = self._run.loader.forever()
        return self._batches

    def restart(self) -> None:
        """Let `batches` continue at the loader's current position. Iterators that were made earlier
        keep their own.
        """
        self._batches = None

    def remember(self) -> None:
        """Keep the loader's state at the end of a step, for a pass that is abandoned."""
        run = self._run
        measures = run.config.zeroth_order.lr == "auto" and run.recorder.step_size is None
        may_drop = run.anchor is not None or measures
        may_drop = may_drop or (self._replica_steps is not None and self._replica_steps.selects)
        if may_drop and run.loader is not None:
            self.at_last_step = run.loader.state_dict()

    def go_back(self) -> None:
        """Put the loader back to the end of the last step: the next step's first batch may be
        loaded.
        """
        assert self._run.loader is not None
        self._run.loader.load_state_dict(self.at_last_step)
        self.restart()
