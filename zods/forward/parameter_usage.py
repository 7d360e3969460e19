"""Find which modules use which parameters, by observing one forward.

A module may read a parameter that another module owns. `zods.forward.perturbed_modules` observes
the first forward, and then gives each module copies of all parameters that it uses.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

VIEWS = ("T", "mT", "H", "mH", "data")  # attributes of a parameter that are views of its values
# conversions of a tensor to Python values
CONVERSIONS = (
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "item",
    "tolist",
    "numpy",
)


class Perturbable(Protocol):
    """The attributes of a trainable parameter that `zods.forward` needs.

    `zods.params.shards.Shard` has them.
    """

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
    """Record which parameters are used while no module that holds them runs, and by which module.

    The observer's hooks run before and after all other hooks, so that DeepSpeed's use of a module's
    own parameters does not count.

    found: the parameters that each module uses and does not hold. branches: functions, such as
    `item`, by which Python code outside of all modules that hold parameters reads a value computed
    from parameters. Such code may take another branch at another point.
    """

    def __init__(self, holders: dict[torch.nn.Module, list[Perturbable]], *, sharded: bool) -> None:
        """holders: the parameters that each module holds. sharded: whether ZeRO-3 shards the
        parameters. DeepSpeed then gives a module an alias of each tensor among its inputs, and
        uses of the alias cannot be observed. So a module that passes a parameter to another module
        counts as its user.
        """
        super().__init__()
        self.found: dict[torch.nn.Module, list[Perturbable]] = {}
        self.branches: set[str] = set()
        self._made_by_parameters: dict[int, weakref.ref[torch.Tensor]] = {}
        self._holders = holders
        self._sharded = sharded
        self._by_id = {id(p.param): p for held in holders.values() for p in held}
        self._running: list[torch.nn.Module] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Observer:
        for module in self._holders:
            enter = module.register_forward_pre_hook(self._entered, prepend=True, with_kwargs=True)
            leave = module.register_forward_hook(lambda *_: self._left())
            self._hooks += [enter, leave]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def _entered(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._sharded:
            self._note((args, kwargs))
        self._running.append(module)

    def _left(self) -> None:
        self._running.pop()

    def _note(self, values: Any) -> None:
        """Record that the module that runs now uses the parameters among `values`."""
        for leaf in tree_leaves(values) if self._running else ():
            parameter = self._by_id.get(id(leaf))
            if parameter is None:
                continue
            held = (p for m in self._running for p in (*self._holders[m], *self.found.get(m, ())))
            if parameter not in held:
                self.found.setdefault(self._running[-1], []).append(parameter)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if reads_values(func) and not (
            func.__name__ == "__get__" and _called_by_us(sys._getframe(1))
        ):
            self._note((args, kwargs))
        made = func(*args, **(kwargs or {}))
        self._track(func, (args, kwargs), made)
        return made

    def _track(self, func: Any, given: Any, made: Any) -> None:
        """Keep track of tensors computed from parameters, and record where Python reads them."""
        if not any(
            self._depends(leaf) for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)
        ):
            return
        if func.__name__ in CONVERSIONS and not any(self._holders[m] for m in self._running):
            self.branches.add(func.__name__)
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._made_by_parameters[id(leaf)] = weakref.ref(leaf)

    def _depends(self, tensor: torch.Tensor) -> bool:
        known = self._made_by_parameters.get(id(tensor))
        return id(tensor) in self._by_id or (known is not None and known() is tensor)


def reads_values(func: Any) -> bool:
    """Whether a function of torch reads a tensor's values, not only its attributes."""
    # the attribute's name, for a getter or setter
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    return func.__name__ not in ("__get__", "__set__") or (
        func.__name__ == "__get__" and attribute in VIEWS
    )


def _called_by_us(frame: Any) -> bool:
    """Whether code of DeepSpeed or zods reads an attribute.

    Such code moves data, and computes nothing for the model.
    """
    return frame.f_globals.get("__name__", "").split(".")[0] in ("deepspeed", "zods")
