"""The anchor of MeZO-SVRG: the parameters at the last refresh (the point) and the full-batch estimate there (the gradient).

Each is kept, sharded as the parameters are, on the device, in host memory or in NVMe files, or not at all: the gradient
is then its K terms, and the point is the parameters with what was applied since the refresh taken back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from zods.comm import Communicator
from zods.config import AnchorConfig
from zods.estimators import Term, Update
from zods.kernels import combine_
from zods.sharding import ShardedParameters, Slice, is_sharded
from zods.streams import Source

ALIGNMENT = 4096  # bytes; file offsets and lengths of direct I/O, per thread of one operation


class SliceStore(Protocol):
    """One tensor of `numel` elements per slice."""

    device_bytes: int
    offloaded_bytes: int

    def write(self, piece: Slice, values: torch.Tensor) -> None: ...

    def read(self, piece: Slice) -> torch.Tensor:
        """The slice's elements; valid until the next `read` or `write`."""
        ...


class MemoryStore:
    """Slices in the device's memory, or in the host's with `pin_memory` (None: on the device)."""

    def __init__(self, parameters: ShardedParameters, device: torch.device, pin_memory: bool | None) -> None:
        where, pin = (device, False) if pin_memory is None else (torch.device("cpu"), pin_memory)
        self._slices = {p.name: torch.empty(p.numel, dtype=p.dtype, device=where, pin_memory=pin) for p in parameters}
        size = sum(t.nbytes for t in self._slices.values())
        self.device_bytes, self.offloaded_bytes = (size, 0) if pin_memory is None else (0, size)

    def write(self, piece: Slice, values: torch.Tensor) -> None:
        self._slices[piece.name].copy_(values)

    def read(self, piece: Slice) -> torch.Tensor:
        return self._slices[piece.name]


class NvmeStore:
    """Slices in one file of this rank: writes go on behind, and the slice that followed this one last time is read
    ahead."""

    def __init__(
        self,
        path: Path,
        parameters: ShardedParameters,
        *,
        aio: Mapping[str, Any],
        buffer_count: int,
        buffer_size: int | None,
    ) -> None:
        """path: the file, created here at its full size. aio: DeepSpeed's section "aio".

        Raises ValueError where a buffer is too small or the drive has too little space, OSError where it is not writable.
        """
        self._alignment = ALIGNMENT * aio.get("intra_op_parallelism", 1)
        largest = max(parameters, key=lambda p: p.numel * p.dtype.itemsize)
        needed = self._length(largest)
        given = needed if buffer_size is None else self._aligned(buffer_size * largest.dtype.itemsize)
        if given < needed:
            raise ValueError(
                f"zeroth_order.anchor.buffer_size: found {buffer_size}, but {largest.name} has {largest.numel} elements "
                "on this rank. Give at least that many, or leave the key out."
            )
        self._places: dict[str, int] = {}
        end = 0
        for piece in parameters:
            self._places[piece.name] = end
            end += self._length(piece)
        self.device_bytes, self.offloaded_bytes = 0, end
        self._file = _AsyncFile(path, end, aio)
        weakref.finalize(self, self._file.close)
        self._buffers = [self._file.new_buffer(max(given, self._alignment)) for _ in range(buffer_count)]
        self._turn = 0
        self._ahead: tuple[Slice, torch.Tensor] | None = None  # being read; never reads and writes at once
        self._followed_by: dict[str, Slice] = {}
        self._last: Slice | None = None

    def write(self, piece: Slice, values: torch.Tensor) -> None:
        if self._ahead is not None or self._file.num_pending == len(self._buffers):
            self._file.wait()
            self._ahead = None  # what was read ahead may be about to change
        if piece.numel:
            buffer = self._next_buffer(piece)
            self._elements(buffer, piece).copy_(values)
            self._file.begin_write(buffer, self._places[piece.name])

    def read(self, piece: Slice) -> torch.Tensor:
        if self._last is not None:
            self._followed_by[self._last.name] = piece
        self._last = piece
        self._file.wait()
        if self._ahead is None or self._ahead[0] is not piece:
            self._begin_read(piece)
            self._file.wait()
        assert self._ahead is not None
        buffer, self._ahead = self._ahead[1], None
        following = self._followed_by.get(piece.name)
        if following is not None and len(self._buffers) > 1:
            self._begin_read(following)
        return self._elements(buffer, piece)

    def _begin_read(self, piece: Slice) -> None:
        self._ahead = (piece, self._next_buffer(piece))
        if piece.numel:
            self._file.begin_read(self._ahead[1], self._places[piece.name])

    def _next_buffer(self, piece: Slice) -> torch.Tensor:
        self._turn = (self._turn + 1) % len(self._buffers)
        return self._buffers[self._turn][: self._length(piece)]

    @staticmethod
    def _elements(buffer: torch.Tensor, piece: Slice) -> torch.Tensor:
        return buffer[: piece.numel * piece.dtype.itemsize].view(piece.dtype)

    def _length(self, piece: Slice) -> int:
        return self._aligned(piece.numel * piece.dtype.itemsize)

    def _aligned(self, size: int) -> int:
        return -(-size // self._alignment) * self._alignment


class _AsyncFile:
    """A file of fixed size, locked while the process lives, under DeepSpeed's async_io; removed when closed."""

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
        self._begun(self._handle.async_pread(buffer, str(self._path), at))

    def begin_write(self, buffer: torch.Tensor, at: int) -> None:
        self._begun(self._handle.async_pwrite(buffer, str(self._path), at))

    def _begun(self, status: int) -> None:
        if status != 0:
            raise OSError(f"{self._path}: the anchor's file cannot be opened (async_io gave {status}).")
        self.num_pending += 1

    def wait(self) -> None:
        pending, self.num_pending = self.num_pending, 0
        if pending and self._handle.wait() < pending:
            raise OSError(f"{self._path}: reading or writing the anchor failed.")

    def close(self) -> None:
        self.wait()  # async_io aborts the process where operations are left over
        self._path.unlink(missing_ok=True)


def _allocate(path: Path, size: int) -> Any:
    """Create `path` at `size` bytes and hold its lock while the process lives. Raises ValueError or OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab")  # noqa: SIM115 (kept open for its lock)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"zeroth_order.anchor.nvme_path: {path} is used by another run. Give each its own.") from error
    os.truncate(path, size)
    try:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        path.unlink()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(path.parent).free
        raise ValueError(
            f"zeroth_order.anchor.nvme_path: {path.parent} is too small: this rank needs {size} bytes for {path.name}, "
            f"{free} are free. Use another drive, more ranks, or keep it as terms."
        ) from error
    return file


def check_nvme(nvme_path: str, key: str) -> None:
    """Raise ValueError unless `nvme_path` is a writable folder and DeepSpeed's async_io can be used. Local to a rank."""
    folder = Path(nvme_path)
    if not folder.is_dir():
        raise ValueError(f"{key}: {nvme_path} is not a folder. Create it on the NVMe drive, or give another.")
    probe = folder / f".zods-{os.getpid()}"
    try:
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{key}: {nvme_path} is not writable ({error.strerror}).") from error
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            f"{key}: DeepSpeed's async_io cannot be built: libaio is missing. Install it (Debian, Ubuntu: apt-get install "
            "libaio-dev), or use cpu."
        )


class _Drift:
    """theta = scale * anchor + sum of terms, for one kind of parameter (decaying or not)."""

    def __init__(self) -> None:
        self.scale = 1.0
        self.coefficients: dict[int, float] = {}

    def record(self, decay: float, terms: Sequence[Term]) -> None:
        self.scale *= decay
        self.coefficients = {seed: decay * c for seed, c in self.coefficients.items()}
        for seed, c in terms:
            self.coefficients[seed] = self.coefficients.get(seed, 0.0) + c

    def source(self, live: torch.Tensor) -> Source:
        back = tuple(-c / self.scale for c in self.coefficients.values())
        return Source(live, 1.0 / self.scale, tuple(self.coefficients), back)


class Anchor:
    """Point and gradient, wherever `config` keeps them.

    A point kept as terms is exact up to the rounding of the updates since the refresh.
    """

    def __init__(
        self,
        config: AnchorConfig,
        parameters: ShardedParameters,
        comm: Communicator,
        *,
        distribution: str,
        aio: Mapping[str, Any],
    ) -> None:
        self._config = config
        self._parameters = parameters
        self._comm = comm
        self._distribution = distribution
        self.gradient_terms: tuple[Term, ...] = ()
        self._drifts = {True: _Drift(), False: _Drift()}  # by whether the parameter decays
        self.point: SliceStore | None = None
        self.gradient: SliceStore | None = None
        with comm.same_on_all_ranks():
            self.point = self._make_store("point", aio)
            self.gradient = self._make_store("gradient", aio)

    def _make_store(self, role: str, aio: Mapping[str, Any]) -> SliceStore | None:
        place = getattr(self._config, role)
        if place == "terms":
            return None
        if place == "nvme":
            assert self._config.nvme_path is not None
            path = Path(self._config.nvme_path) / "zods_anchor" / f"rank{self._comm.rank}" / f"{role}.bin"
            config = self._config
            return NvmeStore(
                path, self._parameters, aio=aio, buffer_count=config.buffer_count, buffer_size=config.buffer_size
            )
        pin = self._config.pin_memory and self._comm.device.type != "cpu"
        return MemoryStore(self._parameters, self._comm.device, pin_memory=None if place == "device" else pin)

    @property
    def device_bytes(self) -> int:
        return sum(s.device_bytes for s in (self.point, self.gradient) if s is not None)

    @property
    def offloaded_bytes(self) -> int:
        return sum(s.offloaded_bytes for s in (self.point, self.gradient) if s is not None)

    def set_point(self) -> None:
        """Make the parameters as they are the anchor point."""
        self._drifts = {True: _Drift(), False: _Drift()}
        if self.point is not None:
            for piece, local in self._parameters.visit(write=False):
                self.point.write(piece, local)

    def set_gradient(self, terms: Sequence[Term]) -> None:
        """Keep sum_k c_k z_k as the anchor gradient."""
        self.gradient_terms = tuple(terms)
        if self.gradient is None:
            return
        for piece in self._parameters:
            values = torch.empty(piece.numel, dtype=piece.dtype, device=self._comm.device)
            combine_(
                values,
                seeds=[t.seed for t in terms],
                coefficients=[t.coefficient for t in terms],
                distribution=self._distribution,
                parameter=piece.ordinal,
                offset=piece.offset,
            )
            self.gradient.write(piece, values)

    def descent(self, lr: float) -> tuple[list[Term], float]:
        """-lr * gradient, as (terms, coefficient of the stored gradient)."""
        if self.gradient is not None:
            return [], -lr
        return [Term(seed, -lr * c) for seed, c in self.gradient_terms], 0.0

    def record(self, update: Update) -> None:
        """Follow an update of the parameters, so that the point can be had from them by taking it back."""
        gradient = [Term(seed, update.anchor_grad_coefficient * c) for seed, c in self.gradient_terms]
        terms = [*update.terms, *(t for t in gradient if t.coefficient != 0.0)]
        for decays, drift in self._drifts.items():
            drift.record(update.decay if decays else 1.0, terms)

    def source(self, piece: Slice, live: torch.Tensor) -> Source:
        """The anchor point of one whole parameter, for `zods.streams`. All ranks call it in the same order."""
        if self.point is None:
            return self._drifts[piece.decays].source(live)
        stored = self.point.read(piece).to(live.device)
        if not is_sharded(piece.param):
            return Source(stored.view(live.shape))
        padded = torch.zeros(piece.padded_numel, dtype=piece.dtype, device=live.device)
        padded[: piece.numel] = stored
        return Source(self._comm.gather_slices(padded)[: piece.whole_numel].view(live.shape))

    def reconstruct(self, piece: Slice, local: torch.Tensor) -> torch.Tensor:
        """This rank's slice of the point, from its slice of the parameters and what was applied since the refresh."""
        source = self._drifts[piece.decays].source(local)
        return combine_(
            torch.empty_like(local),
            weight=local,
            scale=source.scale,
            seeds=source.seeds,
            coefficients=source.coefficients,
            distribution=self._distribution,
            parameter=piece.ordinal,
            offset=piece.offset,
        )

    def state_dict(self) -> dict[str, Any]:
        """What is not a tensor per slice: JSON."""
        return {
            "gradient_terms": [list(t) for t in self.gradient_terms],
            "drift": {
                str(int(decays)): {"scale": d.scale, "terms": [[s, c] for s, c in d.coefficients.items()]}
                for decays, d in self._drifts.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.gradient_terms = tuple(Term(int(seed), float(c)) for seed, c in state["gradient_terms"])
        for decays, drift in self._drifts.items():
            saved = state["drift"][str(int(decays))]
            drift.scale = float(saved["scale"])
            drift.coefficients = {int(seed): float(c) for seed, c in saved["terms"]}
