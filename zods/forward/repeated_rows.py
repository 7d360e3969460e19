"""Run a module on one copy of each row of a stack that repeats rows.

In a stack every row of a batch stands once for each of its points. Before the first perturbed
parameter all these copies have the same values. `zods.forward.module_runners.StackRunner` runs
frozen blocks there once for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from zods.forward.stacked import NotStackable


class RepeatedRows:
    """Where each row of a stack stands first.

    >>> RepeatedRows([4, 7, 4, 7]).first
    [0, 1]
    """

    def __init__(self, rows: Sequence[int]) -> None:
        """rows: the rows of the batch, in the order of the stack."""
        places: dict[int, int] = {}
        self.first: list[int] = []
        self._copy_of: list[int] = []  # for each row of the stack, its index in `first`
        for index, row in enumerate(rows):
            if row not in places:
                places[row] = len(self.first)
                self.first.append(index)
            self._copy_of.append(places[row])

    def run_once(
        self, original: Callable, arguments: tuple[list[Any], TreeSpec, list[bool]]
    ) -> Any:
        """Run a module on the first copy of each row, and return its output for the whole stack.

        arguments: as `Stacking.carried` returns them. Raises NotStackable where an argument has
        several rows for each row of the batch, or an output does not carry the batch.
        """
        leaves, spec, carry = arguments
        carried = [leaf for leaf, carries in zip(leaves, carry, strict=True) if carries]
        if not carried or any(len(leaf) != len(self._copy_of) for leaf in carried):
            raise NotStackable("which rows of a frozen block's inputs are copies is not known")
        first = torch.tensor(self.first, device=carried[0].device)
        args, kwargs = tree_unflatten(
            [
                leaf.index_select(0, first) if carries else leaf
                for leaf, carries in zip(leaves, carry, strict=True)
            ],
            spec,
        )
        outputs, spec = tree_flatten(original(*args, **kwargs))
        tensors = [leaf for leaf in outputs if isinstance(leaf, torch.Tensor)]
        if any(leaf.ndim == 0 or len(leaf) != len(self.first) for leaf in tensors):
            raise NotStackable("a frozen block returns a tensor without a batch dimension")
        copies = torch.tensor(self._copy_of, device=carried[0].device)
        return tree_unflatten(
            [leaf[copies] if isinstance(leaf, torch.Tensor) else leaf for leaf in outputs], spec
        )
