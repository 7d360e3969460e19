"""The steps of one replica: commit the leader's records, be left out of a step, catch up.

The engine of a run with replicas owns one `ReplicaSteps`. `zods.training.replicas` has the sums and
the records of all replicas.
"""

from __future__ import annotations

import logging
from typing import Any

from zods.comm.watchdog import Watchdog
from zods.selection.loaders import SelectingLoader
from zods.training.replicas import Replicas, SharedSelection
from zods.training.training_run import TrainingRun
from zods.trajectory.records import Record, Step

logger = logging.getLogger(__name__)


class ReplicaSteps:
    """Changes the run of this replica as the leader's log says.

    All ranks of a replica call its methods together. Those that communicate raise LeftOut where this
    replica is left out of the step under way, and ValueError where the leader refuses it.
    """

    def __init__(self, run: TrainingRun, replicas: Replicas, watchdog: Watchdog) -> None:
        self._run, self._replicas, self._watchdog = run, replicas, watchdog
        zo = run.config.zeroth_order
        assert zo.replicas is not None
        self._load_timeout, self._leader_timeout = zo.load_timeout, zo.replicas.leader_timeout
        self._shared: SharedSelection | None = None
        if isinstance(run.loader, SelectingLoader):
            self._shared = SharedSelection(replicas, run.recorder.trajectory)
            run.loader.selection.share_with(self._shared)

    @property
    def selects(self) -> bool:
        """Whether the replicas share the choice of sub-batches."""
        return self._shared is not None

    @property
    def left_out(self) -> str | None:
        """Why this replica was left out while a batch was chosen; None where it was not."""
        return None if self._shared is None else self._shared.left_out

    def commit(self, record: Record) -> None:
        """Commit a record that all replicas make. In a replica that follows, commit the leader's
        records up to one of this type.
        """
        if not self._run.recorder.follows:
            self._run.commit(record)
            return
        taken: Record | None = None
        while type(taken) is not type(record):
            taken = self._replicas.next_record(record, self._run.recorder.trajectory.head)
            if isinstance(taken, Step) and isinstance(record, Step):
                _check_same_selection(taken, record)
            self._run.commit(taken)

    def split_batches(self) -> None:
        """From the next step on, take this rank's part of each batch among the ranks of all
        replicas.
        """
        assert self._run.loader is not None
        self._run.loader.split = self._replicas.split

    def join(self) -> None:
        """Make the leader's steps until this replica takes part, at the start.

        Raises ValueError where the leader makes no further step.
        """
        if not self._run.recorder.follows:
            return
        what = "the start, joining the leading replica"
        with self._watchdog.watching(what, limit=self._load_timeout):
            self._follow(what, self._load_timeout)
        if not self._replicas.members:
            raise ValueError(
                "zeroth_order.replicas: the leading replica ends. Its log has the run."
            )
        self.split_batches()

    def catch_up(self, reason: str, loader_state: dict[str, Any]) -> bool:
        """Make the leader's steps until this replica takes part again, after it was left out.

        loader_state: of the loader after the last step. Returns whether the run goes on.
        """
        if self._run.comm.rank == 0:
            logger.warning("replica %d was left out: %s", self._replicas.index, reason)
        limit = self._load_timeout + self._leader_timeout
        what = "catching up with the leading replica"
        self._watchdog.beat(what, limit)
        if self._shared is not None:
            assert self._run.loader is not None
            self._shared.left_out = None
            self._run.loader.load_state_dict(loader_state)
            assert isinstance(self._run.loader, SelectingLoader)
            self._run.loader.selection.take_seconds()  # of a selection that is dropped
        self._follow(what, limit)
        goes_on = bool(self._replicas.members)
        if goes_on:
            self.split_batches()
        return goes_on

    def _follow(self, what: str, limit: float) -> None:
        """Apply the records that the leader has made since this replica's last one, until this
        replica takes part, or the leader makes no further step.
        """
        run = self._run
        assert run.loader is not None
        steps: list[Step] = []
        while True:
            head = run.recorder.trajectory.head
            record = self._replicas.to_catch_up(run.state.global_steps, head)
            if record is None:
                break
            self._watchdog.beat(what, limit)
            run.commit(record)
            if isinstance(record, Step):
                run.advance(record)
                if record.sub_batch is not None:
                    steps.append(record)
                if record.at is not None:
                    run.loader.go_to(record.at)
        run.restore_selections(steps)


def _check_same_selection(leaders: Step, own: Step) -> None:
    """Raise ValueError where this replica has evaluated other examples than the leader chose."""
    if leaders.step == own.step and leaders.sub_batch != own.sub_batch:
        raise ValueError(
            f"zeroth_order.replicas: step {own.step}: this replica chose other examples than the "
            "leading one. Give both the same tokenizer, data and versions, and start this one again."
        )
