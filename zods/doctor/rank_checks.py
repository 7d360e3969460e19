"""Checks that need all ranks, or a drive: agreement, the speed of collectives and of NVMe."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from zods.comm.communicator import Communicator, Disagreement
from zods.doctor.finding import Finding
from zods.kernels import direction
from zods.params.anchor_stores import NvmeStore, check_nvme, nvme_folder
from zods.params.shards import ShardedParameters

MIB = 1 << 20
GATHERED_BYTES = 16 * MIB  # by each rank
NVME_BYTES, BLOCK_BYTES = 256 * MIB, 4 * MIB
ROUNDS = 10


def ranks(comm: Communicator) -> Iterator[Finding]:
    """Whether all ranks make the same direction, and the speed of what a step sends."""
    made = direction(
        5003, seed=7, distribution="gaussian", parameter=3, offset=13, device=comm.device
    )
    try:
        comm.check_agreement(made.cpu().numpy().tobytes(), "a test direction")
    except Disagreement as error:
        yield Finding(
            "broken", f"{error} Their kernels compute other bits: run the doctor on these hosts."
        )
        return
    yield Finding("ok", f"a test direction has the same bits on all ranks ({comm.world_size})")
    if comm.world_size == 1:
        return
    latency = _seconds(lambda: comm.gather_scalars([0.0] * 8))
    shard = torch.zeros(GATHERED_BYTES // 4, device=comm.device)
    seconds = _seconds(lambda: comm.numbers(comm.gather_shards(shard)[:1]))
    received = GATHERED_BYTES * (comm.world_size - 1)
    yield Finding(
        "ok",
        f"collectives: {latency * 1e3:.2f} ms for the scalars of a step, "
        f"{received / seconds / 1e9:.2f} GB/s received by a rank in an all-gather",
    )


def _seconds(call: Callable[[], object]) -> float:
    """The median time of a call, after one that is not timed."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def nvme(path: str) -> Finding:
    """Write a file through DeepSpeed's async_io, as the anchor on NVMe does, read it, remove it.

    path: a folder; it may contain {local_rank}.
    """
    try:
        check_nvme(path, "--nvme")
        # in a folder of its own, which the store removes with its file
        own = nvme_folder(path) / f"zods-doctor-{os.getpid()}"
        write, read = _measure_nvme(own / "measured.bin")
    except (ValueError, OSError, RuntimeError) as error:
        return Finding("broken", str(error))
    return Finding(
        "ok",
        f"{path}: {NVME_BYTES // MIB} MiB written with {NVME_BYTES / write / 1e9:.2f} GB/s and "
        f"read with {NVME_BYTES / read / 1e9:.2f} GB/s, the same bytes; the file is removed",
    )


def _measure_nvme(file: Path) -> tuple[float, float]:
    """The seconds to write NVME_BYTES and to read them, compared with what was written."""
    numel = NVME_BYTES // 4
    holder = torch.nn.ParameterList([torch.nn.Parameter(torch.empty(numel, device="meta"))])
    parameters = ShardedParameters(holder, rank=0)
    (shard,) = parameters.shards
    store = NvmeStore(
        file, parameters, aio={}, buffer_count=3, buffer_size=BLOCK_BYTES // 4, remake=None
    )
    try:
        values = torch.randn(BLOCK_BYTES // 4)
        began = time.perf_counter()
        for start, _ in store.blocks(shard):
            store.write(shard, values, start)
        written = time.perf_counter()
        for _ in store.read(shard):
            pass
        return written - began, time.perf_counter() - written
    finally:
        store.close()
