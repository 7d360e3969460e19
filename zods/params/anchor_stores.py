"""Stores of the anchor's shards: in the device's or the host's memory, or in a file on NVMe.

`MemoryStore` and `NvmeStore` implement `ShardStore`. The file is read and written by DeepSpeed's
async_io. Called by `zods.params.anchor`.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from zods.kernels import fingerprint
from zods.params.shards import Shard, ShardedParameters

logger = logging.getLogger(__name__)

ALIGNMENT = 4096  # bytes; file offsets and lengths of direct I/O, per thread of one operation


class ShardStore(Protocol):
    """A store of one tensor per shard, of `numel` elements, written and read in blocks: element
    ranges [start, stop).
    """

    device_bytes: int
    offloaded_bytes: int

    def blocks(self, shard: Shard) -> list[tuple[int, int]]: ...

    def write(self, shard: Shard, values: torch.Tensor, start: int = 0) -> None:
        """Set the elements from `start`, where a block starts, up to the end of a block."""
        ...

    def read(self, shard: Shard) -> Iterator[tuple[int, torch.Tensor]]:
        """(start, elements) of one block after the other; each valid until the next is taken."""
        ...


class MemoryStore:
    """Shards in the device's memory, or in the host's with `pin_memory` (None: on the device).

    One block per shard.
    """

    def __init__(
        self, parameters: ShardedParameters, device: torch.device, pin_memory: bool | None
    ) -> None:
        where, pin = (device, False) if pin_memory is None else (torch.device("cpu"), pin_memory)
        self._shards = {
            p.name: torch.empty(p.numel, dtype=p.dtype, device=where, pin_memory=pin)
            for p in parameters
        }
        size = sum(t.nbytes for t in self._shards.values())
        self.device_bytes, self.offloaded_bytes = (size, 0) if pin_memory is None else (0, size)

    def blocks(self, shard: Shard) -> list[tuple[int, int]]:
        return [(0, shard.numel)]

    def write(self, shard: Shard, values: torch.Tensor, start: int = 0) -> None:
        self._shards[shard.name][start : start + values.numel()].copy_(values)

    def read(self, shard: Shard) -> Iterator[tuple[int, torch.Tensor]]:
        yield 0, self._shards[shard.name]


class NvmeStore:
    """Shards in one file of this rank: writes go on behind, and the block that followed this one
    last time is read ahead.

    The fingerprint of every block written is kept in memory, and every block read is held against
    it.
    """

    def __init__(
        self,
        path: Path,
        parameters: ShardedParameters,
        *,
        aio: Mapping[str, Any],
        buffer_count: int,
        buffer_size: int,
        remake: Callable[[Shard, int, int], torch.Tensor] | None,
    ) -> None:
        """path: the file, created here at its full size. aio: DeepSpeed's section "aio".
        buffer_size: elements of a block. remake: gives the elements [start, stop) of a shard again,
        as they were written; None where that cannot be.

        Raises ValueError where the drive has too little space, OSError where it is not writable.
        """
        self._alignment = ALIGNMENT * aio.get("intra_op_parallelism", 1)
        largest = max(p.numel * p.dtype.itemsize for p in parameters)
        asked = buffer_size * max(p.dtype.itemsize for p in parameters)
        self._block_bytes = max(self._aligned(min(asked, largest)), self._alignment)
        self._places: dict[str, int] = {}  # bytes from the file's start
        places: list[int] = []  # of every block
        end = 0
        for shard in parameters:
            self._places[shard.name] = end
            places += [self._place(shard, start) for start, _ in self.blocks(shard)]
            end += self._aligned(shard.numel * shard.dtype.itemsize)
        # bytes
        self._lengths = {
            place: following - place for place, following in itertools.pairwise([*places, end])
        }
        self._followed_by = dict(itertools.pairwise(places))  # a guess; then what was seen
        self.device_bytes, self.offloaded_bytes = 0, end
        self._path = path
        self._remake = remake
        self._fingerprints: dict[int, int] = {}  # of the values in the block at a place
        self._file = _AsyncFile(path, end, aio)
        weakref.finalize(self, self._file.close)
        self._buffers = [self._file.new_buffer(self._block_bytes) for _ in range(buffer_count)]
        self._turn = 0
        self._ahead: tuple[int, torch.Tensor] | None = (
            None  # being read; never reads and writes at once
        )
        self._last: int | None = None

    def blocks(self, shard: Shard) -> list[tuple[int, int]]:
        size = self._block_bytes // shard.dtype.itemsize
        return [(start, min(start + size, shard.numel)) for start in range(0, shard.numel, size)]

    def write(self, shard: Shard, values: torch.Tensor, start: int = 0) -> None:
        if self._ahead is not None:
            self._file.wait()
            self._ahead = None  # what was read ahead may be about to change
        for part in values.split(self._block_bytes // shard.dtype.itemsize):
            if self._file.num_pending == len(self._buffers):
                self._file.wait()
            buffer = self._next_buffer()[: self._aligned(part.nbytes)]
            written = buffer[: part.nbytes].view(shard.dtype).copy_(part)
            if part.numel():
                place = self._place(shard, start)
                self._fingerprints[place] = fingerprint(written)
                self._file.begin_write(buffer, place)
            start += part.numel()

    def read(self, shard: Shard) -> Iterator[tuple[int, torch.Tensor]]:
        """Raises RuntimeError where a block is not what was written, and cannot be made again."""
        for start, stop in self.blocks(shard):
            place = self._place(shard, start)
            values = self._read_block(place)[: (stop - start) * shard.dtype.itemsize].view(
                shard.dtype
            )
            if fingerprint(values) != self._fingerprints[place]:
                values = self._made_again(shard, start, stop)
            yield start, values

    def _made_again(self, shard: Shard, start: int, stop: int) -> torch.Tensor:
        """The elements of a damaged block, which are written back."""
        place = self._place(shard, start)
        end = place + (stop - start) * shard.dtype.itemsize
        damage = f"{self._path}: bytes {place} to {end} (of {shard.name}) are not those that were written there"
        if self._remake is not None:
            expected, values = self._fingerprints[place], self._remake(shard, start, stop)
            self.write(shard, values, start)
            if self._fingerprints[place] == expected:
                logger.error(
                    "%s. They were rebuilt exactly from the gradient's terms. Look at the drive.",
                    damage,
                )
                return values
        raise RuntimeError(
            f"{damage}: the drive is failing, or something else writes to the file. Start again "
            f"with the same command: "
            "that rebuilds the anchor exactly from the trajectory log."
        )

    def _place(self, shard: Shard, start: int) -> int:
        return self._places[shard.name] + start * shard.dtype.itemsize

    def _read_block(self, place: int) -> torch.Tensor:
        if self._last is not None:
            self._followed_by[self._last] = place
        self._last = place
        self._file.wait()
        if self._ahead is None or self._ahead[0] != place:
            self._begin_read(place)
            self._file.wait()
        assert self._ahead is not None
        buffer, self._ahead = self._ahead[1], None
        following = self._followed_by.get(place)
        if following is not None and len(self._buffers) > 1:
            self._begin_read(following)
        return buffer

    def _begin_read(self, place: int) -> None:
        buffer = self._next_buffer()
        self._ahead = (place, buffer)
        self._file.begin_read(buffer[: self._lengths[place]], place)

    def _next_buffer(self) -> torch.Tensor:
        self._turn = (self._turn + 1) % len(self._buffers)
        return self._buffers[self._turn]

    def _aligned(self, size: int) -> int:
        return -(-size // self._alignment) * self._alignment


class _AsyncFile:
    """A file of fixed size, locked while the process lives, under DeepSpeed's async_io; removed
    when closed.
    """

    def __init__(self, path: Path, size: int, aio: Mapping[str, Any]) -> None:
        self._path = path
        self._lock = _allocate(path, size)
        self._handle = (
            AsyncIOBuilder()
            .load(verbose=False)
            .aio_handle(
                block_size=aio.get("block_size", 1 << 20),
                queue_depth=aio.get("queue_depth", 8),
                single_submit=aio.get("single_submit", False),
                overlap_events=aio.get("overlap_events", True),
                intra_op_parallelism=aio.get("intra_op_parallelism", 1),
            )
        )
        self.num_pending = 0

    def new_buffer(self, size: int) -> torch.Tensor:
        return self._handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8))

    def begin_read(self, buffer: torch.Tensor, at: int) -> None:
        """Start to read into `buffer`. If the file is too short the buffer is zeroed: async_io
        would abort the process.
        """
        if self._path.stat().st_size < at + buffer.nbytes:
            buffer.zero_()
            return
        self._begun(self._handle.async_pread(buffer, str(self._path), at))

    def begin_write(self, buffer: torch.Tensor, at: int) -> None:
        self._begun(self._handle.async_pwrite(buffer, str(self._path), at))

    def _begun(self, status: int) -> None:
        if status != 0:
            raise OSError(
                f"{self._path}: the anchor's file cannot be opened (async_io gave {status})."
            )
        self.num_pending += 1

    def wait(self) -> None:
        pending, self.num_pending = self.num_pending, 0
        if pending and self._handle.wait() < pending:
            raise OSError(f"{self._path}: reading or writing the anchor failed.")

    def close(self) -> None:
        self.wait()  # async_io aborts the process where operations are left over
        self._path.unlink(missing_ok=True)


def _allocate(path: Path, size: int) -> Any:
    """Create `path` at `size` bytes and hold its lock while the process lives.

    Raises ValueError or OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab")  # noqa: SIM115 (kept open for its lock)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"zeroth_order.anchor.nvme_path: {path} is used by another run. Give each its own."
        ) from error
    os.truncate(path, size)
    try:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        path.unlink()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(path.parent).free
        raise ValueError(
            f"zeroth_order.anchor.nvme_path: {path.parent} is too small: this rank needs {size} "
            f"bytes for {path.name}, "
            f"{free} are free. Use another drive, more ranks, or keep it as terms."
        ) from error
    return file


def check_nvme(nvme_path: str, key: str) -> None:
    """Raise ValueError unless `nvme_path` is a writable folder and DeepSpeed's async_io can be
    used. Local to a rank.
    """
    folder = Path(nvme_path)
    if not folder.is_dir():
        raise ValueError(
            f"{key}: {nvme_path} is not a folder. Create it on the NVMe drive, or give another."
        )
    probe = folder / f".zods-{os.getpid()}"
    try:
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{key}: {nvme_path} is not writable ({error.strerror}).") from error
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            f"{key}: DeepSpeed's async_io cannot be built: libaio is missing. Install it (Debian, "
            f"Ubuntu: apt-get install "
            "libaio-dev), or use cpu."
        )
