"""Checkpoints of first-order training: DeepSpeed's own, with a manifest of their files.

DeepSpeed 0.19.8 does not sync the files of a checkpoint, and a crash can leave a folder half
written or its file `latest` empty. So the manifest is written last, when all files are on the disk:
a folder with a manifest is whole. The manifest has a digest of each file, and the head of the log's
chain, by which a checkpoint belongs to one log. DeepSpeed's files are pickles; nothing here, nor
DeepSpeed's own load, runs code that a file names. Optimizer states on NVMe are files that DeepSpeed
copies into the folder OFFLOADED of the checkpoint, without format or checksum.

Called by `zods.training.first_order`.
"""

from __future__ import annotations

import enum
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from zods.comm.communicator import Communicator
from zods.files import atomic_write, check_regular, make_folder, sync, sync_tree, write_errors
from zods.training.checkpoint_files import hide_removed, latest_tag, write_latest
from zods.trajectory.log import Log

MANIFEST = "zods.json"
PICKLE = ".pt"
OFFLOADED = "offloaded_tensors"  # in the folder of a checkpoint
WRITERS = ("PytorchStreamWriter", "inline_container")  # in messages of torch's writer, 2.13

logger = logging.getLogger(__name__)


def _enum_member(kind: Any, name: Any) -> Any:
    """The member of an enumeration, which Python before 3.11.4 pickles as getattr(kind, name).

    Raises UnpicklingError for any other attribute.
    """
    if not isinstance(kind, enum.EnumMeta) or name not in kind.__members__:
        raise pickle.UnpicklingError(f"GLOBAL getattr of {kind!r:.100}")
    return kind[name]


# classes of objects in a checkpoint of DeepSpeed 0.19.8, besides those that torch allows
CLASSES_IN_CHECKPOINTS: list[Any] = [
    LossScaler,
    ZeroStageEnum,
    fragment_address,
    (_enum_member, "builtins.getattr"),
]


class OtherRanks(ValueError):
    """A checkpoint of another number of ranks. Older checkpoints do not help."""


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    ranks: their number. files: path in the checkpoint -> digest. head: of the log's chain at the
    checkpoint; None in manifests of earlier versions, which also lack the files in OFFLOADED.
    """

    ranks: int
    files: dict[str, str]
    head: str | None = None


def folder_of_step(save_dir: Path, step: int) -> Path:
    return save_dir / f"global_step{step}"


def unseal(folder: Path, comm: Communicator) -> None:
    """Make the folder of checkpoints, and remove the manifest of one that is written again.

    DeepSpeed 0.19.8 cannot write the folder OFFLOADED where it exists, so it is removed, too.
    """
    with comm.same_on_all_ranks():
        if comm.rank == 0:
            make_folder(folder.parent)
            (folder / MANIFEST).unlink(missing_ok=True)
            if (folder / OFFLOADED).exists():
                shutil.rmtree(folder / OFFLOADED)


@contextmanager
def full_disk_as_os_error(folder: Path) -> Iterator[None]:
    """Have an error of torch's writer, which names no path, be an OSError that names `folder`."""
    try:
        with write_errors(folder):
            yield
    except RuntimeError as error:
        if not any(text in str(error) for text in WRITERS):
            raise
        raise OSError(f"{folder}: cannot be written: {error}") from error


def seal(folder: Path, comm: Communicator, head: str) -> None:
    """Sync the files of a checkpoint, then write its manifest and the file `latest`.

    All ranks call it together, when DeepSpeed has written all files. head: of the log's chain.
    """
    own: dict[str, str] = {}
    with comm.same_on_all_ranks():
        for path in _files(folder)[comm.rank :: comm.world_size]:
            sync(path)
            own[_name(path, folder)] = _digest(path)
    digests = {name: digest for rank in comm.gather_objects(own) for name, digest in rank.items()}
    with comm.same_on_all_ranks():
        if comm.rank == 0:
            sync_tree(folder)  # the names of the files
            with atomic_write(folder / MANIFEST) as temporary:
                temporary.write_text(json.dumps(asdict(Manifest(comm.world_size, digests, head))))
            sync(folder.parent)
            write_latest(folder)


def remove_old(written: Path, keep: int) -> None:
    """Remove all numbered checkpoints but the last `keep` ones and the one just written."""
    save_dir = written.parent
    for old in _numbered(save_dir)[keep:]:
        if old != written:
            removed = hide_removed(old)
            sync(save_dir)
            shutil.rmtree(removed, ignore_errors=True)


def checkpoints_in(load_dir: Path) -> list[Path]:
    """The checkpoints in a folder, the last step's first.

    Those with a manifest; if there is none, the one that `latest` names, which an earlier version
    wrote without a manifest.
    """
    sealed = [folder for folder in _numbered(load_dir) if (folder / MANIFEST).is_file()]
    if sealed:
        return sealed
    tag = latest_tag(load_dir)
    return [folder for folder in _numbered(load_dir) if folder.name == tag and _files(folder)]


def unsealed_in(load_dir: Path) -> list[Path]:
    """The numbered folders that a crash left half written."""
    whole = checkpoints_in(load_dir)
    return [folder for folder in _numbered(load_dir) if folder not in whole]


def records_at(folder: Path, log: Log) -> int:
    """The number of the log's records that a checkpoint stands for.

    A checkpoint of an earlier version names no head. It is taken for one of this log where the log
    has as many steps. Raises ValueError where the checkpoint does not belong to the log.
    """
    head = _read_manifest(folder).head if (folder / MANIFEST).is_file() else None
    if head is None:
        step = _step_of(folder)
        if log.num_steps < step:
            raise ValueError(
                f"checkpoint {folder}: it does not belong to {log.path}, which has only "
                f"{log.num_steps} steps."
            )
        return len(log.until(step))
    if head not in log.heads:
        raise ValueError(
            f"checkpoint {folder}: it does not belong to {log.path}, which has {log.num_steps} "
            f"steps: the head {head}, at which it was made, is not in the log."
        )
    return log.heads.index(head)


def check(folder: Path, comm: Communicator) -> None:
    """Check all files of a checkpoint. All ranks call it together.

    Raises ValueError or OSError, the same on all ranks, where a file is damaged, is missing or does
    not belong to the checkpoint, or holds more than data. Raises OtherRanks where the checkpoint is
    of another number of ranks. Logs a warning where an earlier version kept no digests.
    """
    files = _files(folder)
    with comm.same_on_all_ranks(), only_data():
        check_regular(*files)
        for path in files[comm.rank :: comm.world_size]:
            if path.suffix == PICKLE:
                _check_only_data(path)
    with comm.same_on_all_ranks():
        manifest = _read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if manifest is None:
        _warn_unchecked(folder, f"no {MANIFEST}", comm)
        return
    ranks, digests = manifest.ranks, manifest.files
    if ranks != comm.world_size:
        raise OtherRanks(
            f"checkpoint {folder}: made on {ranks} ranks, this run has {comm.world_size}. The "
            f"states of DeepSpeed's optimizer load on as many ranks only: start {ranks}."
        )
    with comm.same_on_all_ranks():
        named = {_name(path, folder): path for path in files}
        if manifest.head is None and (folder / OFFLOADED).exists():
            _warn_unchecked(folder / OFFLOADED, f"its files are not in {MANIFEST}", comm)
            named = {name: path for name, path in named.items() if path.suffix == PICKLE}
        odd = sorted(named.keys() ^ digests.keys())
        if odd:
            here = "not one of its files" if odd[0] not in digests else "missing"
            raise ValueError(f"checkpoint {folder}: {odd[0]} is {here}.")
        for name, path in list(named.items())[comm.rank :: comm.world_size]:
            if _digest(path) != digests[name]:
                raise ValueError(
                    f"checkpoint {path}: damaged, or of another checkpoint: it is not the file that "
                    "was written."
                )


def _warn_unchecked(path: Path, reason: str, comm: Communicator) -> None:
    if comm.rank == 0:
        logger.warning(
            "checkpoint %s: %s, as earlier versions of zods left it. It is loaded without a check: "
            "damage to its files would not be noticed.",
            path,
            reason,
        )


def last_good(load_dir: Path, comm: Communicator, log: Log | None = None) -> tuple[Path, int]:
    """The last checkpoint that belongs to the log and whose files are as they were written.

    Returns (folder, number of the log's records that it stands for). Raises as
    `FirstOrderEngine.load_checkpoint` does.
    """
    if comm.rank == 0:
        for folder in unsealed_in(load_dir):
            logger.warning("checkpoint %s: not whole; it is left out", folder)
    names = comm.gather_objects([folder.name for folder in checkpoints_in(load_dir)])[0]
    if not names:
        raise ValueError(
            f"checkpoint {load_dir}: no checkpoint of first-order training in it. Give a folder "
            "of checkpoints."
        )
    for name in names:
        try:
            with comm.same_on_all_ranks():
                kept = 0 if log is None else records_at(load_dir / name, log)
            check(load_dir / name, comm)
        except OtherRanks:
            raise
        except (ValueError, OSError) as error:
            if name == names[-1]:
                if log is None:
                    raise
                raise ValueError(
                    f"{error} No checkpoint in {load_dir} can be used. Put the checkpoints or "
                    f"{log.path} back from a copy, or start a new run in another folder. To "
                    "start this one from step 0, remove the log and the checkpoints first."
                ) from error
            if comm.rank == 0:
                logger.warning("%s It is left out; an older one is used.", error)
            continue
        return load_dir / name, kept
    raise AssertionError("the last checkpoint either is good or raises")


def _numbered(folder: Path) -> list[Path]:
    found = [
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if re.fullmatch(r"global_step\d+", path.name)
    ]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    """The step in the name of a numbered checkpoint."""
    return int(folder.name.removeprefix("global_step"))


def _files(folder: Path) -> list[Path]:
    """The files that DeepSpeed wrote: the pickles, and the copies of states on NVMe."""
    offloaded = (path for path in (folder / OFFLOADED).rglob("*") if not path.is_dir())
    return sorted([*folder.glob(f"*{PICKLE}"), *offloaded])


def _name(path: Path, folder: Path) -> str:
    """The name of a checkpoint's file in the manifest."""
    return path.relative_to(folder).as_posix()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]


def _read_manifest(folder: Path) -> Manifest:
    """Raises ValueError where the manifest is damaged."""
    check_regular(folder / MANIFEST)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return Manifest(int(manifest["ranks"]), dict(manifest["files"]), manifest.get("head"))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"checkpoint {folder}/{MANIFEST}: damaged: {error!r}.") from error


@contextmanager
def only_data() -> Iterator[None]:
    """Keep torch.load from running code that a file names, also where DeepSpeed calls it with
    weights_only=False.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(CLASSES_IN_CHECKPOINTS):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _check_only_data(path: Path) -> None:
    """Raise ValueError unless torch can load the file without running code."""
    if flaw := flaw_of_pickle(path):
        raise ValueError(f"checkpoint {path}: {flaw}. Load a checkpoint that zods.finetune wrote.")


def flaw_of_pickle(path: Path) -> str:
    """The reason why torch cannot load a file without running code; empty where it can.

    The data of tensors are not read.
    """
    with open(path, "rb") as file:
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # what is not a pickle or zip file raises nearly any kind
            code = re.search(r"GLOBAL (\S+)", str(error))
            return (
                f"it names the code {code[1]}, which no tensor needs; it was not run"
                if code
                else "damaged or truncated"
            )
    return ""


def zods_state(client_state: Any, folder: Path) -> dict[str, Any]:
    """The part of a checkpoint's client state that is of zods. ValueError where there is none."""
    if not isinstance(client_state, dict) or "zods" not in client_state:
        raise ValueError(
            f"checkpoint {folder}: zods.finetune did not write it. Give the folder of one that it "
            "wrote."
        )
    return client_state["zods"]
