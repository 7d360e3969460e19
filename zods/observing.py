"""Which modules use which parameters: seen in one forward, for a module may read a parameter that another one owns."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

TRANSPOSES = ("T", "mT", "H", "mH")  # attributes of a parameter that are views of its values


class Perturbable(Protocol):
    """What this room needs to know of a trainable parameter; `zods.sharding.Slice` is one."""

    @property
    def name(self) -> str: ...
    @property
    def ordinal(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def param(self) -> torch.nn.Parameter: ...
    @property
    def whole_numel(self) -> int: ...


class Observer(TorchFunctionMode):
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

    def __enter__(self) -> Observer:
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
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")  # of a getter or setter
        if self._running and (func.__name__ not in ("__get__", "__set__") or attribute in TRANSPOSES):
            for leaf in tree_leaves((args, kwargs)):
                parameter = self._by_id.get(id(leaf))
                if parameter is not None and not any(parameter in self._holders[m] for m in self._running):
                    found = self.found.setdefault(self._running[-1], [])
                    if parameter not in found:
                        found.append(parameter)
        return func(*args, **(kwargs or {}))
