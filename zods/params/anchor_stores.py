"""Stores of the anchor's shards: in the device's or the host's memory, or in a file on NVMe.

`MemoryStore` and `NvmeStore` implement `ShardStore`. The file is read and written by DeepSpeed's
async_io. Called by `zods.params.anchor`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from zods.files import allocate, check_regular, try_lock
from zods.kernels import fingerprint
from zods.params.shards import Shard, ShardedParameters

logger = logging.getLogger(__name__)

# Bytes. Direct I/O needs file offsets and lengths that are multiples of this number, for each
# thread of one operation.
ALIGNMENT = 4096


class ShardStore(Protocol):
    """One tensor of `numel` elements per shard, written and read in blocks.

    A block is a range of elements [start, stop). device_bytes, offloaded_bytes: bytes used on the
    device, and in host memory or on NVMe.
    """

    device_bytes: int
    offloaded_bytes: int

    def blocks(self, shard: Shard) -> list[tuple[int, int]]: ...

    def write(self, shard: Shard, values: torch.Tensor, start: int = 0) -> None:
        """Write `values` at the elements from `start` on.

        The range must start at the start of a block and stop at the end of a block.
        """
        ...

    def read(self, shard: Shard) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (start, elements) of each block; elements stay valid until the next block."""
        ...


class MemoryStore:
    """Shards in device memory or in host memory, one block per shard.

    pin_memory: None: device memory; otherwise host memory, pinned if true.
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
    """Shards in one file of this rank, with writes in the background and read-ahead.

    The block to read ahead is the one that followed the current block last time. The fingerprint of
    every written block is kept in memory. Every block is checked against it when it is read.
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
        """Create the file `path` at its full size.

        aio: DeepSpeed's section "aio". buffer_count: buffers of one block each. buffer_size:
        elements per block. remake: computes the elements [start, stop) of a shard again, to the
        bits that were written; None where this is not possible.

        Raises ValueError where the drive has too little space, OSError where it is not writable.
        """
        self._alignment = ALIGNMENT * aio.get("intra_op_parallelism", 1)
        largest = max(p.numel * p.dtype.itemsize for p in parameters)
        asked = buffer_size * max(p.dtype.itemsize for p in parameters)
        self._block_bytes = max(self._aligned(min(asked, largest)), self._alignment)
        self._offsets: dict[str, int] = {}  # shard's name -> file offset in bytes
        offsets: list[int] = []  # file offset of every block
        end = 0
        for shard in parameters:
            self._offsets[shard.name] = end
            offsets += [self._offset_of(shard, start) for start, _ in self.blocks(shard)]
            end += self._aligned(shard.numel * shard.dtype.itemsize)
        # bytes
        self._lengths = {
            offset: following - offset for offset, following in itertools.pairwise([*offsets, end])
        }
        # Offset of the block that is read after a block: file order at first, then as observed.
        self._followed_by = dict(itertools.pairwise(offsets))
        self.device_bytes, self.offloaded_bytes = 0, end
        self._path = path
        self._remake = remake
        self._fingerprints: dict[int, int] = {}  # key: a block's offset
        self._file = _AsyncFile(path, end, aio)
        weakref.finalize(self, self._file.close)
        self._buffers = [self._file.new_buffer(self._block_bytes) for _ in range(buffer_count)]
        self._buffer_index = 0
        # The block that is being read ahead. Reads and writes are never in flight together.
        self._ahead: tuple[int, torch.Tensor] | None = None
        self._last: int | None = None

    def close(self) -> None:
        """Remove the file. It is also removed when the store is no longer used."""
        self._file.close()

    def blocks(self, shard: Shard) -> list[tuple[int, int]]:
        size = self._block_bytes // shard.dtype.itemsize
        return [(start, min(start + size, shard.numel)) for start in range(0, shard.numel, size)]

    def write(self, shard: Shard, values: torch.Tensor, start: int = 0) -> None:
        if self._ahead is not None:
            self._file.wait()
            self._ahead = None  # this write may change the block that was read ahead
        for part in values.split(self._block_bytes // shard.dtype.itemsize):
            if self._file.num_pending == len(self._buffers):
                self._file.wait()
            buffer = self._next_buffer()[: self._aligned(part.nbytes)]
            written = buffer[: part.nbytes].view(shard.dtype).copy_(part)
            if part.numel():
                offset = self._offset_of(shard, start)
                self._fingerprints[offset] = fingerprint(written)
                self._file.begin_write(buffer, offset)
            start += part.numel()

    def read(self, shard: Shard) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (start, elements) of each block, checked against its fingerprint.

        Raises RuntimeError where a block is not what was written and cannot be rebuilt.
        """
        for start, stop in self.blocks(shard):
            offset = self._offset_of(shard, start)
            values = self._read_block(offset)[: (stop - start) * shard.dtype.itemsize].view(
                shard.dtype
            )
            if fingerprint(values) != self._fingerprints[offset]:
                values = self._rebuild_block(shard, start, stop)
            yield start, values

    def _rebuild_block(self, shard: Shard, start: int, stop: int) -> torch.Tensor:
        """Rebuild a damaged block and write it back to the file."""
        offset = self._offset_of(shard, start)
        end = offset + (stop - start) * shard.dtype.itemsize
        damage = (
            f"{self._path}: bytes {offset} to {end} (of {shard.name}) are not the bytes that were "
            "written there"
        )
        if self._remake is not None:
            expected, values = self._fingerprints[offset], self._remake(shard, start, stop)
            self.write(shard, values, start)
            if self._fingerprints[offset] == expected:
                logger.error(
                    "%s. They were rebuilt exactly from the gradient's terms. Look at the drive.",
                    damage,
                )
                return values
        raise RuntimeError(
            f"{damage}: the drive is failing, or something else writes to the file. Start again "
            "with the same command: that rebuilds the anchor exactly from the trajectory log."
        )

    def _offset_of(self, shard: Shard, start: int) -> int:
        return self._offsets[shard.name] + start * shard.dtype.itemsize

    def _read_block(self, offset: int) -> torch.Tensor:
        if self._last is not None:
            self._followed_by[self._last] = offset
        self._last = offset
        self._file.wait()
        if self._ahead is None or self._ahead[0] != offset:
            self._begin_read(offset)
            self._file.wait()
        assert self._ahead is not None
        buffer, self._ahead = self._ahead[1], None
        following = self._followed_by.get(offset)
        if following is not None and len(self._buffers) > 1:
            self._begin_read(following)
        return buffer

    def _begin_read(self, offset: int) -> None:
        buffer = self._next_buffer()
        self._ahead = (offset, buffer)
        self._file.begin_read(buffer[: self._lengths[offset]], offset)

    def _next_buffer(self) -> torch.Tensor:
        self._buffer_index = (self._buffer_index + 1) % len(self._buffers)
        return self._buffers[self._buffer_index]

    def _aligned(self, size: int) -> int:
        return -(-size // self._alignment) * self._alignment


class _AsyncFile:
    """A file of fixed size that DeepSpeed's async_io reads and writes.

    The file is locked while the process lives, and removed when closed.
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
        """Start to read `buffer` from the file offset `at`, in bytes.

        The buffer is filled with zeros where the file ends before the range: async_io would abort
        the process.
        """
        if self._path.stat().st_size < at + buffer.nbytes:
            buffer.zero_()
            return
        self._count_pending(self._handle.async_pread(buffer, str(self._path), at))

    def begin_write(self, buffer: torch.Tensor, at: int) -> None:
        self._count_pending(self._handle.async_pwrite(buffer, str(self._path), at))

    def _count_pending(self, status: int) -> None:
        if status != 0:
            raise OSError(
                f"{self._path}: the anchor's file cannot be opened (async_io returned {status}). "
                "Look at the drive, and start again with the same command."
            )
        self.num_pending += 1

    def wait(self) -> None:
        pending, self.num_pending = self.num_pending, 0
        if pending and self._handle.wait() < pending:
            raise OSError(
                f"{self._path}: reading or writing the anchor failed. Look at the drive, and start "
                "again with the same command."
            )

    def close(self) -> None:
        self.wait()  # async_io aborts the process if operations are pending
        self._path.unlink(missing_ok=True)
        _remove_empty(self._path.parent)


def _allocate(path: Path, size: int) -> Any:
    """Create `path` at `size` bytes and hold its lock while the process lives.

    Raises ValueError where another run holds the lock or the space is too small, OSError otherwise.
    """
    check_regular(path)
    if path.is_symlink():  # its target is not of zods, and would be truncated
        path.unlink()
    file = None
    while file is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # a run that ends has removed the folder
            file = open(path, "ab")  # noqa: SIM115 (kept open for its lock)
    if not try_lock(file):
        raise ValueError(
            f"zeroth_order.anchor.nvme_path: {path} is used by another run. Give each its own."
        )
    os.truncate(path, size)
    try:
        free = allocate(file, size)
        if free is not None:
            raise ValueError(
                f"zeroth_order.anchor.nvme_path: {path.parent} is too small: this rank needs "
                f"{size} bytes for {path.name}, {free} are free. Use another drive, more ranks, or "
                "keep it as terms."
            )
    except (ValueError, OSError):
        path.unlink()
        raise
    return file


def _remove_empty(folder: Path) -> None:
    """Remove a rank's folder where it is empty."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def remove_leftovers(folder: Path, world_size: int) -> None:
    """Remove the files that a killed run on more ranks has left for ranks that this run lacks.

    folder: has one folder per rank. A file that a live run has locked stays. All ranks may call it
    at the same time.
    """
    for of_rank in folder.glob("rank*"):
        number = of_rank.name.removeprefix("rank")
        if not number.isdecimal() or int(number) < world_size:
            continue
        for path in filter(Path.is_file, of_rank.glob("*.bin")):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                if try_lock(file):
                    path.unlink()
        _remove_empty(of_rank)


def nvme_folder(nvme_path: str) -> Path:
    """This rank's folder: `nvme_path` with the rank's number on its host for "{local_rank}"."""
    return Path(nvme_path.replace("{local_rank}", os.environ.get("LOCAL_RANK", "0")))


def check_nvme(nvme_path: str, key: str) -> None:
    """Check that `nvme_path` is a writable folder and that DeepSpeed's async_io can be used.

    Not a collective: it checks for the calling rank only. key: the configuration key, for messages.
    Raises ValueError where a check fails.
    """
    folder = nvme_folder(nvme_path)
    if not folder.is_dir():
        raise ValueError(
            f"{key}: {folder} is not a folder. Create it on the NVMe drive, or give another."
        )
    probe = folder / f".zods-{os.getpid()}"
    try:
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{key}: {folder} is not writable ({error.strerror}). Give a folder in which files "
            "can be written."
        ) from error
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            f"{key}: DeepSpeed's async_io cannot be built: libaio is missing. Install it (Debian, "
            "Ubuntu: apt-get install libaio-dev), or use cpu."
        )
