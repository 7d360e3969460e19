"""Save and load a run, on any number of ranks.

`state.json` has the counters, the schedules, the position in the data and the anchor's terms. The
tensors are this rank's shards of the trainable parameters and of the anchor point
(`zods.training.checkpoint_files`). A crash at any moment leaves whole checkpoints only.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zods.config.schema import ZerothOrderConfig
from zods.core.anchor_weight import AnchorWeight
from zods.core.annealing import Annealing
from zods.core.step_scale import StepScale
from zods.files import make_folder, sync
from zods.params.anchor import Anchor
from zods.params.shards import Shard, ShardedParameters
from zods.params.zero3_adapter import bytes_of, is_sharded, release_gathered
from zods.training.checkpoint_files import (
    ShardFiles,
    find_checkpoint,
    folder_name,
    hidden_folder,
    latest_tag,
    put_in_place,
    read_state,
    remove_old,
    state_text,
    write_tensors,
)
from zods.training.training_run import TrainingRun

# fields of `TrainState`
COUNTERS = (
    "global_steps",
    "global_samples",
    "skipped_steps",
    "nonfinite_in_a_row",
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """The parts of a checkpoint to load; see the keywords of DeepSpeed's `load_checkpoint`.

    module_only: load the parameters only. Steps, schedules and data order stay as they are; the
    anchor is refreshed before the next step. strict: the checkpoint and the run must have the same
    parameters; with False, which needs `module_only`, those in both are loaded. optimizer: load the
    anchor and the state of "anneal"; with False they begin anew. scheduler: load the scheduler's
    state and its step size.
    """

    module_only: bool = False
    strict: bool = True
    optimizer: bool = True
    scheduler: bool = True

    def __post_init__(self) -> None:
        if not self.strict and not self.module_only:
            raise ValueError(
                "load_module_strict=False: a run goes on with all of its parameters only. Give "
                "load_module_only=True as well."
            )


def save_checkpoint(
    run: TrainingRun,
    save_dir: str | Path,
    tag: Any,
    client_state: dict[str, Any],
    keep: int | None = None,
    *,
    save_latest: bool = True,
) -> Path:
    """Write the checkpoint `save_dir`/`tag`. All ranks call it together, after `TrainingRun.flush`.

    The folder is written under a temporary name, renamed when it is whole and synced, and then
    named in the file `latest`. save_dir: a folder that all ranks share. tag: used as str(tag), the
    same on all ranks; default `global_step<N>`. client_state: JSON. keep: number of checkpoints
    named `global_step<N>` that stay, those of the last steps, besides the one written; None keeps
    all. save_latest: False leaves `latest` as it is. Raises ValueError or OSError, the same on all
    ranks, for example for a full disk. Earlier checkpoints then stay good.
    """
    if keep is not None and keep < 1:
        raise ValueError(
            f"checkpoint: keep is {keep}; give the number of checkpoints that are to stay, at "
            "least 1."
        )
    tag = folder_name(f"global_step{run.state.global_steps}" if tag is None else tag)
    comm = run.comm
    comm.check_agreement(tag.encode(), f"the tag of a checkpoint ({tag!r} on this rank)")
    final = Path(save_dir) / tag
    partial = hidden_folder(final, "partial")
    release_gathered(run.deepspeed)
    try:
        with comm.same_on_all_ranks():
            if comm.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                make_folder(final.parent)
                partial.mkdir()
        with comm.same_on_all_ranks():
            own: dict[str, str] = {}
            if comm.rank == 0 or is_sharded(run.parameters.shards[0].param):
                own = _write_shards(run, partial)
        files = {name: digest for rank in comm.gather_objects(own) for name, digest in rank.items()}
        with comm.same_on_all_ranks():
            if comm.rank == 0:
                (partial / "state.json").write_text(_state_text(run, client_state, files))
                sync(partial / "state.json")
                put_in_place(partial, final, save_latest)
                remove_old(final, keep)
    except (ValueError, OSError):
        with comm.same_on_all_ranks():  # gone when any rank goes on
            if comm.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def bytes_per_rank(run: TrainingRun) -> int:
    """About as many bytes as the rank with the largest files writes into a checkpoint; the same on
    all ranks.
    """
    params = [shard.param for shard in run.parameters.shards]
    copies = 2 if run.anchor is not None and run.anchor.point is not None else 1
    return copies * bytes_of(params) // (run.comm.world_size if is_sharded(params[0]) else 1)


def load_checkpoint(
    run: TrainingRun, load_dir: str | Path, tag: Any, wanted: Wanted | None = None
) -> tuple[Path | None, dict[str, Any] | None]:
    """Restore `run` from a checkpoint. Returns the checkpoint's folder and the client state.

    tag: used as str(tag); default: the tag in the file `latest`. Where no rank finds that file,
    nothing is loaded: it warns and returns (None, None). Everything is checked before anything is
    changed. Raises ValueError or OSError, the same on all ranks, for a missing, damaged or
    truncated checkpoint, and for one of another model or method.
    """
    comm, wanted = run.comm, wanted or Wanted()
    with comm.same_on_all_ranks(), _as_written(load_dir):
        name = latest_tag(Path(load_dir)) if tag is None else str(tag)
    missing = comm.sum_over_ranks([float(name is None)])[0]
    if missing == comm.world_size:
        if comm.rank == 0:
            logger.warning(
                "checkpoint %s: no file `latest`; nothing is loaded. Give a tag, or another "
                "folder.",
                load_dir,
            )
        return None, None
    with comm.same_on_all_ranks(), _as_written(load_dir):
        folder = find_checkpoint(Path(load_dir), name)
        saved = read_state(folder)
        client_state = saved["client_state"]
        shards = _check_fits(run, folder, saved, wanted)
        digests = saved.get("files")
        parameters = ShardFiles(folder, "parameters", shards, digests)
        loads_anchor = (
            wanted.optimizer and not wanted.module_only and saved["anchor_step"] is not None
        )
        anchor = run.anchor if loads_anchor else None
        has_point = anchor is not None and anchor.point is not None and saved["anchor_point_stored"]
        point = None
        if has_point:
            point = ShardFiles(folder, "anchor_point", run.parameters.shards, digests)
    release_gathered(run.deepspeed)
    with comm.same_on_all_ranks(), _as_written(folder):
        if run.loader is not None and saved["loader"] is not None and not wanted.module_only:
            run.loader.load_state_dict(saved["loader"])
        for shard, local in run.parameters.iterate_with_read_ahead(write=True, shards=shards):
            local.copy_(parameters.read(shard))
        if anchor is not None:
            _load_anchor(anchor, run.parameters, saved, None if point is None else point.read)
        if not wanted.module_only:
            _load_state(run, saved, wanted)
        if wanted.module_only or not wanted.optimizer:
            run.state.anchor_step = None  # the anchor is refreshed before the next step
    return folder, client_state


@contextmanager
def _as_written(folder: str | Path) -> Iterator[None]:
    """Turn a failure to use the content of a state.json into one clear error.

    Its checksum was right, so another program may have written it.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(
            f"checkpoint {folder}: its state.json is not as zods writes it ({error!r})."
        ) from error


def _write_shards(run: TrainingRun, folder: Path) -> dict[str, str]:
    """Write this rank's files, and sync them. Returns {file name: digest of its metadata}."""
    values = {
        p: local.detach().cpu().clone()
        for p, local in run.parameters.iterate_with_read_ahead(write=False)
    }
    written = write_tensors(folder, "parameters", run.comm, values)
    anchor = run.anchor
    if anchor is not None and anchor.point is not None and run.state.anchor_step is not None:
        cpu = torch.device("cpu")
        values = {p: anchor.stored_point(p, cpu)[: p.numel] for p in run.parameters}
        written |= write_tensors(folder, "anchor_point", run.comm, values)
    return written


def _state_text(run: TrainingRun, client_state: dict[str, Any], files: dict[str, str]) -> str:
    """The text of `state.json`. files: the digests of `_write_shards`, of all ranks."""
    anchor, progress = run.anchor, run.state
    state = {
        "files": files,
        "parameters": [[p.name, list(p.shape), str(p.dtype)] for p in run.parameters],
        "zeroth_order": run.config.zeroth_order.to_dict(),
        **{key: getattr(progress, key) for key in COUNTERS},
        "recorder": run.recorder.state_dict(),
        "annealing": asdict(progress.annealing),
        "scale": asdict(progress.scale),
        "anchor_weight": asdict(progress.anchor_weight),
        "lr": [group["lr"] for group in run.optimizer.param_groups],
        "scheduler": None if run.lr_scheduler is None else run.lr_scheduler.state_dict(),
        "loader": None if run.loader is None else run.loader.state_dict(),
        "anchor_step": progress.anchor_step,
        "anchor_point_stored": anchor is not None and anchor.point is not None,
        "anchor": None if anchor is None else anchor.state_dict(),
        "client_state": client_state,
    }
    try:
        return state_text(state)
    except TypeError as error:
        raise ValueError(
            f"checkpoint: client_state and the scheduler's state must be JSON: {error}"
        ) from error


def _check_fits(
    run: TrainingRun, folder: Path, saved: dict[str, Any], wanted: Wanted
) -> list[Shard]:
    """Return the shards to load. Raises ValueError where the checkpoint does not fit the run."""
    ours = {p.name: [p.name, list(p.shape), str(p.dtype)] for p in run.parameters}
    theirs = {entry[0]: entry for entry in saved["parameters"]}
    shards = list(run.parameters)
    if not wanted.strict:
        shards = [shard for shard in shards if shard.name in theirs]
        left_out = sorted(ours.keys() ^ theirs.keys())
        if left_out and run.comm.rank == 0:
            logger.warning(
                "checkpoint %s: not loaded, as not in both: %s", folder, ", ".join(left_out[:5])
            )
        ours = {shard.name: ours[shard.name] for shard in shards}
        theirs = {name: theirs[name] for name in ours}
    if list(theirs.values()) != list(ours.values()):
        odd = [
            pair for pair in zip(theirs.values(), ours.values(), strict=False) if pair[0] != pair[1]
        ]
        found, expected = odd[0] if odd else (f"{len(theirs)} parameters", f"{len(ours)}")
        raise ValueError(
            f"checkpoint {folder}: it is of another model: found {found}, this model has "
            f"{expected}. Load the model and the set of trainable parameters that it was made with."
        )
    if not wanted.module_only:
        _check_same_course(run, folder, saved, wanted)
    return shards


def _sections(run: TrainingRun, saved: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The section of the checkpoint, with the defaults of keys that it does not know, and the run's."""
    there = {**ZerothOrderConfig().to_dict(), **saved["zeroth_order"]}
    return there, run.config.zeroth_order.to_dict()


def _check_same_course(
    run: TrainingRun, folder: Path, saved: dict[str, Any], wanted: Wanted
) -> None:
    for key in COUNTERS:
        if type(saved[key]) is not int:
            raise TypeError(f"{key} is {saved[key]!r}")
    there, here = _sections(run, saved)
    for key in ("method", "direction", "loss_mean", "objective", "generate"):
        if there[key] != here[key]:
            raise ValueError(
                f"checkpoint {folder}: made with zeroth_order.{key} = {there[key]!r}, this run has "
                f"{here[key]!r}. Resume with the same."
            )
    if wanted.scheduler and (saved["scheduler"] is None) != (run.lr_scheduler is None):
        raise ValueError(
            f"checkpoint {folder}: made "
            + (
                'without a scheduler, but this run has one. Set "scheduler": null in the DeepSpeed '
                "JSON; zods.finetune has a schedule by default where the step size is measured."
                if saved["scheduler"] is None
                else 'with a scheduler, but this run has none. Add its section "scheduler".'
            )
        )
    if wanted.scheduler and run.lr_scheduler is not None:
        measured = [values["lr"] == "auto" for values in (there, here)]
        if measured[0] != measured[1]:
            raise ValueError(
                f"checkpoint {folder}: made with zeroth_order.lr = {there['lr']!r}, this run has "
                f'{here["lr"]!r}. Its schedule holds factors where lr is "auto", and step sizes '
                "otherwise."
            )


def _load_anchor(
    anchor: Anchor,
    parameters: ShardedParameters,
    saved: dict[str, Any],
    stored: Callable[[Shard], torch.Tensor] | None,
) -> None:
    """Restore the anchor.

    stored: reads a shard of the saved anchor point; None reconstructs it from the parameters.
    """
    anchor.load_state_dict(saved["anchor"])
    anchor.set_gradient(anchor.gradient_terms)
    if anchor.point is None:
        return
    for shard, local in parameters.iterate_with_read_ahead(write=False):
        anchor.point.write(
            shard, anchor.reconstruct(shard, local) if stored is None else stored(shard)
        )


def _load_state(run: TrainingRun, saved: dict[str, Any], wanted: Wanted) -> None:
    """Restore the counters, the recorder and the schedules."""
    state = run.state
    for key in COUNTERS:
        setattr(state, key, saved[key])
    run.recorder.load_state_dict(
        saved["recorder"], () if run.anchor is None else run.anchor.gradient_terms
    )
    # an lr of "auto" and `anneal` have different rules, each with its own use of the state
    rules = [(section["lr"] == "auto", section["anneal"]) for section in _sections(run, saved)]
    keeps = wanted.optimizer and rules[0] == rules[1]
    state.annealing = Annealing(**saved["annealing"]) if keeps else Annealing()
    known = saved if wanted.optimizer else {}  # checkpoints of earlier versions have neither
    state.scale = StepScale(**known.get("scale", {}))
    state.anchor_weight = AnchorWeight(**known.get("anchor_weight", {}))
    state.anchor_step = saved["anchor_step"]
    if run.lr_scheduler is not None and wanted.scheduler:
        run.lr_scheduler.load_state_dict(saved["scheduler"])
        for group, lr in zip(run.optimizer.param_groups, saved["lr"], strict=True):
            group["lr"] = lr
