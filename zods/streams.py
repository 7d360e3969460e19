"""Evaluate a module at a point near its parameters without touching what is stored.

A perturbed copy of a parameter exists only while the module that owns it runs: hooks put it in place of the gathered
(ZeRO-3) or stored (replicated) data before the module's own forward, and put that back after it. So there is no drift,
and at any time one module's parameters exist twice, not the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from zods.kernels import combine_


class Perturbable(Protocol):
    """What this room needs to know of a trainable parameter; `zods.sharding.Slice` is one."""

    @property
    def name(self) -> str: ...
    @property
    def ordinal(self) -> int: ...
    @property
    def param(self) -> torch.nn.Parameter: ...
    @property
    def whole_numel(self) -> int: ...


class Source(NamedTuple):
    """Where a point stands: scale * weight + sum_k coefficients[k] * z(seeds[k]), before the perturbation."""

    weight: torch.Tensor  # the whole parameter
    scale: float = 1.0
    seeds: tuple[int, ...] = ()
    coefficients: tuple[float, ...] = ()


def at_parameters(parameter: Any, live: torch.Tensor) -> Source:
    """The source that is the parameters themselves."""
    return Source(live)


@dataclass(frozen=True)
class Point:
    """source + coefficient * z(seed). source: maps (parameter, its live whole data) to a `Source`."""

    seed: int
    coefficient: float
    source: Callable[[Any, torch.Tensor], Source] = field(default=at_parameters)


class _Observer(TorchFunctionMode):
    """Notes which parameters are used while no module that holds them runs, and by which module.

    Its hooks come before and after all others, so that what DeepSpeed does with a module's own parameters does not count.
    """

    def __init__(self, holders: dict[torch.nn.Module, list[Perturbable]]) -> None:
        super().__init__()
        self.found: dict[torch.nn.Module, list[Perturbable]] = {}
        self._holders = holders
        self._by_id = {id(p.param): p for held in holders.values() for p in held}
        self._running: list[torch.nn.Module] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> _Observer:
        for module in self._holders:
            enter = module.register_forward_pre_hook(lambda m, _: self._running.append(m), prepend=True)
            leave = module.register_forward_hook(lambda *_: self._left())
            self._hooks += [enter, leave]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def _left(self) -> None:
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._running and func.__name__ not in ("__get__", "__set__"):
            for leaf in tree_leaves((args, kwargs)):
                parameter = self._by_id.get(id(leaf))
                if parameter is not None and not any(parameter in self._holders[m] for m in self._running):
                    found = self.found.setdefault(self._running[-1], [])
                    if parameter not in found:
                        found.append(parameter)
        return func(*args, **(kwargs or {}))


class PerturbedForward:
    """Runs a module's forward at given points. Installed once, after DeepSpeed's own hooks."""

    def __init__(self, module: torch.nn.Module, parameters: Sequence[Perturbable], distribution: str) -> None:
        self.distribution = distribution
        by_id = {id(p.param): p for p in parameters}
        self._point: Point | None = None
        self._live: dict[int, tuple[Perturbable, torch.Tensor]] = {}  # by ordinal: the data a copy stands in for
        self._stack: list[tuple[torch.nn.Module, list[int]]] = []  # running modules, and the ordinals each put in place
        self._held: dict[torch.nn.Module, list[Perturbable]] = {}  # what each module puts in place
        for submodule in module.modules():
            owned = [by_id[id(p)] for p in submodule.parameters(recurse=False) if id(p) in by_id]
            self._held[submodule] = owned
            submodule.register_forward_pre_hook(self._enter)
            submodule.register_forward_hook(self._leave, prepend=True, always_call=True)

    @contextmanager
    def at(self, point: Point | None) -> Iterator[None]:
        """Forwards inside run at `point`; None is the parameters as they are."""
        self._point = point
        try:
            yield
        finally:
            self._point = None
            self._stack.clear()
            self._restore(list(self._live))  # nothing, unless a forward was cut short

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Watch one forward at the parameters as they are, to see which modules use which parameters.

        A module that reads another's parameter itself (a head tied by hand, torch's MultiheadAttention with its output
        projection) puts that in place too from then on.
        """
        observer = _Observer(self._held)
        with observer:
            yield
        for module, parameters in observer.found.items():
            self._held[module] = [*self._held[module], *parameters]

    def _enter(self, submodule: torch.nn.Module, _inputs: Any) -> None:
        if self._point is None:
            return
        placed = []
        for parameter in self._held[submodule]:
            live = parameter.param.data
            # a tied parameter may be in place already; one that another module holds may not be gathered yet
            if parameter.ordinal not in self._live and live.numel() == parameter.whole_numel:
                self._live[parameter.ordinal] = (parameter, live)
                parameter.param.data = self._perturbed(parameter, live, self._point)
                placed.append(parameter.ordinal)
        self._stack.append((submodule, placed))

    def _leave(self, submodule: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        if self._stack and self._stack[-1][0] is submodule:  # not where a hook before ours raised
            self._restore(self._stack.pop()[1])

    def _restore(self, ordinals: Sequence[int]) -> None:
        for ordinal in ordinals:
            parameter, live = self._live.pop(ordinal)
            parameter.param.data = live

    def _perturbed(self, parameter: Perturbable, live: torch.Tensor, point: Point) -> torch.Tensor:
        source = point.source(parameter, live)
        return combine_(
            torch.empty_like(live, memory_format=torch.contiguous_format),
            weight=source.weight,
            scale=source.scale,
            seeds=(*source.seeds, point.seed),
            coefficients=(*source.coefficients, point.coefficient),
            distribution=self.distribution,
            parameter=parameter.ordinal,
            offset=0,
        )
