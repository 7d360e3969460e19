"""Which inputs of a module carry the batch dimension, so that a stack of batches can be split into
its streams and joined again.

Learned, not guessed from sizes: an input carries the batch where its dim 0 grew by the number of
streams from one forward of a batch to one of the stack; one whose dim 0 stayed (BERT's position
ids) is given to every stream as it is. An input that carries the batch has as many rows for every
example: those that a router sends to an expert cannot be told apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

Arguments = tuple[tuple, dict[str, Any]]


class NotStackable(RuntimeError):
    """A module does something that cutting a stack on dim 0 cannot serve."""


class Stacking:
    """Cuts and joins the calls of modules. `begin` comes before every forward."""

    def __init__(self, names: Mapping[torch.nn.Module, str]) -> None:
        """names: of the modules, for messages."""
        self._names = names
        # dim 0 of a batch's inputs
        self._recorded: dict[torch.nn.Module, list[list[int | None]]] = defaultdict(list)
        # None: not a tensor
        self._carry: dict[torch.nn.Module, list[list[bool | None]]] = defaultdict(list)
        self._num_calls: dict[torch.nn.Module, int] = defaultdict(int)
        self._num_streams = self._num_examples = 1

    def begin(self, num_streams: int, num_examples: int) -> None:
        """num_examples: of one stream."""
        self._num_streams, self._num_examples = num_streams, num_examples
        self._num_calls.clear()

    def forget(self) -> None:
        self._recorded.clear()
        self._carry.clear()

    def record(self, module: torch.nn.Module, arguments: Arguments) -> None:
        """Note a call in a forward of one batch."""
        self._recorded[module].append([_size(leaf) for leaf in tree_flatten(arguments)[0]])

    def split(self, module: torch.nn.Module, arguments: Arguments) -> tuple[list[Arguments], bool]:
        """The arguments of each stream, and whether any of them carries the batch."""
        leaves, spec = tree_flatten(arguments)
        call = self._num_calls[module]
        self._num_calls[module] += 1
        if call == len(self._carry[module]):
            self._learn(module, call, leaves)
        carry = self._carry[module][call]
        streams: list[list[Any]] = [[] for _ in range(self._num_streams)]
        if len(leaves) != len(carry):
            raise NotStackable(f"{self._names[module]} is not called as it was on the first batch")
        for leaf, carries in zip(leaves, carry, strict=True):
            rows = self._num_streams * self._num_examples
            if isinstance(leaf, torch.Tensor) and carries is None:
                carries = leaf.ndim > 0 and leaf.shape[0] == rows
            carries = carries and _size(leaf) is not None  # an optional input may be None this time
            if carries and (_size(leaf) or 0) % rows:
                raise NotStackable(
                    f"{self._names[module]} is given {_size(leaf)} rows of {rows} examples: which "
                    "of them belong to which point is not known"
                )
            parts = leaf.chunk(self._num_streams) if carries else [leaf] * self._num_streams
            for stream, part in zip(streams, parts, strict=True):
                stream.append(part)
        return [tree_unflatten(stream, spec) for stream in streams], any(carry)

    def _learn(self, module: torch.nn.Module, call: int, leaves: list[Any]) -> None:
        recorded = self._recorded[module]
        if (
            call >= len(recorded)
            and self._carry[module]
            and len(self._carry[module][-1]) == len(leaves)
        ):
            # more calls than on the first batch: cut as the others
            self._carry[module].append(self._carry[module][-1])
            return
        if call >= len(recorded) or len(recorded[call]) != len(leaves):
            raise NotStackable(f"{self._names[module]} is not called as it was on the first batch")
        carry: list[bool | None] = []
        for before, leaf in zip(recorded[call], leaves, strict=True):
            now = _size(leaf)
            if now is not None and now not in (before, self._num_streams * (before or 0)):
                raise NotStackable(
                    f"{self._names[module]} is given an input of {before} rows for a batch, {now} "
                    "for the stack"
                )
            carry.append(None if now is None else now != before)
        self._carry[module].append(carry)

    def join(self, module: torch.nn.Module, outputs: list[Any], carries: bool) -> Any:
        """The streams' outputs as one: cat on dim 0; without a batch in the inputs, repeated for
        each example.
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
                part if carries else part.expand(self._num_examples, *part.shape[1:])
                for part in parts
            )
            joined.append(torch.cat(tuple(rows)))
        return tree_unflatten(joined, flat[0][1])


def _size(leaf: Any) -> int | None:
    return leaf.shape[0] if isinstance(leaf, torch.Tensor) and leaf.ndim else None
