"""Check that a run continues the log that it is given: same model, data, batch and configuration.

Called by `zods.training.resume` before anything is changed.
"""

from __future__ import annotations

from pathlib import Path

from zods.comm.communicator import Communicator
from zods.config.deepspeed_json import RunConfig
from zods.data.loader import TrainingLoader
from zods.kernels import fingerprint
from zods.params.zero3_adapter import is_sharded, release_gathered
from zods.selection.loaders import SelectingLoader
from zods.training.training_run import TrainingRun
from zods.trajectory.log import Log, is_torn_first_line
from zods.trajectory.records import Header, ParameterRecord
from zods.trajectory.updates import stores_gradient


def check_new(comm: Communicator, path: Path, data: bytes) -> None:
    """Raise ValueError, on all ranks, where a new run's log has content."""
    with comm.same_on_all_ranks():
        if data:
            raise ValueError(
                f"{path}: another run has written to it since this one was started. Give another "
                "folder, or --resume auto to go on with that run."
            )


def check_not_lost(path: Path, data: bytes, checkpoints: Path) -> None:
    """Raise ValueError where a log without a whole line is not that of a new run.

    A new run's log is empty, or has a part of its first line if the run was killed while it wrote
    that line. In every other case its content was lost, or it is another program's file.
    """
    if b"\n" in data:
        return
    remedy = (
        "Put the log back from a copy, or start a new run in another folder. To start this one from "
        "step 0, remove the file{} first."
    )
    saved = sorted(
        entry.name
        for entry in (checkpoints.iterdir() if checkpoints.is_dir() else ())
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if saved:
        raise ValueError(
            f"{path}: {'not a trajectory log' if data else 'missing or empty'}, but {checkpoints} "
            f"has checkpoints ({', '.join(saved[-3:])}), which no run can resume without its log. "
            + remedy.format(f" and {checkpoints}")
        )
    if not is_torn_first_line(data):
        raise ValueError(
            f"{path}: found {len(data)} bytes that are not of a trajectory log: its content was "
            "lost, or it is another program's file. " + remedy.format("")
        )


def describe(run: TrainingRun) -> Header:
    """Describe the model as it is now, and the training data. All ranks call it together."""
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
    data = describe_data(run.loader)
    return Header(type(run.deepspeed.module).__name__, tuple(records), tied, data)


def describe_data(loader: TrainingLoader | SelectingLoader | None) -> tuple[int, str] | None:
    """(number of examples, digest) of the training data; None where there is no digest."""
    if loader is None or loader.data_digest is None:
        return None
    return len(loader.dataset), loader.data_digest  # type: ignore[arg-type]


def check_same_model(logged: Header, here: Header, path: str) -> None:
    """Raise ValueError, naming the first difference, where the base weights or the data differ."""
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


def check_run(run: TrainingRun, log: Log) -> None:
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


def check_replica(config: RunConfig, log: Log) -> None:
    """Raise ValueError where this replica would evaluate other points than the leader, or store the
    anchor gradient where the leader keeps its terms, or the reverse.
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
