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
from zods.config.deepspeed_json import RunConfig
from zods.files import atomic_write
from zods.kernels import fingerprint
from zods.params.zero3_adapter import is_sharded, release_gathered
from zods.selection.loaders import SelectingLoader
from zods.training import checkpoint
from zods.training.initial_weights import load_initial_weights, save_initial_weights
from zods.training.replicas import Replicas
from zods.training.training_run import TrainingRun
from zods.trajectory.log import Log, LogFile, parse_log
from zods.trajectory.records import Header, ParameterRecord, Record, Refresh, Step
from zods.trajectory.updates import Change, num_terms, replay_, stores_gradient

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
) -> bool:
    """Log the run's steps in `folder`/trajectory.log; where that holds steps already, bring the run
    to their end first.

    run: one that has made no step. replicas: the worlds that it trains with; one that follows reads
    the leader's log, and is to `join` next. checkpoints: where full ones may be; default
    `folder`/checkpoints. new: names of parameters that the base weights lack (a new head, LoRA);
    their first values are kept beside the log. Only rank 0 needs to see the log; checkpoints and
    `initial` must be seen by all.

    Returns whether there was a log. Raises ValueError or OSError, the same on all ranks, where the
    log is damaged, another run writes to it, or it is of another model, data, or batch size.
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
        return _take_up(run, replicas, folder, file, data, checkpoints, new)
    except Exception:
        if file is not None:
            file.close()  # for who mends what was wrong, and tries again
        raise


def _take_up(
    run: TrainingRun,
    replicas: Replicas | None,
    folder: Path,
    file: LogFile | None,
    data: bytes,
    checkpoints: Path,
    new: Collection[str],
) -> bool:
    """Begin a log in `file`, or do what `data`, its content, says, and go on there. file: None on
    other ranks than 0.
    """
    comm, trajectory = run.comm, run.recorder.trajectory
    header = describe(run)
    log = None
    with comm.same_on_all_ranks():
        if b"\n" in data:
            log = drop_trailing_refresh(run.loader, parse_log(data, folder / LOG_NAME))
            _check_run(run, log)
            if run.recorder.follows:
                _check_replica(run.config, log)
    if log is not None and log.header != header:
        load_initial_weights(run, folder / INITIAL, log.header)
        header = describe(run)
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
        _catch_up(run, log, checkpoints)
        trajectory.file = file
        _publish(run, replicas, data[: log.ends[-1]])
    with comm.same_on_all_ranks():
        trajectory.wait()
    trajectory.agree(run.state.global_steps)
    return log is not None


def drop_trailing_refresh(loader: Any, log: Log) -> Log:
    """The log without a refresh at its end, which is then made again, where a selector chooses the
    batch of the step that follows: it does so by the parameters as they were before the refresh."""
    if (
        not isinstance(loader, SelectingLoader)
        or not log.records
        or not isinstance(log.records[-1], Refresh)
    ):
        return log
    return replace(log, records=log.records[:-1], heads=log.heads[:-1], ends=log.ends[:-1])


def open_log(comm: Communicator, folder: Path) -> tuple[LogFile | None, bytes]:
    """The log in a run's folder, which is made where it is not there: its file on rank 0, what it
    holds on all ranks.
    """
    file, data = None, b""
    with comm.same_on_all_ranks():
        if comm.rank == 0:
            file = LogFile(folder / LOG_NAME)
            data = file.read()
    return file, comm.broadcast_bytes(data)


def describe(run: TrainingRun) -> Header:
    """The model as it stands, and the training data. All ranks call it together."""
    run.flush()
    release_gathered(run.deepspeed)
    parameters, comm = run.parameters, run.comm
    shards = sorted([*parameters.shards, *parameters.frozen], key=lambda shard: shard.ordinal)
    own = [
        fingerprint(local, shard.offset)
        for shard, local in parameters.iterate_with_read_ahead(write=False, shards=shards)
    ]
    by_rank = comm.gather_integers([value - (value >> 63 << 64) for value in own])
    trained = {shard.ordinal for shard in parameters}
    records = []
    for shard, *values in zip(shards, *by_rank, strict=True):
        whole = sum(values) % 2**64 if is_sharded(shard.param) else values[0] % 2**64
        odd = [rank for rank, value in enumerate(values) if value != values[0]]
        if odd and not is_sharded(shard.param):
            raise RuntimeError(
                f"rank {', '.join(map(str, odd))}: the weights of {shard.name} differ from rank "
                "0's."
            )
        dtype = str(shard.dtype).removeprefix("torch.")
        records.append(
            ParameterRecord(shard.name, shard.shape, dtype, shard.ordinal in trained, whole)
        )
    names = {id(shard.param): shard.name for shard in shards}
    tied = {
        name: names[id(param)]
        for name, param in run.deepspeed.module.named_parameters(remove_duplicate=False)
        if names[id(param)] != name
    }
    loader = run.loader
    data = None
    if loader is not None and loader.data_digest is not None:
        data = len(loader.dataset), loader.data_digest  # type: ignore[arg-type]
    return Header(type(run.deepspeed.module).__name__, tuple(records), tied, data)


def check_same_model(logged: Header, here: Header, path: str) -> None:
    """Raise ValueError, naming the first difference, unless both are of the same base weights and
    data.
    """
    remedy = "Start from the model that the log was made with."
    if [p.name for p in logged.parameters] != [p.name for p in here.parameters]:
        missing = sorted({p.name for p in logged.parameters} ^ {p.name for p in here.parameters})
        raise ValueError(
            f"{path}: it is of another model: {len(logged.parameters)} parameters there, "
            f"{len(here.parameters)} here, e.g. {', '.join(missing[:3]) or 'in another order'}. "
            f"{remedy}"
        )
    for there, now in zip(logged.parameters, here.parameters, strict=True):
        for key in ("shape", "dtype", "trained", "fingerprint"):
            if getattr(there, key) != getattr(now, key):
                what = "base weights" if key == "fingerprint" else key
                found = (
                    ""
                    if key == "fingerprint"
                    else f" ({getattr(there, key)} there, {getattr(now, key)} here)"
                )
                raise ValueError(
                    f"{path}: {there.name} has another {what}{found} in the log. {remedy}"
                )
    if logged.data is not None and here.data is not None and logged.data != here.data:
        raise ValueError(
            f"{path}: it is of other training data: {logged.data[0]} examples (digest "
            f"{logged.data[1]}), here {here.data[0]} ({here.data[1]}). Resume with the same data."
        )


def _check_run(run: TrainingRun, log: Log) -> None:
    """Raise ValueError if the log cannot be continued under this configuration."""
    there = log.run_at_end()
    if there is None:
        return
    here, world_size = run.recorder.run_record(0), run.comm.world_size
    if there.optimizer is not None:
        raise ValueError(
            f"{log.path}: made by first-order training with {there.optimizer.get('type')}, which "
            "zeroth-order steps cannot go on with. Give another --output_dir, or --optimizer."
        )
    for key in ("method", "direction", "loss_mean"):
        logged, now = getattr(there.section, key), getattr(here.section, key)
        if logged != now:
            raise ValueError(
                f"{log.path}: made with zeroth_order.{key} = {logged}, this run has {now}. Resume "
                "with the same."
            )
    if there.batch != here.batch:
        fits = [
            n
            for n in range(1, 1 + there.batch // world_size)
            if there.batch % (n * world_size) == 0
        ]
        how = (
            f"train_micro_batch_size_per_gpu {fits[-1]} or a divisor of it"
            if fits
            else f"a number of ranks that divides {there.batch}"
        )
        raise ValueError(
            f"{log.path}: made with train_batch_size {there.batch}, this run has {here.batch} on "
            f"{world_size} ranks. The "
            f'global batch stays the same: give "train_batch_size": {there.batch}, and {how}.'
        )
    if (there.section.selector is None) != (here.section.selector is None):
        raise ValueError(
            f"{log.path}: made with{'out' if there.section.selector is None else ''} "
            "zeroth_order.selector."
        )


# --- replicas -------------------------------------------------------------------------------------


def _publish(run: TrainingRun, replicas: Replicas | None, data: bytes) -> None:
    """On the leading replica's rank 0: publish the log as it is, and from now on each record."""
    if replicas is None or not replicas.leads or run.comm.rank != 0:
        return
    for line in data.decode().splitlines():
        replicas.publish(line.partition(" ")[2])
    run.recorder.trajectory.publish = replicas.publish


def _check_replica(config: RunConfig, log: Log) -> None:
    """Raise ValueError where this replica would evaluate other points than the leader does, or keep
    g in another form.
    """
    leading = log.run_at_end()
    if leading is None:
        raise ValueError(
            f"zeroth_order.replicas: the leading replica has not begun yet ({log.path}). Start "
            "this one again."
        )
    there, here = leading.section, config.zeroth_order
    for key in (
        "eps",
        "num_directions",
        "anchor_interval",
        "anchor_directions",
        "share_direction",
        "seed",
        "loss_mean",
    ):
        if getattr(there, key) != getattr(here, key):
            raise ValueError(
                f"zeroth_order.{key}: {getattr(here, key)}, but {getattr(there, key)} at the "
                "leading replica. Give the same."
            )
    accumulation = leading.batch // (leading.about.get("micro_batch", 1) * leading.world_size)
    own = config.deepspeed["gradient_accumulation_steps"]
    if accumulation != own:
        raise ValueError(
            f"gradient_accumulation_steps: {own}, but {accumulation} at the leading replica: they "
            "would share other micro-batches. Give the same."
        )
    if stores_gradient(there) != stores_gradient(here):
        raise ValueError(
            f"zeroth_order.anchor.gradient: {here.anchor.gradient}, but {there.anchor.gradient} at "
            "the leading replica. Either both keep it as terms, or none does."
        )


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
    """Load the newest checkpoint that belongs to the log and is whole; returns the number of
    records it stands for.
    """
    names: list[str] = []
    with run.comm.same_on_all_ranks():
        if run.comm.rank == 0:
            names = [path.name for path in checkpoint.newest_checkpoints(folder)]
    # the same, whatever a rank's disk shows it
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
    if names:  # one that failed late may have left its mark
        check_same_model(log.header, describe(run), log.path)
    return 0


def _head_of(folder: Path, log: Log) -> str:
    """The head of the chain at a checkpoint. Raises ValueError where it is none of the log's."""
    recorder = checkpoint.read_state(folder).get("recorder")
    head = recorder.get("head") if isinstance(recorder, dict) else None
    if head not in log.heads:
        raise ValueError(f"checkpoint {folder}: it does not belong to {log.path}")
    return head


def _read_tail(run: TrainingRun, tail: Sequence[Record]) -> tuple[list[Change], int | None]:
    """Count the steps of the tail, move schedules and loader on. Returns what it does to the
    parameters, and which change is the last step along a new anchor's gradient."""
    changes: list[Change] = []
    refreshed_at = None
    with run.comm.same_on_all_ranks():
        for record in tail:
            change = run.recorder.change(record)
            if isinstance(record, Refresh):
                run.state.anchor_step = record.step
                refreshed_at = refreshed_at if change is None else len(changes)
            if isinstance(record, Step):
                run.advance(record)
            if change is not None:
                changes.append(change)
        steps = [record for record in tail if isinstance(record, Step)]
        loader = run.loader
        if loader is not None and steps and steps[-1].at is not None:
            loader.go_to(steps[-1].at)
    _restore_selections(loader, steps)
    return changes, refreshed_at


def _restore_selections(loader: Any, steps: Sequence[Step]) -> None:
    chosen = [step for step in steps if step.sub_batch is not None]
    if not isinstance(loader, SelectingLoader) or not chosen:
        return
    for step in chosen[:-1]:
        assert step.sub_batch is not None
        loader.selection.selector.restore(step.sub_batch.mean)
    last, at = chosen[-1].sub_batch, chosen[-1].at
    assert last is not None
    assert at is not None
    candidates = loader.candidates(at)
    ids = [candidates[i] for i in last.indices]
    loader.restore_selection(at, ids, last.weights or [1.0] * len(ids), last.mean)


@torch.no_grad()
def _apply(run: TrainingRun, changes: Sequence[Change], refreshed_at: int | None) -> None:
    """Apply changes to this rank's shards in one visit, and keep the anchor of the last refresh
    among them.
    """
    if not changes:
        return
    anchor, parameters = run.anchor, run.parameters
    before, after = changes[: refreshed_at or 0], changes[refreshed_at or 0 :]
    run.flush()
    release_gathered(run.deepspeed)
    total = num_terms(changes) * sum(shard.numel for shard in parameters)
    quiet = run.comm.rank != 0
    with tqdm(
        total=total, desc="log", unit="terms", unit_scale=True, disable=quiet, leave=False
    ) as progress:
        for shard, local in parameters.iterate_with_read_ahead(write=True):
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
    """Begin a log in the folder `to` with the records of `run`'s, up to a checkpoint or all, so
    that it is a whole one.

    Raises ValueError or OSError where the checkpoint does not belong to the log.
    """
    data = (run / LOG_NAME).read_bytes()
    log = parse_log(data, run / LOG_NAME)
    if checkpoint_folder is not None:
        data = data[: log.ends[log.heads.index(_head_of(checkpoint_folder, log))]]
    to.mkdir(parents=True, exist_ok=True)
    if (run / INITIAL).is_file():
        (to / INITIAL).parent.mkdir(exist_ok=True)
        with atomic_write(to / INITIAL) as temporary:
            temporary.write_bytes((run / INITIAL).read_bytes())
    # last: where there is a log, all that belongs to it is there
    with atomic_write(to / LOG_NAME) as temporary:
        temporary.write_bytes(data)
