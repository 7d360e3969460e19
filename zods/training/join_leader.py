"""Bring a replica to the step of the leading one, so that it takes part from there on."""

from __future__ import annotations

from zods.training.replicas import Replicas
from zods.training.training_run import TrainingRun
from zods.trajectory.records import Step


def join_leader(run: TrainingRun, replicas: Replicas) -> None:
    """Apply what the leader has published since its log was read, until this replica takes part."""
    assert run.loader is not None
    while (record := replicas.to_catch_up(run.state.global_steps)) is not None:
        run.commit(record)
        if isinstance(record, Step):
            run.advance(record)
            if record.at is not None:
                run.loader.go_to(record.at)
