"""Settings of the host's memory allocator. Called before a model is loaded."""

from __future__ import annotations

import ctypes
import sys

import torch

_M_MMAP_THRESHOLD = -3  # the parameter of mallopt(3)
_RETURNED_BYTES = 1 << 20


def return_freed_memory(device: torch.device) -> None:
    """On a CPU, have glibc give blocks of 1 MiB and more back to the system when they are freed.

    By default glibc comes to keep freed blocks of up to 32 MiB. Gathered parameters are allocated
    between small tensors, so the kept memory is fragmented: 0.3 GB per rank for SmolLM2-135M on two
    ranks (see benchmarks/results).
    """
    if device.type == "cpu" and sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)
