"""A buffer for the perturbed copies of the module that runs.

`zods.forward.parameter_copies` owns one and takes the memory of its copies from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map


class Scratch:
    """One block of CPU memory for copies, reused from one module to the next.

    On a CPU, fresh memory for a large matrix costs more in page faults than filling it. A GPU's
    caching allocator already reuses its memory, so copies there are ordinary tensors.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    @property
    def bytes(self) -> int:
        """Size of the block."""
        return self._memory.numel()

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Release at the end the memory that is taken inside."""
        used = self._used
        try:
            yield
        finally:
            self._used = used

    def kept(self, output: Any) -> Any:
        """Return a module's output, with tensors in this block copied out of it.

        A module may return a part of its parameter.
        """
        return tree_map(self._kept, output)

    def saving(self) -> Any:
        """Return a context manager in which autograd saves copies of tensors in this block.

        It is for a model that takes gradients in its forward. The block has other contents by the
        time autograd uses the saved tensors.
        """
        return torch.autograd.graph.saved_tensors_hooks(self._kept, lambda saved: saved)

    def _kept(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(
            leaf
        ):
            return leaf  # a tensor inside of vmap has no storage of its own
        start = self._memory.untyped_storage().data_ptr()
        return leaf.detach().clone() if leaf.untyped_storage().data_ptr() == start != 0 else leaf

    def reserve(self, tensors: Sequence[torch.Tensor], times: int) -> None:
        """Make the block large enough for `times` copies of each tensor, if none of it is in use.

        The copies of one module then never need a second block.
        """
        size = times * sum(_aligned(t) for t in tensors if t.device.type == "cpu")
        if self._used == 0 and size > self._memory.numel():
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = torch.empty(size, dtype=torch.uint8)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous tensor of the shape, dtype and device of `tensor`, not filled."""
        if tensor.device.type != "cpu":
            return torch.empty_like(tensor, memory_format=torch.contiguous_format)
        end = self._used + _aligned(tensor)
        if end > self._memory.numel():
            # the old block stays alive as long as tensors in it do
            self._memory = torch.empty(end, dtype=torch.uint8)
        taken = self._memory[self._used : self._used + tensor.nbytes]
        self._used = end
        return taken.view(tensor.dtype).view(tensor.shape)


def _aligned(tensor: torch.Tensor) -> int:
    """Size of a tensor in bytes, rounded up to whole cache lines."""
    return -(-tensor.nbytes // 64) * 64
