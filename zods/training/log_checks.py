"""Check that a run continues the log that it is given: same model, data, batch and configuration.

Called by `zods.training.resume` and `zods.training.first_order` before anything is changed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zods.comm.communicator import Communicator
from zods.config.deepspeed_json import FirstOrderConfig, RunConfig
from zods.config.schema import ZerothOrderConfig
from zods.config.selector_section import SelectorConfig
from zods.training.description import num_digested
from zods.training.training_run import TrainingRun
from zods.trajectory.log import Log, is_torn_first_line
from zods.trajectory.records import EARLIER, Header, RunRecord
from zods.trajectory.updates import stores_gradient

logger = logging.getLogger(__name__)

ORDER_KEYS = ("group_by_length", "mixture")  # keys that decide on the examples of a step


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
    for key, there in (logged.config or {}).items():
        now = (here.config or {}).get(key, there)  # another version of transformers may lack a key
        if there != now:
            raise ValueError(
                f"{path}: the model's configuration differs: {key} is {_text(there)} in the log, "
                f"{_text(now)} here. {remedy}"
            )
    if logged.data is None or here.data is None:
        return
    # the digests of earlier versions of zods cannot be compared
    compared = slice(2 if num_digested(logged) is not None else 1)
    if logged.data[compared] != here.data[compared]:
        raise ValueError(
            f"{path}: it is of other training data (or other target data): {logged.data[0]} examples (digest "
            f"{logged.data[1]}), here {here.data[0]} ({here.data[1]}). Resume with the same data."
        )


def _text(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


def warn_of_changes(log: Log, here: RunRecord) -> None:
    """Say in one line which settings differ from those of the log's last steps.

    here: the record of this run's configuration.
    """
    there = log.run_at_end()
    changed = [] if there is None else _changes(there, here)
    if changed:
        logger.warning("%s: from here on with other settings: %s", log.path, "; ".join(changed))


def warn_of_other_code(log: Log, here: RunRecord) -> None:
    """Say in one line where this replica runs other code than the leader, whose log it is."""
    there = log.run_at_end()
    changed = [] if there is None else _changes(replace(here, code=there.code), here)
    if changed:
        logger.warning(
            "zeroth_order.replicas: this replica runs other code than the leading one (there -> "
            "here), so that their losses may differ: %s",
            "; ".join(changed),
        )


def _changes(there: RunRecord, here: RunRecord) -> list[str]:
    """Each setting that differs, as "key: old -> new"."""
    left_out = {f"zeroth_order.{key}": value for key, value in EARLIER.items()}
    if there.code is not None:
        left_out["code.image"] = None  # a run outside of an image records none
    old, new = (left_out | _flatten(record.to_json()) for record in (there, here))
    # a log of an earlier version lacks code, or parts of it, and updates
    lacks = ["code.", *(["updates."] if there.updates is None else [])]
    new = {key: new[key] for key in new if not key.startswith(tuple(lacks)) or key in old}
    return [
        f"{key.removeprefix('about.')}: {_text(old.get(key))} -> {_text(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if key != "run" and old.get(key) != new.get(key)
    ]


def _flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The values of nested mappings, by their dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = value
    return flat


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
    _check_same_keys(
        log.path,
        *(there.section, here.section),
        ("method", "direction", "loss_mean", "objective", "generate", *ORDER_KEYS),
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


def _check_same_keys(
    path: str, logged: ZerothOrderConfig, here: ZerothOrderConfig, keys: Sequence[str]
) -> None:
    """Raise ValueError for the first of `keys` with another value than in the log."""
    for key in keys:
        there, now = getattr(logged, key), getattr(here, key)
        if there != now:
            raise ValueError(
                f"{path}: made with zeroth_order.{key} = {there}, this run has {now}. Resume with "
                "the same."
            )


def check_same_optimizer(log: Log, config: FirstOrderConfig) -> None:
    """Raise ValueError where the steps of a first-order log were made with another optimizer, mean
    of the loss, clipping or precision.
    """
    run = log.run_at_end()
    if run is None:
        return
    _check_same_keys(log.path, run.section, config.zeroth_order, ("loss_mean", *ORDER_KEYS))
    if run.optimizer is not None and run.optimizer != config.optimizer:
        raise ValueError(
            f"{log.path}: made with the optimizer {run.optimizer}, this run has "
            f"{config.optimizer}. A checkpoint restores the optimizer's settings, so that "
            "these would be ignored. Resume with the same, or start a new run."
        )
    logged = config.updates if run.updates is None else run.updates  # None: of an earlier version
    for key in sorted(logged.keys() | config.updates.keys()):
        there, here = logged.get(key), config.updates.get(key)
        if there != here:
            raise ValueError(
                f"{log.path}: made with {key} = {_text(there)}, this run has {_text(here)}. A "
                "checkpoint restores the old value in some stages of ZeRO, so that this one would "
                "be ignored. Resume with the same, or start a new run."
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
        "examples_per_direction",
        "anchor_interval",
        "anchor_directions",
        "anchor_split",
        "anchor_examples",
        "anchor_weight",
        "normalize",
        "share_direction",
        "seed",
        "loss_mean",
        "objective",
        *ORDER_KEYS,
        "generate",
    ):
        if getattr(there, key) != getattr(here, key):
            raise ValueError(
                f"zeroth_order.{key}: {getattr(here, key)}, but {getattr(there, key)} at the "
                "leading replica. Give the same."
            )
    check_same_selector(there.selector, here.selector)
    if (there.lr == "auto") != (here.lr == "auto"):
        raise ValueError(
            f"zeroth_order.lr: {here.lr}, but {there.lr} at the leading replica. Give the same."
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


def check_same_selector(there: SelectorConfig | None, here: SelectorConfig | None) -> None:
    """Raise ValueError where this replica would choose other examples than the leader. The path of
    the target file may differ.
    """
    if there is None or here is None:
        if there is not here:
            given, leading = ("none", "one") if here is None else ("given", "none")
            raise ValueError(
                f"zeroth_order.selector: {given}, but {leading} at the leading replica. Give the "
                "same."
            )
        return
    for name in sorted(type(here).model_fields.keys() - {"target_file"}):
        if getattr(there, name) != getattr(here, name):
            raise ValueError(
                f"zeroth_order.selector.{name}: {getattr(here, name)}, but {getattr(there, name)} "
                "at the leading replica. Give the same."
            )
