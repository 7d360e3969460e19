"""Save and load a run, on any number of ranks.

A checkpoint is a folder: `state.json` (counters, schedules, the anchor's terms, the loader's place)
and per rank one safetensors file of its shards of the trainable parameters, and one of the anchor
point where that is stored. Shards follow one another in rank order, so that another number of ranks
cuts them anew. A file's metadata has the fingerprint of each of its tensors, `state.json` its own
checksum. Nothing is unpickled.

A crash at any moment leaves whole checkpoints only, and names that start with a dot, which the next
save removes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from zods.config.schema import ZerothOrderConfig
from zods.core.annealing import Annealing
from zods.files import atomic_write, rename, sync
from zods.kernels import fingerprint
from zods.params.anchor import Anchor
from zods.params.shards import Shard, ShardedParameters
from zods.params.zero3_adapter import is_sharded, release_gathered
from zods.training.training_run import TrainingRun

FORMAT = 2
# fields of `TrainState`
COUNTERS = (
    "global_steps",
    "global_samples",
    "skipped_steps",
    "nonfinite_in_a_row",
)
# tag; what became of the folder, see `save_checkpoint`
HIDDEN = re.compile(r"\.(.+)\.(partial|replaced|removed)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """The parts of a checkpoint that are to be loaded: the keywords of DeepSpeed's
    `load_checkpoint`.

    module_only: the parameters alone; the run's steps, schedules, data order and anchor stay as
    they are, but for the anchor, which is made anew. strict: with `module_only`, all parameters
    must be in both; else those in both are loaded. optimizer: the anchor and the state of "anneal";
    without, they begin anew. scheduler: the scheduler's state and its step size.
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
    """Write `save_dir`/`tag` under a temporary name, rename it when it is whole and on the disk,
    then point `latest` to it.

    Nothing is deferred (`TrainingRun.flush`). tag: str(tag), the same on all ranks; default
    `global_step<N>`. client_state: JSON. `save_dir` is shared by all ranks. keep: of the
    checkpoints named `global_step<N>` only the last so many by their step stay, and the one
    written; None: all stay. save_latest: False leaves `latest` as it is. Raises ValueError or
    OSError, the same on all ranks, as for a full disk; what was there before stays good.
    """
    if keep is not None and keep < 1:
        raise ValueError(
            f"checkpoint: keep is {keep}; give the number of checkpoints that are to stay, at "
            "least 1."
        )
    tag = _folder_name(f"global_step{run.state.global_steps}" if tag is None else tag)
    comm = run.comm
    comm.check_agreement(tag.encode(), f"the tag of a checkpoint ({tag!r} on this rank)")
    final = Path(save_dir) / tag
    partial = _hidden(final, "partial")
    release_gathered(run.deepspeed)
    try:
        with comm.same_on_all_ranks():
            if comm.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with comm.same_on_all_ranks():
            if comm.rank == 0 or is_sharded(run.parameters.shards[0].param):
                _write_slices(run, partial)
            if comm.rank == 0:
                (partial / "state.json").write_text(_state_text(run, client_state))
                sync(partial / "state.json")
        with comm.same_on_all_ranks():
            if comm.rank == 0:
                _put_in_place(partial, final, save_latest)
                _remove_old(final, keep)
    except (ValueError, OSError):
        with comm.same_on_all_ranks():  # gone when any rank goes on
            if comm.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _folder_name(tag: Any) -> str:
    """A tag as the name of a folder.

    Raises ValueError where it is none, or one that zods uses itself.
    """
    name = str(tag)
    if name in ("", "latest") or name.startswith(".") or "/" in name or "\0" in name:
        raise ValueError(
            f"checkpoint: the tag {name!r} cannot be the name of a checkpoint's folder. Give a "
            "name without '/' that is not 'latest' and does not begin with '.'."
        )
    return name


def newest_checkpoints(save_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a folder, that of the last step first; for who falls back from a
    damaged one to the next.

    `load_checkpoint(run, found.parent, found.name)` loads one, and only there its tensors are
    verified.
    """
    entries = [entry.name for entry in Path(save_dir).iterdir()] if Path(save_dir).is_dir() else []
    tags = {found[1] if (found := HIDDEN.fullmatch(name)) else name for name in entries}
    steps = {}
    for folder in (_folder_of(Path(save_dir), tag) for tag in tags):
        try:
            steps[folder] = int(read_state(folder)["global_steps"])
        except (ValueError, OSError, KeyError, TypeError):
            continue
    return sorted(steps, key=lambda folder: (steps[folder], folder.name), reverse=True)


def load_checkpoint(
    run: TrainingRun, load_dir: str | Path, tag: Any, wanted: Wanted | None = None
) -> tuple[Path | None, dict[str, Any] | None]:
    """Bring `run` to where the checkpoint stands; returns its folder and the client state.

    tag: str(tag); default what `latest` says, and where no rank finds that, nothing is loaded:
    (None, None), and a warning. Everything is checked before anything is changed: ValueError or
    OSError, the same on all ranks, for a missing, damaged or truncated checkpoint, and for one of
    another model or method.
    """
    comm, wanted = run.comm, wanted or Wanted()
    with comm.same_on_all_ranks(), _as_written(load_dir):
        name = _latest(Path(load_dir)) if tag is None else str(tag)
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
        folder = _find(Path(load_dir), name)
        saved = read_state(folder)
        client_state = saved["client_state"]
        shards = _check_fits(run, folder, saved, wanted)
        parameters = _ShardFiles(folder, "parameters", shards)
        loads_anchor = (
            wanted.optimizer and not wanted.module_only and saved["anchor_step"] is not None
        )
        anchor = run.anchor if loads_anchor else None
        has_point = anchor is not None and anchor.point is not None and saved["anchor_point_stored"]
        point = _ShardFiles(folder, "anchor_point", run.parameters.shards) if has_point else None
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
    """Turn any failure to use a state.json, which another program may have written with the right
    checksum, into one clear error.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(
            f"checkpoint {folder}: its state.json is not as zods writes it ({error!r})."
        ) from error


def _write_slices(run: TrainingRun, folder: Path) -> None:
    """This rank's files, on the disk when it returns."""
    tensors = {
        p.name: local.detach().cpu().clone()
        for p, local in run.parameters.iterate_with_read_ahead(write=False)
    }
    _write_tensors(run, folder, "parameters", tensors)
    if (
        run.anchor is not None
        and run.anchor.point is not None
        and run.state.anchor_step is not None
    ):
        cpu = torch.device("cpu")
        tensors = {p.name: run.anchor.stored_point(p, cpu)[: p.numel] for p in run.parameters}
        _write_tensors(run, folder, "anchor_point", tensors)


def _write_tensors(
    run: TrainingRun, folder: Path, role: str, tensors: dict[str, torch.Tensor]
) -> None:
    path = folder / f"{role}-rank{run.comm.rank:05d}-of-{run.comm.world_size:05d}.safetensors"
    try:
        save_file(
            tensors,
            path,
            {
                p.name: _fingerprint_text(tensors[p.name], min(p.offset, p.whole_numel))
                for p in run.parameters
            },
        )
    except SafetensorError as error:  # among other causes, a full disk
        raise OSError(f"checkpoint {path}: {error}") from error
    sync(path)


def _fingerprint_text(shard: torch.Tensor, offset: int) -> str:
    """offset: in the whole parameter, so that a shard in another's place is found out."""
    return f"{fingerprint(shard, offset):016x}"


def _hidden(folder: Path, fate: str) -> Path:
    return folder.with_name(f".{folder.name}.{fate}")


def _folder_of(save_dir: Path, tag: str) -> Path:
    """Return the folder of the checkpoint `tag`. A crash between the renames of `_put_in_place`
    leaves it under another name.
    """
    folder = save_dir / tag
    replaced = _hidden(folder, "replaced")
    return replaced if replaced.is_dir() and not folder.exists() else folder


def _put_in_place(partial: Path, final: Path, save_latest: bool) -> None:
    sync(partial)
    if final.exists():
        replaced = _hidden(final, "replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        rename(final, replaced)
    rename(partial, final)
    sync(final.parent)  # before `latest` names it
    if save_latest:
        with atomic_write(final.parent / "latest") as temporary:
            temporary.write_text(final.name)


def _remove_old(written: Path, keep: int | None) -> None:
    """Remove all but the last `keep` checkpoints, and what a crash left. What cannot be removed is
    a warning: the new checkpoint is good."""
    save_dir = written.parent
    numbered = [f for f in newest_checkpoints(save_dir) if re.fullmatch(r"global_step\d+", f.name)]
    try:
        for folder in [] if keep is None else numbered[keep:]:
            if folder != written:
                # from here on it is no checkpoint any more, however far its removal gets
                shutil.rmtree(_hidden(folder, "removed"), ignore_errors=True)
                rename(folder, _hidden(folder, "removed"))
        sync(save_dir)
        for entry in save_dir.iterdir():
            if HIDDEN.fullmatch(entry.name) and entry.is_dir():
                shutil.rmtree(entry)
    except OSError as error:
        logger.warning("checkpoint %s: an old one is not removed: %s", written, error)


def _state_text(run: TrainingRun, client_state: dict[str, Any]) -> str:
    anchor, progress = run.anchor, run.state
    state = {
        "format": FORMAT,
        "parameters": [[p.name, list(p.shape), str(p.dtype)] for p in run.parameters],
        "zeroth_order": run.config.zeroth_order.to_dict(),
        **{key: getattr(progress, key) for key in COUNTERS},
        "recorder": run.recorder.state_dict(),
        "annealing": asdict(progress.annealing),
        "lr": [group["lr"] for group in run.optimizer.param_groups],
        "scheduler": None if run.lr_scheduler is None else run.lr_scheduler.state_dict(),
        "loader": None if run.loader is None else run.loader.state_dict(),
        "anchor_step": progress.anchor_step,
        "anchor_point_stored": anchor is not None and anchor.point is not None,
        "anchor": None if anchor is None else anchor.state_dict(),
        "client_state": client_state,
    }
    try:
        return json.dumps({**state, "checksum": _checksum(state)}, indent=1)
    except TypeError as error:
        raise ValueError(
            f"checkpoint: client_state and the scheduler's state must be JSON: {error}"
        ) from error


def _checksum(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _latest(load_dir: Path) -> str | None:
    """The tag that the file `latest` names, None where there is no such file."""
    latest = load_dir / "latest"
    return latest.read_text(errors="replace").strip() if latest.is_file() else None


def _find(load_dir: Path, tag: str | None) -> Path:
    if tag is None:
        raise FileNotFoundError(
            f"checkpoint {load_dir}: no file `latest`, which other ranks find. All share one "
            "folder."
        )
    folder = _folder_of(load_dir, tag)
    if not (folder / "state.json").is_file():
        raise FileNotFoundError(
            f"checkpoint {folder}: no state.json. It is not a checkpoint of zods, or is incomplete."
        )
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / "state.json").read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"checkpoint {folder}/state.json: damaged or truncated: {error}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {folder}: not of format {FORMAT}, which this version of zods reads."
        )
    if state.pop("checksum", None) != _checksum(state):
        raise ValueError(f"checkpoint {folder}/state.json: damaged: its checksum is wrong.")
    return state


def _check_fits(
    run: TrainingRun, folder: Path, saved: dict[str, Any], wanted: Wanted
) -> list[Shard]:
    """The parameters to load. Raises ValueError where the checkpoint does not fit the run."""
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


def _check_same_course(
    run: TrainingRun, folder: Path, saved: dict[str, Any], wanted: Wanted
) -> None:
    for key in COUNTERS:
        if type(saved[key]) is not int:
            raise TypeError(f"{key} is {saved[key]!r}")
    there = {**ZerothOrderConfig().to_dict(), **saved["zeroth_order"]}
    here = run.config.zeroth_order.to_dict()
    for key in ("method", "direction", "loss_mean"):
        if there[key] != here[key]:
            raise ValueError(
                f"checkpoint {folder}: made with zeroth_order.{key} = {there[key]!r}, this run has "
                f"{here[key]!r}. Resume with the same."
            )
    if wanted.scheduler and (saved["scheduler"] is None) != (run.lr_scheduler is None):
        raise ValueError(
            f"checkpoint {folder}: made {'without' if saved['scheduler'] is None else 'with'} a "
            "scheduler."
        )


def _load_anchor(
    anchor: Anchor,
    parameters: ShardedParameters,
    saved: dict[str, Any],
    stored: Callable[[Shard], torch.Tensor] | None,
) -> None:
    """stored: reads a shard of the anchor point; None where the point follows from the parameters."""
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
    state.annealing = Annealing(**saved["annealing"]) if wanted.optimizer else Annealing()
    state.anchor_step = saved["anchor_step"]
    if run.lr_scheduler is not None and wanted.scheduler:
        run.lr_scheduler.load_state_dict(saved["scheduler"])
        for group, lr in zip(run.optimizer.param_groups, saved["lr"], strict=True):
            group["lr"] = lr


class _ShardFiles:
    """The files of one role, all ranks' shards of a parameter taken as one whole.

    Checked when opened, without keeping what is read: that none is missing, and every saved shard
    that this rank takes elements from, whole, by its fingerprint.
    """

    def __init__(self, folder: Path, role: str, shards: Sequence[Shard]) -> None:
        self._files = [
            _TensorFile(path) for path in sorted(folder.glob(f"{role}-rank*-of-*.safetensors"))
        ]
        if not self._files:
            raise ValueError(f"checkpoint {folder}: no file of the {role}. It is incomplete.")
        for shard in shards:
            found = sum(file.shard_of(shard).numel() for file in self._files)
            if found != shard.whole_numel:
                raise ValueError(
                    f"checkpoint {folder}: {shard.name} has {found} of {shard.whole_numel} "
                    f"elements in the {len(self._files)} files of the {role}. A rank's file is "
                    "missing."
                )
        for shard in shards:
            for file, start, low, high in self._parts(shard):
                # an empty one is of no rank: all look at it
                if low < high or file.shard_of(shard).numel() == 0:
                    file.verify(shard, start)

    def _parts(self, shard: Shard) -> Iterator[tuple[_TensorFile, int, int, int]]:
        """(file, where its shard starts in the whole, first and last + 1 of the shard's elements
        that are this rank's).
        """
        start = 0
        for file in self._files:
            end = start + file.shard_of(shard).numel()
            yield (
                file,
                start,
                max(shard.offset, start) - start,
                min(shard.offset + shard.numel, end) - start,
            )
            start = end

    def read(self, shard: Shard) -> torch.Tensor:
        """This rank's elements of `shard`."""
        parts = [
            file.shard_of(shard)[low:high]
            for file, _, low, high in self._parts(shard)
            if low < high
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=shard.dtype)


class _TensorFile:
    """A safetensors file whose metadata has the fingerprint of each tensor.

    Raises ValueError or OSError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._readable = False
        try:
            self._file: Any = safe_open(path, framework="pt")
            self._fingerprints: dict[str, str] = self._file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"checkpoint {path}: damaged or truncated: {error}") from error

    def shard_of(self, shard: Shard) -> torch.Tensor:
        """1-D, mapped from the file, not verified."""
        try:
            saved = self._file.get_tensor(shard.name)
        except SafetensorError as error:
            raise ValueError(f"checkpoint {self._path}: {shard.name}: damaged: {error}") from error
        if saved.dtype != shard.dtype or saved.dim() != 1:
            raise ValueError(
                f"checkpoint {self._path}: {shard.name}: damaged: {saved.dtype} of shape "
                f"{list(saved.shape)} instead of {shard.dtype} in one dimension."
            )
        return saved

    def verify(self, shard: Shard, start: int) -> None:
        """start: of the shard in the whole parameter."""
        if not self._readable:
            with open(
                self._path, "rb"
            ) as file:  # an unreadable file raises here; mapped, it would be a signal
                while file.read(1 << 20):
                    pass
            self._readable = True
        if self._fingerprints.get(shard.name) != _fingerprint_text(self.shard_of(shard), start):
            raise ValueError(
                f"checkpoint {self._path}: {shard.name}: damaged: its fingerprint is not the one "
                "it was saved with. Load another checkpoint."
            )
