"""Log a run, and resume it where it stopped: load the newest whole checkpoint that belongs to the
log, then apply the log's tail.

Without a checkpoint the base weights and the whole log give the same. All ranks do it together, on
any number of them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from zods.comm.communicator import Communicator
from zods.files import atomic_create, check_regular, copy_file, make_folder
from zods.params.zero3_adapter import release_gathered
from zods.selection.loaders import SelectingLoader
from zods.training import checkpoint
from zods.training.checkpoint_files import newest_checkpoints, read_state
from zods.training.description import describe
from zods.training.initial_weights import load_initial_weights, save_initial_weights
from zods.training.log_checks import (
    check_new,
    check_not_lost,
    check_replica,
    check_run,
    check_same_model,
    warn_of_changes,
    warn_of_other_code,
)
from zods.training.replicas import Replicas
from zods.training.training_run import TrainingRun
from zods.trajectory.log import Log, LogFile, parse_log
from zods.trajectory.records import Record, Refresh, Step
from zods.trajectory.updates import Change, num_terms, replay_

logger = logging.getLogger(__name__)

LOG_NAME = "trajectory.log"
# weights that the base does not hold, as they were at the start
INITIAL = Path("initial") / "initial.safetensors"
CHECKPOINTS = "checkpoints"


def resume(
    run: TrainingRun,
    folder: str | Path,
    replicas: Replicas | None = None,
    *,
    checkpoints: str | Path | None = None,
    new: Collection[str] = (),
    must_be_new: bool = False,
) -> bool:
    """Log the run's steps in `folder`/trajectory.log. Where the log holds steps already, bring the
    run to the last of them first.

    run: has made no step. replicas: the worlds that the run trains with. A replica that follows
    reads the leader's log, and then catches up with it, see `zods.training.replica_steps`. checkpoints: the folder of
    full checkpoints; default `folder`/checkpoints. new: names of parameters that the base weights
    lack (a new head, LoRA); their first values are kept beside the log. must_be_new: refuse a log
    that has content. Only rank 0 needs to see the log. All ranks must see the checkpoints and
    `initial`.

    Returns whether there was a log. Raises ValueError or OSError, the same on all ranks, where the
    log is damaged or lost, another run writes to it, or it is of another model, data, or batch
    size.
    """
    folder = Path(folder)
    if run.state.global_steps or not run.recorder.is_new:
        raise ValueError(
            f"engine.resume({str(folder)!r}): the engine has made steps already. Call it before "
            "the first."
        )
    file, data = None, b""
    if replicas is not None and run.recorder.follows:
        data = replicas.read_log()
    else:
        file, data = open_log(run.comm, folder)
    try:
        checkpoints = folder / CHECKPOINTS if checkpoints is None else Path(checkpoints)
        if must_be_new and not run.recorder.follows:
            check_new(run.comm, folder / LOG_NAME, data)
        return _begin_or_continue(run, replicas, folder, file, data, checkpoints, new)
    except Exception:
        if file is not None:
            file.close()  # unlocks the log, so that the caller can try again
        raise


def _begin_or_continue(
    run: TrainingRun,
    replicas: Replicas | None,
    folder: Path,
    file: LogFile | None,
    data: bytes,
    checkpoints: Path,
    new: Collection[str],
) -> bool:
    """Begin a log in `file`, or apply its content `data` and continue it.

    file: None on ranks other than 0, and in a replica that follows.
    """
    comm, trajectory = run.comm, run.recorder.trajectory
    log = None
    with comm.same_on_all_ranks():
        check_not_lost(folder / LOG_NAME, data, checkpoints)
        if b"\n" in data:
            log = drop_trailing_refresh(run.loader, parse_log(data, folder / LOG_NAME))
            check_run(run, log)
            if run.recorder.follows:
                check_replica(run.config, log)
    header = describe(run, None if log is None else log.header)
    if log is not None and log.header.parameters != header.parameters:
        load_initial_weights(run, folder / INITIAL, log.header)
        header = describe(run, log.header)
    with comm.same_on_all_ranks():
        if log is not None:
            check_same_model(log.header, header, str(folder / LOG_NAME))
        if file is not None:
            file.cut(0 if log is None else log.ends[-1])
    if log is None:
        if new:
            save_initial_weights(run, folder / INITIAL, new)
        trajectory.file = file
        _publish(run, replicas, b"")
        trajectory.add(header)
        run.recorder.record_run(0)
    else:
        if comm.rank == 0:
            log.warn_if_torn()
            warn = warn_of_other_code if run.recorder.follows else warn_of_changes
            warn(log, run.recorder.run_record(0))
        _catch_up(run, log, checkpoints)
        trajectory.file = file
        _publish(run, replicas, data[: log.ends[-1]])
    with comm.same_on_all_ranks():
        trajectory.wait()
    trajectory.agree(run.state.global_steps)
    return log is not None


def drop_trailing_refresh(loader: Any, log: Log) -> Log:
    """Drop a refresh at the end of the log where the run has a selector.

    The selector chooses the batch of the next step by the parameters before the refresh. So the
    refresh is made again, after the choice.
    """
    if (
        not isinstance(loader, SelectingLoader)
        or not log.records
        or not isinstance(log.records[-1], Refresh)
    ):
        return log
    return replace(log, records=log.records[:-1], heads=log.heads[:-1], ends=log.ends[:-1])


def open_log(comm: Communicator, folder: Path) -> tuple[LogFile | None, bytes]:
    """Open the log in a run's folder, or create it. Returns the file (on rank 0, else None) and its
    content (on all ranks).
    """
    file, data = None, b""
    with comm.same_on_all_ranks():
        if comm.rank == 0:
            file = LogFile(folder / LOG_NAME)
            data = file.read()
    return file, comm.broadcast_bytes(data)


# --- replicas -------------------------------------------------------------------------------------


def _publish(run: TrainingRun, replicas: Replicas | None, data: bytes) -> None:
    """On the leader's rank 0, publish the log so far, and each record that is added to it."""
    if replicas is None or not replicas.leads or run.comm.rank != 0:
        return
    replicas.publish_log([line.partition(" ")[2] for line in data.decode().splitlines()])
    run.recorder.trajectory.publish = replicas.publish


# --- the log's tail -------------------------------------------------------------------------------


def _catch_up(run: TrainingRun, log: Log, checkpoints: Path) -> None:
    done = _load_newest(run, log, checkpoints)
    tail = log.records[done:]
    changes, refreshed_at = _read_tail(run, tail)
    _apply(run, changes, refreshed_at)
    run.recorder.take_over(tail, log.heads[-1])
    if run.comm.rank == 0:
        logger.info(
            "%s: at step %d, %d of them from the log",
            log.path,
            run.state.global_steps,
            _num_steps(tail),
        )


def _load_newest(run: TrainingRun, log: Log, folder: Path) -> int:
    """Load the newest whole checkpoint that belongs to the log. Returns the number of records that
    it stands for.
    """
    names: list[str] = []
    with run.comm.same_on_all_ranks():
        if run.comm.rank == 0:
            found, left_out = newest_checkpoints(folder)
            names = [path.name for path in found]
            for reason in left_out:
                logger.warning("%s It is left out; an older one or the log serves.", reason)
    # rank 0's list: a network file system may show other ranks another one
    names = json.loads(run.comm.broadcast_bytes(json.dumps(names).encode()))
    for path in (folder / name for name in names):
        try:
            with run.comm.same_on_all_ranks():
                head = _head_of(path, log)
            checkpoint.load_checkpoint(run, path.parent, path.name)
        except (ValueError, OSError) as error:
            if run.comm.rank == 0:
                logger.warning("%s. It is left out; an older one or the log serves.", error)
            continue
        return log.heads.index(head)
    if names:  # a checkpoint that failed while it was loaded may have changed parameters
        check_same_model(log.header, describe(run, log.header), log.path)
    return 0


def _head_of(folder: Path, log: Log) -> str:
    """The head of the chain at a checkpoint. Raises ValueError where the log has no such head."""
    recorder = read_state(folder).get("recorder")
    head = recorder.get("head") if isinstance(recorder, dict) else None
    if head not in log.heads:
        raise ValueError(f"checkpoint {folder}: it does not belong to {log.path}")
    return head


def _read_tail(run: TrainingRun, tail: Sequence[Record]) -> tuple[list[Change], int | None]:
    """Advance counters, schedules and loader over the tail of the log.

    Returns the tail's changes of the parameters, and the index of the change at the last refresh;
    None where there is no refresh.
    """
    changes: list[Change] = []
    refreshed_at = None
    with run.comm.same_on_all_ranks():
        for record in tail:
            change = run.recorder.change(record)
            run.begin(record)
            if isinstance(record, Refresh):
                refreshed_at = refreshed_at if change is None else len(changes)
            if isinstance(record, Step):
                run.advance(record)
            if change is not None:
                changes.append(change)
        steps = [record for record in tail if isinstance(record, Step)]
        loader = run.loader
        if loader is not None and steps and steps[-1].at is not None:
            loader.go_to(steps[-1].at)
    run.restore_selections(steps)
    return changes, refreshed_at


@torch.no_grad()
def _apply(run: TrainingRun, changes: Sequence[Change], refreshed_at: int | None) -> None:
    """Apply changes to this rank's shards, reading each shard once. Restore the anchor of the last
    refresh among them.
    """
    if not changes:
        return
    anchor, parameters = run.anchor, run.parameters
    before, after = changes[: refreshed_at or 0], changes[refreshed_at or 0 :]
    run.flush()
    release_gathered(run.deepspeed)
    total = num_terms(changes) * sum(shard.numel for shard in parameters)
    quiet = run.comm.rank != 0
    limit = run.config.zeroth_order.load_timeout
    with tqdm(
        total=total, desc="log", unit="terms", unit_scale=True, disable=quiet, leave=False
    ) as progress:
        for shard, local in parameters.iterate_with_read_ahead(write=True):
            run.watchdog.beat(f"the start, the log's steps on {shard.name}", limit)
            replay_(local, shard, shard.offset, before, run.direction, progress.update)
            if refreshed_at is not None and anchor is not None and anchor.point is not None:
                anchor.point.write(shard, local)
            replay_(local, shard, shard.offset, after, run.direction, progress.update)
    if anchor is None:
        return
    if refreshed_at is not None:
        anchor.begin(changes[refreshed_at].gradient)
    for change in after:
        anchor.record(change.update)


def _num_steps(records: Sequence[Record]) -> int:
    return sum(isinstance(record, Step) for record in records)


def copy_log(run: Path, checkpoint_folder: Path | None, to: Path) -> None:
    """Copy the log of the folder `run` to the folder `to`, up to a checkpoint or whole.

    Raises ValueError or OSError where the checkpoint does not belong to the log.
    """
    check_regular(run / LOG_NAME)
    data = (run / LOG_NAME).read_bytes()
    log = parse_log(data, run / LOG_NAME)
    if checkpoint_folder is not None:
        data = data[: log.ends[log.heads.index(_head_of(checkpoint_folder, log))]]
    make_folder(to)
    if (run / INITIAL).is_file():
        make_folder((to / INITIAL).parent)
        copy_file(run / INITIAL, to / INITIAL)
    # the log comes last: a folder that has one has everything else
    try:
        with atomic_create(to / LOG_NAME) as temporary:
            temporary.write_bytes(data)
    except FileExistsError:
        raise ValueError(
            f"{to / LOG_NAME}: another run has been started in this folder meanwhile. Give another "
            "folder, or --resume auto to go on with that run."
        ) from None
