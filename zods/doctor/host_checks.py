"""Checks of the host, which need no other rank: versions, compiler, kernels, limits, locks, GPU."""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch.utils import cpp_extension

import zods
from zods.comm.build_locks import stale_locks
from zods.doctor.finding import Finding
from zods.kernels.self_check import first_difference

PACKAGES = ("torch", "deepspeed", "transformers")
PINS = Path(zods.__file__).parents[1] / "constraints.txt"
SHARED_MEMORY = Path("/dev/shm")
SHARED_BYTES = 69 * 10**6  # of a rank on CPUs, by DeepSpeed's operator (0.19.8)
MIB = 1 << 20


def locks() -> list[Finding]:
    """Locks of killed builds of DeepSpeed's operators, for which ranks would wait without end."""
    remedy = "Remove the file, unless another machine builds there."
    found = [
        Finding("broken", f"{lock}: the lock of a killed build; runs would wait for it. {remedy}")
        for lock in stale_locks()
    ]
    return found or [Finding("ok", "no locks of killed builds")]


def host() -> Iterator[Finding]:
    """All other checks of the host."""
    yield Finding("ok", f"zods {zods.__version__}")
    yield from versions(PINS.read_text() if PINS.is_file() else "")
    yield compiler()
    yield kernels("cpu")
    yield from gpu()
    yield async_io()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    yield shared_memory(shutil.disk_usage(SHARED_MEMORY).free, ranks)
    yield locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0], world_size)


def versions(pins: str) -> Iterator[Finding]:
    """pins: the content of constraints.txt; empty where zods was installed as a package."""
    pinned = dict(re.findall(r"^([\w-]+)==([^\s;]+)", pins, re.MULTILINE))
    for package in PACKAGES:
        here = version(package)
        tested = pinned.get(package, here)
        if here.partition("+")[0] == tested.partition("+")[0]:
            yield Finding("ok", f"{package} {here}")
        else:
            yield Finding(
                "note",
                f"{package} {here}: zods is tested with {tested}. For the tested versions run "
                "bash launch/setup.sh.",
            )


def compiler() -> Finding:
    name = shlex.split(cpp_extension.get_cxx_compiler())[0]
    if (path := shutil.which(name)) is not None:
        return Finding("ok", f"C++ compiler {path}")
    return Finding(
        "broken",
        f"C++ compiler: {name!r} is not found, so that neither the kernels nor DeepSpeed's "
        "operators can be built. Install g++, or name another compiler in CXX.",
    )


def kernels(device: str) -> Finding:
    """Whether the kernels of a device can be had, and compute the bits of their definition."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        difference = first_difference(device)
    missing = [str(w.message) for w in said if "reference serves instead" in str(w.message)]
    if missing:
        return Finding("broken", f"kernels on {device}: {missing[0]}")
    if difference is None:
        return Finding("ok", f"kernels on {device}: built, and the bits of the reference")
    return Finding(
        "broken",
        f"kernels on {device}: not the bits of the reference ({difference}). Do not train with "
        "them: remove the folders zods_* of TORCH_EXTENSIONS_DIR so that they are built again, and "
        "report it if that does not help.",
    )


def gpu() -> Iterator[Finding]:
    accelerator = get_accelerator().device_name()
    if accelerator != "cpu":
        size = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Finding("ok", f"GPU {torch.cuda.get_device_name(0)}, {size:.0f} GiB")
        yield kernels("cuda")
    elif torch.cuda.is_available():
        yield Finding(
            "note", "a GPU is there, but DeepSpeed uses the CPU: unset DS_ACCELERATOR to use it."
        )
    else:
        yield Finding("ok", "no GPU: ranks train on the CPU")


def async_io() -> Finding:
    if AsyncIOBuilder().is_compatible(verbose=False):
        return Finding("ok", "async_io can be used; --nvme PATH measures a drive")
    return Finding(
        "note",
        "async_io: libaio is missing, so that nothing can be offloaded to NVMe. If you need it: "
        "apt-get install libaio-dev.",
    )


def shared_memory(free: int, ranks: int) -> Finding:
    """free: bytes. ranks: of this host."""
    text = f"{SHARED_MEMORY}: {free / MIB:,.0f} MiB free; ranks of this host: {ranks}"
    if free >= ranks * SHARED_BYTES:
        return Finding("ok", text)
    on_cpu = get_accelerator().device_name() == "cpu"  # the operator serves CPUs alone
    return Finding(
        "broken" if on_cpu else "note",
        f"{text}. Each needs {SHARED_BYTES / MIB:.0f}. For a container: --shm-size 16g.",
    )


def locked_memory(limit: int) -> Finding:
    """limit: bytes, or RLIM_INFINITY. Root has no limit."""
    if limit == resource.RLIM_INFINITY or os.geteuid() == 0:
        return Finding("ok", "locked memory: no limit")
    return Finding(
        "note",
        f"locked memory: at most {limit / MIB:,.0f} MiB per process (ulimit -l), which bounds the "
        "buffers of NVMe offload. To raise it see launch/README.md.",
    )


def open_files(limit: int, world_size: int) -> Finding:
    """limit: of a process. Each pair of ranks has connections, besides the files of the data."""
    needed = 256 + 4 * world_size
    if limit >= needed:
        return Finding("ok", f"open files: at most {limit:,}")
    return Finding(
        "broken",
        f"open files: at most {limit:,}, but {world_size} ranks need {needed:,}. Raise it with "
        f"ulimit -n {needed}.",
    )
