"""Batches: their two forms, and the call of a model with a batch.

A batch is tensors, or containers of tensors. A loader yields it, or `engine(...)` is called with
it. `Signature` converts it to one of two forms. The first is a dict of keyword arguments of the
model's forward, so that entries such as "labels" are found by name. The second is `Inputs`, for a
forward that does not name its arguments. Called by the engine, by the evaluator and by the metrics
of whole datasets.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Key of a batch's entry with one weight per example. The entry is not passed to the model.
WEIGHTS = "example_weights"
# Key of a batch's entry with the position of each example in the step's batch, where the examples
# are not in the order of their positions. The entry is not passed to the model.
POSITIONS = "example_positions"
# Key of a batch's entry with the reference answers of each example, lists of texts. The entry is not
# passed to the model.
REFERENCES = "example_references"
# Key of a batch's entry with the tokens of each example's candidates (B, W), of which one is the
# labelled token. The entry is not passed to the model.
CANDIDATES = "candidate_tokens"

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Inputs:
    """Arguments for a forward that does not name all of its arguments."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class Signature:
    """The arguments that a model's forward takes."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._forward_name = f"{type(model).__name__}.forward"
        self._signature: inspect.Signature | None
        try:
            self._signature = inspect.signature(model.forward)
        except (TypeError, ValueError):  # a forward written in C++
            self._signature = None
        parameters = list(self._signature.parameters.values()) if self._signature else []
        self.names = [p.name for p in parameters if p.kind in _NAMED]
        required = [
            p for p in parameters if p.kind in (*_NAMED, *_POSITIONAL) and p.default is p.empty
        ]
        first = (
            bool(parameters)
            and parameters[0].kind in _POSITIONAL
            and parameters[0].default is parameters[0].empty
        )
        self._takes_one = first and len(required) == 1
        self._takes_any = not self._signature or any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._takes_only_one = (
            self._takes_one
            and sum(p.kind in (*_POSITIONAL, p.VAR_POSITIONAL) for p in parameters) == 1
        )

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any] | Inputs:
        """Bind the arguments of `model(*args, **kwargs)`; a single argument may be a whole batch.

        A mapping, a named tuple or a dataclass is unpacked by name if forward names its entries.
        Another tuple or list is unpacked by position. A batch that cannot be unpacked is passed as
        the single argument of a forward that takes one. Binding the result again returns an equal
        result.

        Raises ValueError where forward does not accept the arguments.
        """
        if len(args) == 1 and not kwargs:
            return self._bind_batch(args[0])
        if not args:
            return self._bind_mapping(kwargs)
        return self._bind_call(args, kwargs)

    def _bind_batch(self, batch: Any) -> dict[str, Any] | Inputs:
        if isinstance(batch, Inputs):
            return batch
        entries = _entries(batch)
        if entries is not None:
            known = set(self.names) & set(entries)
            if self._takes_one and not known:
                return self._bind_call((batch,), {})
            if isinstance(batch, Mapping):
                return self._bind_mapping(entries)
            if len(known) == len(entries):
                return entries
        if not isinstance(batch, (tuple, list)):
            return self._bind_call((batch,), {})
        if len(batch) == 1 and _entries(batch[0]) is not None:
            return self._bind_batch(batch[0])
        if self._takes_only_one and len(batch) > 1:
            return self._bind_call((batch,), {})
        return self._bind_call(tuple(batch), {})

    def _bind_mapping(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        odd = [str(key) for key in without_weights(entries) if key not in self.names]
        if odd and not self._takes_any:
            raise ValueError(
                f"the batch: {self._forward_name} takes no {', '.join(odd)}; it takes "
                f"{', '.join(self.names)}. Drop what it does not take, e.g. in collate_fn."
            )
        return dict(entries)

    def _bind_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | Inputs:
        if self._signature is None:
            return Inputs(args, kwargs)
        own = without_weights(kwargs)
        try:
            bound = self._signature.bind_partial(*args, **own)
        except TypeError as error:
            found = describe(args) if not kwargs else f"{describe(args)} and {describe(kwargs)}"
            takes = ", ".join(self.names) or "nothing"
            raise ValueError(
                f"the batch: {self._forward_name} takes {takes}; it was given a {found}: {error}."
            ) from None
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self._signature.parameters[name].kind
            if kind in _NAMED:
                named[name] = value
            elif kind is inspect.Parameter.VAR_KEYWORD:
                named |= value
            else:  # positional only: it cannot be passed by name
                return Inputs(args, kwargs)
        return {**named, **{key: value for key, value in kwargs.items() if key not in own}}


def _entries(batch: Any) -> dict[str, Any] | None:
    """The entries of a batch by name; None where the batch does not name them."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return dict(zip(batch._fields, batch, strict=True))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return None


def accepted_arguments(model: torch.nn.Module) -> frozenset[str]:
    """The names of the arguments that a model's forward takes.

    If a wrapper of peft passes on other arguments, those of its base model are among them.
    """
    takes = inspect.signature(model.forward).parameters
    names = set(takes)
    if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        base = getattr(model, "get_base_model", lambda: model)()
        names |= set(inspect.signature(base.forward).parameters)
    return frozenset(names)


def call_model(model: Any, batch: Any) -> Any:
    """Call a model with a batch and return its outputs.

    A dict is passed as keyword arguments, as `without_weights` returns it. A tuple or list is passed
    as positional arguments, and any other batch as the single argument.
    """
    if isinstance(batch, Inputs):
        return model(*batch.args, **without_weights(batch.kwargs))
    if isinstance(batch, Mapping):
        return model(**without_weights(batch))
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def without_weights(batch: Any) -> Any:
    """Copy a mapping without the weights, positions, references and candidates of its examples; return
    any other batch as it is.
    """
    if not isinstance(batch, Mapping):
        return batch
    own = (WEIGHTS, POSITIONS, REFERENCES, CANDIDATES)
    return {key: value for key, value in batch.items() if key not in own}


def without_references(batch: Any) -> Any:
    """Copy a mapping without the references of its examples; return any other batch as it is."""
    if not isinstance(batch, Mapping):
        return batch
    return {key: value for key, value in batch.items() if key != REFERENCES}


def positions_in(batch: Any) -> list[int] | None:
    """The positions of a batch's examples in the step's batch, where the batch has them."""
    found = batch.get(POSITIONS) if isinstance(batch, Mapping) else None
    return None if found is None else found.tolist()


def to_device(batch: Any, device: torch.device) -> Any:
    """Copy a batch to the device: tensors, containers of tensors, objects with a method `to`."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        return value.to(device) if callable(getattr(value, "to", None)) else value

    return _map_values(move, batch)


def take_rows(batch: Any, rows: Sequence[int] | None) -> Any:
    """Some examples of a batch, in containers as the batch's; None: the batch itself.

    A tensor whose dim 0 is not the number of examples serves all of them, and is kept whole. An
    entry that is a list with one item per example, such as images of several sizes, is cut as a
    tensor is.
    """
    if rows is None:
        return batch
    size = num_examples(batch)

    def take(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != size:
            return value
        return value[torch.tensor(rows, device=value.device)]

    def of_entry(value: Any) -> Any:
        if isinstance(value, list) and len(value) == size:
            return [value[row] for row in rows]
        return _map_values(take, value)

    if isinstance(batch, Mapping):
        return {key: of_entry(value) for key, value in batch.items()}
    if isinstance(batch, Inputs):
        return Inputs(tuple(map(of_entry, batch.args)), of_entry(batch.kwargs))
    return _map_values(take, batch)


def _map_values(function: Callable[[Any], Any], batch: Any) -> Any:
    """Apply a function to the values in nested containers, and return containers of the results."""
    if isinstance(batch, Mapping):
        return {key: _map_values(function, value) for key, value in batch.items()}
    if isinstance(batch, Inputs):
        return Inputs(_map_values(function, batch.args), _map_values(function, batch.kwargs))
    if isinstance(batch, (tuple, list)):
        made = [_map_values(function, item) for item in batch]
        return type(batch)(*made) if hasattr(batch, "_fields") else type(batch)(made)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        copied = copy.copy(batch)
        for name, value in (_entries(batch) or {}).items():
            object.__setattr__(copied, name, _map_values(function, value))  # also if frozen
        return copied
    return function(batch)


def num_examples(batch: Any) -> int:
    """The size of the batch dimension of a tensor, or of nested containers of tensors.

    If the batch has labels, it is their dim 0. Otherwise it is the dim 0 above 1 that most tensors
    have: a tensor of one row, such as position ids, may serve all examples. Among equally frequent
    sizes the smallest is taken: a table beside the inputs is longer than the batch. The order of
    the entries does not matter.

    Raises:
        ValueError: the batch holds no tensor with a dim 0.

    >>> num_examples({"input_ids": torch.zeros(3, 8), "position_ids": torch.zeros(1, 8)})
    3
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    sizes = Counter(
        tensor.shape[0] for tensor in _tensors(labels if isinstance(labels, Tensor) else batch)
    )
    if not sizes:
        sizes = Counter(tensor.shape[0] for tensor in _tensors(batch))
    if not sizes:
        raise ValueError(
            f"the batch holds no tensor with a batch dimension; it is {describe(batch)}. Give "
            "tensors whose first dimension is the number of examples"
        )
    return min(sizes, key=lambda size: (size == 1, -sizes[size], size))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested containers that have a dim 0."""
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
        return
    inner = value if isinstance(value, (tuple, list)) else (_entries(value) or {}).values()
    for item in inner:
        yield from _tensors(item)


def describe(value: Any) -> str:
    """Describe a batch or a model's outputs for messages: types, names and shapes."""
    if isinstance(value, Mapping):
        keys = [f"{key} (None)" if entry is None else str(key) for key, entry in value.items()]
        return f"{type(value).__name__} with keys {', '.join(keys) or 'none'}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {', '.join(map(describe, value)) or 'nothing'}"
    return type(value).__name__
