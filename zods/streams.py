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


class _Reads(TorchFunctionMode):
    """Notes parameters that a module uses while no module that owns them runs."""

    def __init__(self, forward_at: PerturbedForward) -> None:
        super().__init__()
        self._forward_at = forward_at
        self.found: list[tuple[torch.nn.Module, Perturbable]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        at = self._forward_at
        if at._stack and func.__name__ != "__get__":
            running = [module for module, _ in at._stack]
            for leaf in tree_leaves((args, kwargs)):
                parameter = at._by_id.get(id(leaf))
                if parameter is None or any(parameter in at._owned[module] for module in running):
                    continue
                if (running[-1], parameter) not in self.found:
                    self.found.append((running[-1], parameter))
        return func(*args, **(kwargs or {}))


class PerturbedForward:
    """Runs a module's forward at given points. Installed once, after DeepSpeed's own hooks."""

    def __init__(self, module: torch.nn.Module, parameters: Sequence[Perturbable], distribution: str) -> None:
        self.distribution = distribution
        self._module = module
        self._by_id = {id(p.param): p for p in parameters}
        self._point: Point | None = None
        self._live: dict[int, tuple[Perturbable, torch.Tensor]] = {}  # by ordinal: the data a copy stands in for
        self._stack: list[tuple[torch.nn.Module, list[int]]] = []  # running modules, and the ordinals each put in place
        self._owned: dict[torch.nn.Module, list[Perturbable]] = {}  # what each module puts in place
        self._ran: set[torch.nn.Module] | None = None
        for submodule in module.modules():
            owned = [self._by_id[id(p)] for p in submodule.parameters(recurse=False) if id(p) in self._by_id]
            self._owned[submodule] = owned
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
        """Watch one forward at the parameters as they are, to see which modules run.

        Parameters of a module whose forward never runs (torch's MultiheadAttention reads its projection's weight
        itself) are handed to the nearest module above that does run.
        """
        self._ran = set()
        reads = _Reads(self)
        try:
            with reads:
                yield
        finally:
            ran, self._ran = self._ran, None
            self._stack.clear()
        for submodule, parameter in reads.found:
            self._owned[submodule] = [*self._owned[submodule], parameter]
        parents = {child: parent for parent in self._module.modules() for child in parent.children()}
        for submodule, owned in list(self._owned.items()):
            above = submodule
            while above not in ran and above in parents:
                above = parents[above]
            if above is not submodule and owned:
                self._owned[submodule] = []
                self._owned[above] = self._owned[above] + owned

    def _enter(self, submodule: torch.nn.Module, _inputs: Any) -> None:
        if self._ran is not None:
            self._ran.add(submodule)
        if self._point is None:
            if self._ran is not None:
                self._stack.append((submodule, []))
            return
        placed = []
        for parameter in self._owned[submodule]:
            live = parameter.param.data
            # a tied parameter may be in place already; one of a module that never runs may not be gathered
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
