"""Run a module on one copy of each row of a stack that repeats rows.

In a stack every row of a batch stands once for each of its points. Before the first perturbed
parameter all these copies have the same values. `zods.forward.module_runners.StackRunner` runs
frozen blocks there once for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from zods.forward.stacked import Arguments, Carried, NotStackable

# of arguments that a call cannot change
_VALUES = (torch.Tensor, type(None), bool, int, float, str, torch.dtype, torch.device)


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

    def once(self, arguments: Carried) -> Arguments:
        """The arguments of a call, with the first copy of each row.

        Raises NotStackable where an argument has several rows for each row of the batch, or where
        an argument may be changed by the call, such as a cache.
        """
        leaves, spec, carry = arguments
        carried = [leaf for leaf, carries in zip(leaves, carry, strict=True) if carries]
        if not carried or any(len(leaf) != len(self._copy_of) for leaf in carried):
            raise NotStackable("which rows of a frozen block's inputs are copies is not known")
        args, kwargs = tree_unflatten(leaves, spec)
        if not all(map(_is_fixed, (*args, *kwargs.values()))):
            raise NotStackable("a frozen block may change one of its inputs")
        first = torch.tensor(self.first, device=carried[0].device)
        return tree_unflatten(
            [
                leaf.index_select(0, first) if carries else leaf
                for leaf, carries in zip(leaves, carry, strict=True)
            ],
            spec,
        )

    def for_all(self, outputs: Any) -> Any:
        """The outputs of a call for all rows of the stack.

        A tensor of one row is the same for all. Raises NotStackable where another tensor does not
        have the rows of the batch.
        """
        leaves, spec = tree_flatten(outputs)
        number = len(self.first)
        found = []
        for leaf in leaves:
            is_shared = isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and len(leaf) == 1 < number
            if isinstance(leaf, torch.Tensor) and not is_shared:
                if leaf.ndim == 0 or len(leaf) != number:
                    raise NotStackable("a frozen block returns a tensor without a batch dimension")
                leaf = leaf[torch.tensor(self._copy_of, device=leaf.device)]
            found.append(leaf)
        return tree_unflatten(found, spec)


def _is_fixed(value: Any) -> bool:
    """Whether a call cannot change an argument, apart from the data of tensors."""
    return all(map(_is_fixed, value)) if isinstance(value, tuple) else isinstance(value, _VALUES)
