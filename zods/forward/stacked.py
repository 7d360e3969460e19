"""Split a module's inputs on a stack of batches into its streams, and join their outputs again.

A stack holds the examples of several streams, one stream after the other. Some inputs carry the
batch dimension. Others (BERT's position ids) are the same for every stream. The difference is
learned from two forwards, not guessed from sizes: an input carries the batch if its dim 0 grows
with the number of examples from a forward of one batch to a forward of a stack. Such an input must
have the same number of rows for every example. A router that sends rows to experts breaks this
rule, because the examples of the rows are not known.

`zods.forward.module_runners` uses it. The form of evaluation is `zods.forward.forms.Stacked`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Arguments = tuple[tuple, dict[str, Any]]


class Carried(NamedTuple):
    """The arguments of a call as a flat list, how to unflatten it, and which of them carry the
    batch.
    """

    leaves: list[Any]
    spec: TreeSpec
    carry: list[bool]


class NotStackable(RuntimeError):
    """The model cannot run on a stack of batches that is split on dim 0."""


class Stacking:
    """Split and join the calls of modules. `begin` has to be called before every forward."""

    def __init__(self, names: Mapping[torch.nn.Module, str]) -> None:
        """names: of the modules, for messages."""
        self._names = names
        # by module and call: sizes of dim 0 of the inputs for one batch; None: not a tensor
        self._recorded: dict[torch.nn.Module, list[list[int | None]]] = defaultdict(list)
        # by module and call: whether each input carries the batch; None: not a tensor
        self._carry: dict[torch.nn.Module, list[list[bool | None]]] = defaultdict(list)
        self._num_calls: dict[torch.nn.Module, int] = defaultdict(int)
        self._examples_recorded = 1
        self._sizes: Sequence[int] = ()  # examples of each stream

    def begin(self, sizes: Sequence[int]) -> None:
        """Prepare for a forward on a stack. sizes: the number of examples of each stream."""
        self._sizes = sizes
        self._num_calls.clear()

    def begin_recording(self, num_examples: int) -> None:
        """Forget all recorded calls, and prepare for a forward of a batch of `num_examples`."""
        self._recorded.clear()
        self._carry.clear()
        self._examples_recorded = num_examples

    def rows_of_streams(self, num_rows: int) -> list[int]:
        """The number of rows of each stream in a tensor of `num_rows` rows for all streams."""
        per_example = num_rows // sum(self._sizes)
        return [size * per_example for size in self._sizes]

    def record(self, module: torch.nn.Module, arguments: Arguments) -> None:
        """Record a call in a forward of one batch."""
        self._recorded[module].append([_size(leaf) for leaf in tree_flatten(arguments)[0]])

    def split(self, arguments: Carried) -> list[Arguments]:
        """Return the arguments of each stream."""
        streams: list[list[Any]] = [[] for _ in self._sizes]
        for leaf, carries in zip(arguments.leaves, arguments.carry, strict=True):
            parts = (
                leaf.split(self.rows_of_streams(leaf.shape[0]))
                if carries
                else [leaf] * len(self._sizes)
            )
            for stream, part in zip(streams, parts, strict=True):
                stream.append(part)
        return [tree_unflatten(stream, arguments.spec) for stream in streams]

    def carried(self, module: torch.nn.Module, arguments: Arguments) -> Carried:
        """Find the arguments of a call that carry the batch. To be called once for each call.

        Raises NotStackable where that is not known, or where the stack cannot be split.
        """
        leaves, spec = tree_flatten(arguments)
        call = self._num_calls[module]
        self._num_calls[module] += 1
        if call == len(self._carry[module]):
            self._learn(module, call, leaves)
        carry = self._carry[module][call]
        num_examples = sum(self._sizes)
        if len(leaves) != len(carry):
            raise NotStackable(f"{self._names[module]} is not called as it was on the first batch")
        found = []
        for leaf, carries in zip(leaves, carry, strict=True):
            if isinstance(leaf, torch.Tensor) and carries is None:
                carries = leaf.ndim > 0 and leaf.shape[0] == num_examples
            # an optional input may be None in this call
            found.append(bool(carries) and _size(leaf) is not None)
            if found[-1] and (_size(leaf) or 0) % num_examples:
                raise NotStackable(
                    f"{self._names[module]} is given {_size(leaf)} rows of {num_examples} "
                    "examples: which of them belong to which point is not known"
                )
        return Carried(leaves, spec, found)

    def _learn(self, module: torch.nn.Module, call: int, leaves: list[Any]) -> None:
        recorded = self._recorded[module]
        if (
            call >= len(recorded)
            and self._carry[module]
            and len(self._carry[module][-1]) == len(leaves)
        ):
            # more calls than on the first batch: split like the last known call
            self._carry[module].append(self._carry[module][-1])
            return
        if call >= len(recorded) or len(recorded[call]) != len(leaves):
            raise NotStackable(f"{self._names[module]} is not called as it was on the first batch")
        carry: list[bool | None] = []
        for before, leaf in zip(recorded[call], leaves, strict=True):
            now = _size(leaf)
            grown = (before or 0) * sum(self._sizes) / self._examples_recorded
            if now is not None and now not in (before, grown):
                raise NotStackable(
                    f"{self._names[module]} is given an input of {before} rows for a batch, {now} "
                    "for the stack"
                )
            carry.append(None if now is None else now != before)
        self._carry[module].append(carry)

    def join(self, module: torch.nn.Module, outputs: list[Any], carries: bool) -> Any:
        """Concatenate the outputs of the streams on dim 0.

        carries: whether inputs carried the batch. If not, an output of one row is repeated for each
        example of its stream. Raises NotStackable where an output has no batch dimension.
        """
        flat = [tree_flatten(output) for output in outputs]
        joined = []
        for parts in zip(*(leaves for leaves, _ in flat), strict=True):
            if not isinstance(parts[0], torch.Tensor):
                joined.append(parts[0])
                continue
            if parts[0].ndim == 0 or (not carries and parts[0].shape[0] != 1):
                raise NotStackable(
                    f"{self._names[module]} returns a tensor without a batch dimension"
                )
            rows = (
                part if carries else part.expand(size, *part.shape[1:])
                for part, size in zip(parts, self._sizes, strict=True)
            )
            joined.append(torch.cat(tuple(rows)))
        return tree_unflatten(joined, flat[0][1])


def _size(leaf: Any) -> int | None:
    """Size of dim 0 of a tensor, or None for anything else."""
    return leaf.shape[0] if isinstance(leaf, torch.Tensor) and leaf.ndim else None
