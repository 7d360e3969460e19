"""Wrap the forward of a module, and remove the wrapper again.

Hooks of the model's user run inside the wrapped forward, because pruning, the hook-based weight and
spectral norms and adapters read the module's parameters there. DeepSpeed's own hooks stay outside:
they gather the parameters before the forward, and may release them after it.
`zods.forward.perturbed_modules` wraps the modules of a model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

RunForward = Callable[[torch.nn.Module, Callable, tuple, dict[str, Any]], Any]


class WrappedForward:
    """A module's forward that calls run(module, original forward, args, kwargs).

    A copy or a pickle of the module has the original forward, and computes with its own parameters.

    has_hooks: whether hooks of the model's user run inside.
    """

    def __init__(
        self, module: torch.nn.Module, run: RunForward, fused: Callable | None = None
    ) -> None:
        """fused: a function that computes what the forward does; see `zods.forward.fused_norms`."""
        self.original = module.forward
        self._forward = self.original if fused is None else fused
        self._module = module
        self._run: RunForward | None = run
        self._was_attribute = "forward" in vars(module)
        self.has_hooks = False
        functools.update_wrapper(self, self.original, updated=())
        module.forward = self
        # torch's TransformerEncoderLayer bypasses its children's forwards, unless a module has a
        # hook
        self._handle = module.register_forward_pre_hook(_do_nothing)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original = self._forward
        if self.has_hooks:
            original = functools.partial(_with_hooks, self._module, self._forward)
        if self._run is None:
            return original(*args, **kwargs)
        return self._run(self._module, original, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # a copied bound method is bound to the copy of its module
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> Any:
        return _identity, (self.original,)

    def move_hooks(self) -> None:
        """Move hooks of the model's user inside the wrapped forward."""
        for hooks in (self._module._forward_pre_hooks, self._module._forward_hooks):
            for key, hook in hooks.items():
                if is_users(hook):
                    hooks[key] = MovedHook(hook)
                    self.has_hooks = True

    def remove(self) -> None:
        """Give the module its forward and its hooks back."""
        self._run = None
        self._forward = self.original
        self._handle.remove()
        for hooks in (self._module._forward_pre_hooks, self._module._forward_hooks):
            for key, hook in hooks.items():
                if isinstance(hook, MovedHook):
                    hooks[key] = hook.hook
        if vars(self._module).get("forward") is not self:
            return  # another wrapper was put around this one
        if self._was_attribute:
            self._module.forward = self.original
        else:
            del self._module.forward


def has_moved_hooks(model: torch.nn.Module) -> bool:
    """Whether hooks of the model's user run inside wrapped forwards."""
    hooks = (
        hook
        for m in model.modules()
        for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
    )
    return any(isinstance(hook, MovedHook) for hook in hooks)


class MovedHook:
    """A hook that runs inside the wrapped forward.

    It stays registered under its key, so that the user's handle still removes it. When torch calls
    it, around the wrapped forward, it does nothing.
    """

    def __init__(self, hook: Callable) -> None:
        self.hook = hook

    def __call__(self, *_: Any, **__: Any) -> None:
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.hook, memo)

    def __reduce__(self) -> Any:
        return _identity, (self.hook,)


def is_users(hook: Any) -> bool:
    """Whether the model or its user registered a hook, not DeepSpeed or `zods.forward`."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    named = getattr(function, "__module__", None) or ""
    return (
        function is not _do_nothing
        and not isinstance(hook, MovedHook)
        and not named.startswith("deepspeed.")
    )


def _with_hooks(module: torch.nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a forward with the moved hooks, in the way of torch's Module.__call__."""
    for key, moved in list(module._forward_pre_hooks.items()):
        if not isinstance(moved, MovedHook):
            continue
        if key in module._forward_pre_hooks_with_kwargs:
            changed = moved.hook(module, args, kwargs)
            if changed is not None:
                args, kwargs = changed
        else:
            changed = moved.hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    output = forward(*args, **kwargs)
    for key, moved in list(module._forward_hooks.items()):
        if isinstance(moved, MovedHook):
            with_kwargs = key in module._forward_hooks_with_kwargs
            changed = moved.hook(module, args, *([kwargs] if with_kwargs else []), output)
            output = output if changed is None else changed
    return output


def _do_nothing(*_: Any) -> None:
    return None


def _identity(value: Any) -> Any:
    return value
