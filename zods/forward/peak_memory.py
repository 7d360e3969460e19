"""Measure the peak memory of a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak:
    """bytes: the most that was alive at once of what was made inside `peak_memory`."""

    bytes = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure what is made inside: by the allocator on a GPU, by watching every operation's outputs
    on a CPU (slow).
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with _Watch(peak):
        yield peak


class _Watch(TorchDispatchMode):
    """Adds up what operations make. What was freed since is taken off only where the sum would be a
    new peak: to look for it after each of a forward's thousands of operations would take longer
    than the forward."""

    def __init__(self, peak: Peak) -> None:
        super().__init__()
        self._peak = peak
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._most = 0  # bytes of `_alive`, and so at least those that are alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(returned.alias_info is not None for returned in func._schema.returns):
            return made  # a view, or an operation in place
        for leaf in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage(), (args, kwargs))
        return made

    def _add(self, storage: torch.UntypedStorage, given: Any) -> None:
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None and not known[0].expired():
            return
        if any(
            isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata == key
            for leaf in tree_leaves(given)
        ):
            return
        self._most += storage.nbytes() - (0 if known is None else known[1])
        self._alive[key] = (StorageWeakRef(storage), storage.nbytes())
        if self._most > self._peak.bytes:
            self._alive = {
                k: (ref, size) for k, (ref, size) in self._alive.items() if not ref.expired()
            }
            self._most = sum(size for _, size in self._alive.values())
            self._peak.bytes = max(self._peak.bytes, self._most)
