"""DeepSpeed's files of parameters on NVMe: a folder for each run, its space, checks of each read.

DeepSpeed 0.19.8 empties `nvme_path/zero_stage_3/...` while it loads a model, so a second run with
the same path would destroy the parameters of the first. Each run therefore gets a new folder in
`nvme_path`, which is removed when its last process ends. DeepSpeed also reads the files back
unchecked. A `CheckedHandle` compares what is read with what was written. Optimizer states on NVMe
are not compared. Called by `zods.initialize`, `zods.training.first_order` and `zods.finetune`.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zods.comm.communicator import Communicator
from zods.files import allocate, try_lock
from zods.kernels import fingerprint
from zods.params.anchor_stores import nvme_folder
from zods.params.zero3_adapter import handles_of, on_nvme, smallest_on_nvme

KEYS = ("offload_param", "offload_optimizer")
PREFIX = "zods_run_"  # of the folders of runs
LOCK = "zods.lock"  # in nvme_path: held while a folder is made or removed
AGAIN = (
    "Start again with the same command: that makes the parameters again, from the base weights and "
    "the trajectory log."
)

_held: dict[Path, Any] = {}  # the open lock files of this process


# --- the folder of a run --------------------------------------------------------------------------


def in_own_folder(
    deepspeed: Mapping[str, Any], comm: Communicator, numels: Iterable[int]
) -> dict[str, Any]:
    """Copy DeepSpeed's configuration, with the files on NVMe in a new folder of this run.

    Call it before the model is loaded, on all ranks together. Folders of runs that have ended are
    removed. numels: the number of elements of each whole parameter. Returns the configuration as it
    is where nothing is offloaded to NVMe. Raises ValueError, the same on all ranks, where the drive
    has too little space for the parameters.
    """
    zero = dict(deepspeed.get("zero_optimization", {}))
    name = PREFIX + comm.gather_objects(secrets.token_hex(4))[0]
    with comm.same_on_all_ranks():
        for key in KEYS:
            offload = zero.get(key) or {}
            if offload.get("device") == "nvme":
                folder = _new_folder(nvme_folder(offload["nvme_path"]), name, comm.rank)
                zero[key] = {**offload, "nvme_path": str(folder)}
    reserved = []
    try:
        with comm.same_on_all_ranks():  # the ranks of a machine hold their space together
            params = zero.get("offload_param") or {}
            if params.get("device") == "nvme":
                reserved.append(Path(params["nvme_path"]) / f"rank{comm.rank}.reserved")
                _reserve(reserved[0], _shard_bytes(deepspeed, numels, comm.world_size))
    finally:
        for path in reserved:
            path.unlink(missing_ok=True)
    return {**deepspeed, **({"zero_optimization": zero} if zero else {})}


def lock_folder(deepspeed: Mapping[str, Any], rank: int) -> None:
    """Lock this rank's part of the folders on NVMe while the process lives.

    For a model that DeepSpeed has put into `nvme_path` already. Raises ValueError where another
    process holds the lock.
    """
    for key in KEYS:
        offload = deepspeed.get("zero_optimization", {}).get(key) or {}
        if offload.get("device") == "nvme":
            folder = Path(offload["nvme_path"])
            if not _lock(folder / f"rank{rank}.lock"):
                raise ValueError(
                    f"zero_optimization.{key}.nvme_path: {folder} is used by another run, whose "
                    "parameters were overwritten when this model was made. Give each run its own."
                )


def _new_folder(nvme_path: Path, name: str, rank: int) -> Path:
    folder = nvme_path / name
    with _exclusive(nvme_path):
        _remove_unused(nvme_path)
        folder.mkdir(exist_ok=True)
        _lock(folder / f"rank{rank}.lock")
    atexit.register(_leave, folder, rank, os.getpid())
    return folder


def _leave(folder: Path, rank: int, process: int) -> None:
    """Unlock this rank's part of a folder. The last rank of the machine removes the folder."""
    if os.getpid() != process:  # a process that was forked from it
        return
    _held.pop(folder / f"rank{rank}.lock").close()
    if folder.parent.is_dir():
        with _exclusive(folder.parent):
            _remove_unused(folder.parent)


@contextmanager
def _exclusive(nvme_path: Path) -> Iterator[None]:
    with open(nvme_path / LOCK, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_unused(nvme_path: Path) -> None:
    for folder in nvme_path.glob(PREFIX + "*"):
        if not any(_is_held(lock) for lock in folder.glob("rank*.lock")):
            shutil.rmtree(folder, ignore_errors=True)


def _is_held(lock: Path) -> bool:
    with open(lock, "ab") as file:
        return not try_lock(file)


def _lock(path: Path) -> bool:
    """Lock a file until this process ends. Returns whether this process has the lock."""
    if path in _held:
        return True
    file = open(path, "ab")  # noqa: SIM115 (kept open for its lock)
    if not try_lock(file):
        file.close()
        return False
    _held[path] = file
    return True


# --- space ----------------------------------------------------------------------------------------


def _shard_bytes(deepspeed: Mapping[str, Any], numels: Iterable[int], world_size: int) -> int:
    """The bytes of this rank's files."""
    itemsize = 2 if deepspeed.get("bf16", {}).get("enabled", False) else 4
    smallest = smallest_on_nvme(deepspeed.get("aio", {}))
    sizes = [-(-numel // world_size) * itemsize for numel in numels]
    return sum(size for size in sizes if size >= smallest)


def _reserve(path: Path, size: int) -> None:
    """Create a file of `size` bytes on the drive. Raises ValueError where there is no space."""
    with open(path, "wb") as file:
        free = allocate(file, size)
        if free is not None:
            raise ValueError(
                f"zero_optimization.offload_param.nvme_path: {path.parent.parent} is too small: "
                f"this rank's parameters need {size} bytes, {free} are free. Use another drive or "
                "more ranks."
            )


# --- reads ----------------------------------------------------------------------------------------


def check_reads(params: Sequence[Any]) -> None:
    """Have every read of a parameter on NVMe compared with what was written.

    What DeepSpeed wrote before this call is compared from its first read on.
    """
    swappers = {id(p.nvme_swapper): p.nvme_swapper for p in params if on_nvme(p)}
    for swapper in swappers.values():
        written: dict[str, int] = {}
        for name in handles_of(swapper):
            handle = getattr(swapper, name)
            if not isinstance(handle, CheckedHandle):
                setattr(swapper, name, CheckedHandle(handle, written))


class CheckedHandle:
    """DeepSpeed's handle of async_io, for whole files.

    written: path -> fingerprint of what was written; shared by the handles of reads and of writes.
    """

    def __init__(self, handle: Any, written: dict[str, int]) -> None:
        self._handle = handle
        self._written = written
        self._pending: list[tuple[str, torch.Tensor | None]] = []  # buffer: of a read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def async_pwrite(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        """Start to write `buffer` to the file, from its start on."""
        self._written[path] = _fingerprint(buffer)
        self._pending.append((path, None))
        return self._handle.async_pwrite(buffer, path, offset)

    def async_pread(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        """Start to read the file into `buffer`.

        Raises RuntimeError where the file is too short: async_io would abort the process.
        """
        size = os.stat(path).st_size if os.path.exists(path) else None
        if size is None or size < buffer.nbytes:
            found = "it is gone" if size is None else f"it has {size} bytes of {buffer.nbytes}"
            raise RuntimeError(f"{path}: {found}: something else changed it. {AGAIN}")
        self._pending.append((path, buffer))
        return self._handle.async_pread(buffer, path, offset)

    def wait(self) -> int:
        """Wait for all operations. Returns their number.

        Raises RuntimeError where a file has other bytes than were written, OSError where the drive
        fails.
        """
        pending, self._pending = self._pending, []
        done = self._handle.wait()
        if done < len(pending):
            raise OSError(
                f"{pending[0][0]}: reading or writing parameters failed. Look at the drive. {AGAIN}"
            )
        for path, buffer in pending:
            if buffer is None:
                continue
            found = _fingerprint(buffer)
            if self._written.setdefault(path, found) != found:
                raise RuntimeError(
                    f"{path}: its bytes are not those that were written: the drive is failing, or "
                    f"something else writes to the file. {AGAIN}"
                )
        return done


def _fingerprint(buffer: torch.Tensor) -> int:
    return fingerprint(buffer.view(torch.uint8).view(torch.int64))
