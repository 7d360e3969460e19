"""Bring a replica to the leader's step, from which it takes part."""

from __future__ import annotations

from collections.abc import Callable

from zods.training.replicas import Replicas
from zods.training.training_run import TrainingRun
from zods.trajectory.records import Step


def join_leader(run: TrainingRun, replicas: Replicas, beat: Callable[[], None]) -> None:
    """Apply the records that the leader has made since this replica's last one, until this replica
    takes part, or the leader makes no further step.

    beat: called before each record.
    """
    assert run.loader is not None
    trajectory = run.recorder.trajectory
    steps: list[Step] = []
    while (record := replicas.to_catch_up(run.state.global_steps, trajectory.head)) is not None:
        beat()
        run.commit(record)
        if isinstance(record, Step):
            run.advance(record)
            steps.append(record)
            if record.at is not None:
                run.loader.go_to(record.at)
    run.restore_selections(steps)
