"""The modules of a model, wrapped so that they can run at points near the model's parameters.

`PerturbedModules` wraps the forward of every module that owns parameters. It knows which parameters
each module uses, and hands a module's call to the runner of the form of evaluation
(`zods.forward.module_runners`). A runner puts perturbed copies of the parameters in place of their
gathered (ZeRO-3) or stored (replicated) data, runs the module's own forward, and restores the data.

Stored weights are never changed, so there is no drift. At any time, copies exist for one module,
not for the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from deepspeed.utils.z3_leaf_module import z3_leaf_module

from zods.core.directions import Direction
from zods.core.points import Point
from zods.forward.fused_norms import Compute, run_fused
from zods.forward.parameter_copies import Perturber
from zods.forward.parameter_usage import Observer, Perturbable
from zods.forward.row_norms import find_row_norms
from zods.forward.wrapping import WrappedForward, is_users


class Deferred(Protocol):
    """Updates that are applied to parameters when a forward loads them; see
    `zods.params.deferred_update`.
    """

    def loaded(self, ordinals: Sequence[int]) -> None: ...
    def before_release(self) -> None: ...


class ModuleRunner(Protocol):
    """How wrapped modules run in one form of evaluation; see `zods.forward.module_runners`.

    every_module: whether modules without perturbed parameters run through the runner too.
    """

    every_module: bool

    def run_frozen(
        self, block: torch.nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Return the output of a block without perturbed parameters."""
        ...

    def run(
        self, module: torch.nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Return a module's output, inside `PerturbedModules.loaded`. original: its own forward."""
        ...


class PerturbedModules:
    """The wrapped modules of one model, and the parameters that each of them uses.

    The wrappers are installed after DeepSpeed's own hooks, and stay until `remove`.

    perturber: makes the copies. names: of the modules, for messages. held: the perturbed parameters
    that each module uses. inside_leaves: modules inside DeepSpeed's leaf modules. DeepSpeed gathers
    everything inside a leaf module with the leaf. What runs there may differ from stream to stream
    (experts), so a stack is split at the leaf, and streams in lockstep wait only there. branches:
    see `zods.forward.parameter_usage.Observer`. frozen_blocks: the blocks (entries of a ModuleList)
    without perturbed parameters, as below the adapters of the last blocks. row_norms: functions
    that compute norms with other weights for each row, see `zods.forward.row_norms`.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        parameters: Sequence[Perturbable],
        direction: Direction,
        deferred: Deferred | None = None,
        fused: Mapping[torch.nn.Module, Compute] | None = None,
    ) -> None:
        """deferred: called with a module's gathered parameters before they are used, and again
        before they may be released. fused: functions that compute modules, see
        `zods.forward.fused_norms`.
        """
        self.perturber = Perturber(direction)
        self.names = {
            m: f"{name or 'the model'} ({type(m).__name__})" for name, m in module.named_modules()
        }
        self.held: dict[torch.nn.Module, list[Perturbable]] = {}
        self.branches: set[str] = set()
        self.row_norms = find_row_norms(module)
        self._deferred, self._fused = deferred, fused or {}
        self._runner: ModuleRunner | None = None  # None: the parameters as they are
        self._wrapped: dict[torch.nn.Module, WrappedForward] = {}
        self._num_hooks = 0  # hooks of all modules, when they were last counted
        self._sharded = any(hasattr(p.param, "ds_tensor") for p in parameters)
        by_id = {id(p.param): p for p in parameters}
        self._leaves = {m for m in module.modules() if z3_leaf_module(m)}
        self.inside_leaves = {
            inner for leaf in self._leaves for inner in leaf.modules() if inner is not leaf
        }
        for submodule in module.modules():
            own = list(submodule.parameters(recurse=False))
            self.held[submodule] = [by_id[id(p)] for p in own if id(p) in by_id]
            # streams in lockstep wait for each other also at modules with frozen parameters
            if own or submodule in self._leaves:
                self._wrap(submodule)
        self.frozen_blocks = {
            block
            for blocks in module.modules()
            if isinstance(blocks, torch.nn.ModuleList)
            for block in blocks
            # streams in lockstep wait at a module with parameters of its own
            if not list(block.parameters(recurse=False))
            and not any(self.held[inner] or inner in self._leaves for inner in block.modules())
            and any(True for _ in block.parameters())
        }
        for block in self.frozen_blocks:
            self._wrap(block)

    def _wrap(self, submodule: torch.nn.Module) -> None:
        if submodule not in self._wrapped:
            fused = self._fused.get(submodule)
            forward = None
            if fused is not None:
                forward = functools.partial(run_fused, submodule, fused, submodule.forward)
            self._wrapped[submodule] = WrappedForward(submodule, self._run, forward)

    def remove(self) -> None:
        """Remove the wrappers: the module runs as it did before."""
        for wrapper in self._wrapped.values():
            wrapper.remove()
        self._wrapped.clear()

    @property
    def scratch_bytes(self) -> int:
        """Size of the memory for copies, which is kept and reused."""
        return self.perturber.scratch.bytes

    # --- which parameters a module uses -----------------------------------------------------------

    def gathered(self, module: torch.nn.Module) -> list[Perturbable]:
        """Return the perturbed parameters that a module uses and that are gathered now.

        A parameter that another module owns may not be gathered yet.
        """
        return [p for p in self.held[module] if p.param.data.numel() == p.whole_numel]

    def has_hooks(self, module: torch.nn.Module) -> bool:
        """Whether hooks of the model's user run inside a module's wrapped forward."""
        return self._wrapped[module].has_hooks

    def move_new_hooks(self) -> None:
        """Move hooks that were registered since the last call inside the wrapped forwards.

        Not a collective: each rank looks at its own hooks.
        """
        number = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in self.held)
        if number != self._num_hooks:
            self._num_hooks = number
            for module in self.held:
                if _has_hooks_outside(module):
                    self._wrap(module)
                    self._wrapped[module].move_hooks()

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Watch one forward at the parameters as they are, to see which modules use which
        parameters.

        A module may read a parameter of another module (a manually tied head, torch's
        MultiheadAttention with its output projection). From then on, it also gets copies of that
        parameter. Hooks of the model's user run inside their module's forward.
        """
        self.move_new_hooks()
        observer = Observer(self.held, sharded=self._sharded)
        with observer:
            yield
        self.branches = observer.branches
        for module, parameters in observer.found.items():
            self._wrap(module)
            self.held[module] += parameters
            self.frozen_blocks -= {b for b in self.frozen_blocks if module in set(b.modules())}

    # --- how a module runs ------------------------------------------------------------------------

    @contextmanager
    def at(self, points: Sequence[Point], runner: ModuleRunner | None) -> Iterator[None]:
        """A context in which `runner` runs the modules, at the points.

        runner: None: the modules run with the parameters as they are.
        """
        self.perturber.points = tuple(points)
        # autocast's cache maps a Parameter to its first cast, even when its data have changed since
        autocast_cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with self.run_by(runner):
                yield
        finally:
            self.perturber.restore_all()  # nothing, unless a forward was cut short
            self.perturber.points = ()
            torch.set_autocast_cache_enabled(autocast_cache)

    @contextmanager
    def run_by(self, runner: ModuleRunner | None) -> Iterator[None]:
        """A context in which `runner` runs the modules that are called."""
        outer, self._runner = self._runner, runner
        try:
            yield
        finally:
            self._runner = outer

    def _run(
        self, module: torch.nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        runner = self._runner
        if runner is not None and module in self.frozen_blocks:
            return runner.run_frozen(module, original, args, kwargs)
        every_module = runner is not None and runner.every_module
        if not self.held[module] and module not in self._leaves and not every_module:
            return original(*args, **kwargs)
        if runner is None:
            with self.loaded(module):
                return original(*args, **kwargs)
        return runner.run(module, original, args, kwargs)

    @contextmanager
    def loaded(self, module: torch.nn.Module) -> Iterator[None]:
        """A context in which a module's gathered parameters have all deferred updates.

        At its end, wait until the parameters may be released.
        """
        try:
            if self._deferred is not None:
                self._deferred.loaded([p.ordinal for p in self.gathered(module)])
            yield
        finally:
            if self._deferred is not None:
                self._deferred.before_release()


def _has_hooks_outside(module: torch.nn.Module) -> bool:
    """Whether a module has hooks of its user that do not run inside its wrapped forward yet."""
    return any(
        is_users(hook)
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    )
