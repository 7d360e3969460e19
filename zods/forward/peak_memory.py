"""Measure the peak memory of a forward.

`zods.forward.choose_form` and `zods.forward.generated_scores` measure how much memory one more point
takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak:
    """Peak memory of the tensors made inside `peak_memory`.

    bytes: the largest size of such tensors that were alive at once. left: the size of those that
    are alive at the end.
    """

    bytes = left = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of the tensors that are made inside.

    On a GPU the allocator counts it. On a CPU every operation's outputs are watched, which is slow.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        peak.left = torch.cuda.memory_allocated(device) - before
        return
    with AllocationWatch() as watch:
        yield peak
    peak.bytes, peak.left = watch.bytes, watch.alive_bytes()


class AllocationWatch(TorchDispatchMode):
    """Adds up the sizes of the tensors that operations make.

    Freed tensors are subtracted only when the sum would be a new peak. To look for them after each
    of a forward's thousands of operations would take longer than the forward.

    bytes: the largest size of such tensors that were alive at once, since the start or `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._most = 0  # bytes of `_alive`: an upper bound, since some may be freed by now

    def restart(self) -> int:
        """Measure anew, from the tensors that are alive. Returns the peak until now."""
        found, self.bytes = self.bytes, self.alive_bytes()
        self._most = self.bytes
        return found

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
        if self._most > self.bytes:
            self._most = self.alive_bytes()
            self.bytes = max(self.bytes, self._most)

    def alive_bytes(self) -> int:
        """Forget the tensors that were freed, and return the size of the others."""
        self._alive = {
            k: (ref, size) for k, (ref, size) in self._alive.items() if not ref.expired()
        }
        return sum(size for _, size in self._alive.values())
