"""Evaluate a module at points near its parameters without touching what is stored.

A perturbed copy of a parameter exists only while the module that owns it runs: the module's forward
is wrapped, and puts the copy in place of the gathered (ZeRO-3) or stored (replicated) data while
its own forward runs. So there is no drift, and at any time one module's parameters exist once more,
not the model's.

Several points are evaluated in one forward. Stacked: the batch is repeated on dim 0, and each
module that owns parameters runs once per point on that point's part of the stack; all else sees the
stack. With low-rank directions the module runs once, and what its output lacks is added to it. In
lockstep: as many forwards as points, which wait for each other at every module that owns
parameters. Either way ZeRO-3 gathers a module's parameters once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from deepspeed.utils.z3_leaf_module import z3_leaf_module

from zods.core.directions import Direction
from zods.core.points import Point
from zods.forward import low_rank
from zods.forward.large_matrices import LookedUpRows, is_large
from zods.forward.lockstep import LockstepScheduler
from zods.forward.matrix_forwards import multiply_in_blocks, run_low_rank
from zods.forward.parameter_usage import Observer, Perturbable
from zods.forward.perturber import Centers, Perturber
from zods.forward.stacked import Stacking
from zods.forward.wrapping import WrappedForward, is_users


class Deferred(Protocol):
    """Updates that are applied to parameters when these are loaded; see
    `zods.params.deferred_update`.
    """

    def loaded(self, ordinals: Sequence[int]) -> None: ...
    def before_release(self) -> None: ...


class PerturbedForward:
    """Runs a module's forward at given points.

    Installed after DeepSpeed's own hooks, until `remove`.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        parameters: Sequence[Perturbable],
        direction: Direction,
        deferred: Deferred | None = None,
    ) -> None:
        """deferred: called with the parameters that are gathered before they are used, and again
        before they may be released.
        """
        self._deferred = deferred
        self._perturber = Perturber(direction)
        self._pairs: list[tuple[int, ...]] = []  # streams in order, a stream with its mirror
        self._stream: int | None = None  # the one that runs alone; None: a stack of all
        # the parameters for which each module places copies
        self._held: dict[torch.nn.Module, list[Perturbable]] = {}
        self._wrapped: dict[torch.nn.Module, WrappedForward] = {}
        self.branches: set[str] = set()  # see `zods.forward.parameter_usage.Observer`
        self._num_hooks = 0  # hooks of all modules, when they were last counted
        self._recording = False
        self._shared_centers: Centers = {}  # for the module at which streams in lockstep are
        self._shared_at: Any = None
        self._sharded = any(hasattr(p.param, "ds_tensor") for p in parameters)
        # holders that ran inside another, so once per stream of a stack
        self.nested: set[torch.nn.Module] = set()
        self.stacking = Stacking(module)
        self._lockstep = LockstepScheduler(self.stacking.names)
        by_id = {id(p.param): p for p in parameters}
        # DeepSpeed gathers all that is inside a leaf module with it, and what runs there may differ
        # by stream (experts): a stack is cut at the leaf, and streams in lockstep wait there alone
        self._leaves = {m for m in module.modules() if z3_leaf_module(m)}
        self._inside_leaves = {
            inner for leaf in self._leaves for inner in leaf.modules() if inner is not leaf
        }
        for submodule in module.modules():
            own = list(submodule.parameters(recurse=False))
            self._held[submodule] = [by_id[id(p)] for p in own if id(p) in by_id]
            # streams in lockstep wait for each other also at modules with frozen parameters
            if own or submodule in self._leaves:
                self._wrap(submodule)

    def _wrap(self, submodule: torch.nn.Module) -> None:
        if submodule not in self._wrapped:
            self._wrapped[submodule] = WrappedForward(submodule, self._run)

    def remove(self) -> None:
        """Take the wrappers off: the module runs as it did before."""
        for wrapper in self._wrapped.values():
            wrapper.remove()
        self._wrapped.clear()

    @property
    def scratch_bytes(self) -> int:
        """Memory for copies, which is kept and used again."""
        return self._perturber.scratch.bytes

    # --- what the engine calls --------------------------------------------------------------------

    @contextmanager
    def at(self, point: Point | None, *, record: int | None = None) -> Iterator[None]:
        """Have forwards inside run at `point`; None is the parameters as they are.

        record: the number of examples of a batch, to learn from its forward how a stack of such
        batches is to be cut.
        """
        self._recording = record is not None
        self._begin(() if point is None else (point,), 0)
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def at_all(self, points: Sequence[Point], num_examples: int) -> Iterator[None]:
        """Have forwards inside run on a stack of as many batches of `num_examples` as there are
        points.

        Raises NotStackable where a module cannot be run so.
        """
        self._begin(tuple(points), None)
        self.stacking.begin(len(points), num_examples)
        try:
            yield
        finally:
            self._end()

    def in_lockstep(self, points: Sequence[Point], call: Callable[[int], Any]) -> list[Any]:
        """[call(k) for each point k], where call(k) is a forward on one batch: all go from one
        module that holds parameters to the next together. Raises NotInLockstep where they do not
        come to the same modules."""
        self._begin(tuple(points), 0)
        self._perturber.buffered = False  # streams do not end in the order in which they began
        try:
            return self._lockstep.run(call, len(points), self._resume)
        finally:
            self._perturber.buffered = True
            self._end()

    def _resume(self, stream: int) -> None:
        """Switch to a stream. None of its copies is in place after a wait."""
        self._stream, self._perturber.in_place = stream, {}

    def move_new_hooks(self) -> None:
        """Move hooks that were registered since the last call inside the wrapped forwards. This
        rank alone.
        """
        number = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in self._held)
        if number != self._num_hooks:
            self._num_hooks = number
            for module in self._held:
                if _users_hooks(module):
                    self._wrap(module)
                    self._wrapped[module].move_hooks()

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Watch one forward at the parameters as they are, to see which modules use which
        parameters.

        A module that reads another's parameter itself (a manually tied head, torch's
        MultiheadAttention with its output projection) puts that in place too from then on. Hooks of
        the model's user run inside their module's forward.
        """
        self.move_new_hooks()
        observer = Observer(self._held, sharded=self._sharded)
        with observer:
            yield
        self.branches = observer.branches
        for module, parameters in observer.found.items():
            self._wrap(module)
            self._held[module] += parameters

    def _begin(self, points: tuple[Point, ...], stream: int | None) -> None:
        self._perturber.points, self._stream = points, stream
        # autocast's cache maps a Parameter, whatever its data are meanwhile, to the first cast of
        # it
        self._autocast_cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        self._pairs = []
        k = 0
        while k < len(points):
            size = 2 if k + 1 < len(points) and points[k + 1].is_mirror_of(points[k]) else 1
            self._pairs.append(tuple(range(k, k + size)))
            k += size

    def _end(self) -> None:
        self._perturber.restore_all()  # nothing, unless a forward was cut short
        self._perturber.points, self._stream, self._recording = (), None, False
        torch.set_autocast_cache_enabled(self._autocast_cache)

    # --- a module's forward -----------------------------------------------------------------------

    def _run(
        self, module: torch.nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        if not self._held[module] and module not in self._leaves and not self._lockstep.is_running:
            return original(*args, **kwargs)
        waits = self._lockstep.is_running and module not in self._inside_leaves
        if waits:
            self._wait(module)
        try:
            if self._deferred is not None:
                self._deferred.loaded([p.ordinal for p in self._whole(module)])
            output = (
                self._run_at_points(module, original, args, kwargs)
                if self._perturber.points
                else original(*args, **kwargs)
            )
            if waits:
                # until all have run: DeepSpeed may release the parameters after this forward
                self._wait(module)
            return output
        finally:
            if self._deferred is not None:
                self._deferred.before_release()

    def _run_at_points(
        self, module: Any, original: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        if self._lockstep.is_running:
            return self._run_stream(module, original, args, kwargs)
        if self._stream is not None:
            if self._recording and not self._perturber.in_place:
                self.stacking.record(module, (args, kwargs))
            return self._run_stream(module, original, args, kwargs)
        streams, carries = self.stacking.split(module, (args, kwargs))
        form = self._form(module, args, kwargs) if carries else None
        if form is not None and self._perturber.direction.distribution == "low_rank":
            held = {p.param: p for p in self._whole(module)}
            return run_low_rank(self._perturber, module, held, form, original, args[0], self._pairs)
        whole = low_rank.empty_output(module, args[0]) if form == "linear" else None
        parts = None if whole is None else whole.chunk(len(streams))
        outputs = []
        centers: Centers = {}
        for pair in self._pairs:
            if parts is not None and self._large(module) is not None:
                inputs = [streams[k][0][0] for k in pair]
                self._multiply_in_blocks(module, inputs, [parts[k] for k in pair], pair, centers)
                continue
            with self._perturber.scratch.scope():
                looked_up = self._looked_up(module)
                copies = self._perturber.copies(
                    [p for p in self._whole(module) if p is not looked_up], pair, centers
                )
                for k, of_stream in zip(pair, copies, strict=True):
                    with (
                        self._perturber.placed(of_stream),
                        self._alone(k),
                        self._rows_of(looked_up, k, centers),
                    ):
                        if parts is None:
                            outputs.append(
                                self._perturber.scratch.kept(
                                    original(*streams[k][0], **streams[k][1])
                                )
                            )
                        else:
                            out = parts[k].view(-1, parts[k].shape[-1])
                            low_rank.linear_(out, streams[k][0][0], module.weight, module.bias)
        return self.stacking.join(module, outputs, carries) if whole is None else whole

    def _run_stream(
        self, module: torch.nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Run one stream's forward of a module. A tied parameter may be in place already; a
        parameter that another module holds may not be gathered yet.
        """
        assert self._stream is not None
        if self._perturber.in_place and self._held[module] and module not in self._inside_leaves:
            self.nested.add(module)
        centers, pair = self._centers_at(module), (self._stream,)
        if self._large(module) is not None and self._form(module, args, kwargs) == "linear":
            output = low_rank.empty_output(module, args[0])
            if output is not None:
                self._multiply_in_blocks(module, [args[0]], [output], pair, centers)
                return output
        looked_up = self._looked_up(module)
        missing = [
            p
            for p in self._whole(module)
            if p.ordinal not in self._perturber.in_place and p is not looked_up
        ]
        with self._perturber.scratch.scope():
            (copies,) = self._perturber.copies(missing, pair, centers)
            with self._perturber.placed(copies), self._rows_of(looked_up, self._stream, centers):
                return self._perturber.scratch.kept(original(*args, **kwargs))

    def _centers_at(self, module: torch.nn.Module) -> Centers:
        """Return the centers that the first stream made at this module, which all streams in
        lockstep use.
        """
        if not self._lockstep.is_running:
            return {}
        if self._shared_at != (here := (self._lockstep.round, module)):
            self._shared_at, self._shared_centers = here, {}
        return self._shared_centers

    @contextmanager
    def _alone(self, stream: int) -> Iterator[None]:
        self._stream = stream
        try:
            yield
        finally:
            self._stream = None

    def _whole(self, module: torch.nn.Module) -> list[Perturbable]:
        return [p for p in self._held[module] if p.param.data.numel() == p.whole_numel]

    def _wait(self, module: torch.nn.Module) -> None:
        """Let the other streams come to this module; meanwhile none of this one's copies is in
        place.
        """
        stream = self._stream
        with self._perturber.suspended():
            try:
                self._lockstep.wait(module)
            finally:
                self._stream = stream

    # --- modules that multiply by one matrix ------------------------------------------------------

    def _form(
        self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> low_rank.Form | None:
        """Return how a module multiplies its one input by its weight; None if it may do anything
        else.

        Where gradients are enabled nothing may be computed beside the module's own forward.
        """
        form = low_rank.form_of(module)
        own = {id(p) for name, p in module._parameters.items() if name in ("weight", "bias")}
        alone = id(module._parameters.get("weight")) in own and all(
            id(p.param) in own for p in self._held[module]
        )
        plain = alone and not self._wrapped[module].has_hooks and not torch.is_grad_enabled()
        return form if plain and len(args) == 1 and not kwargs else None

    # --- large matrices ---------------------------------------------------------------------------

    def _large(self, module: torch.nn.Module) -> Perturbable | None:
        """A module's weight where it is perturbed, not in place yet, and too large to be copied
        whole.
        """
        weight = module._parameters.get("weight")
        if weight is None or not is_large(weight.data):
            return None
        parameter = self._parameter(module, weight)
        return (
            None
            if parameter is None or parameter.ordinal in self._perturber.in_place
            else parameter
        )

    def _looked_up(self, module: torch.nn.Module) -> Perturbable | None:
        return self._large(module) if isinstance(module, torch.nn.Embedding) else None

    @contextmanager
    def _rows_of(
        self, parameter: Perturbable | None, stream: int, centers: Centers
    ) -> Iterator[None]:
        """Have rows that are looked up inside perturbed to a stream's point."""
        if parameter is None:
            yield
            return
        point = self._perturber.points[stream]

        def place_whole() -> None:
            ((copy,),) = self._perturber.copies([parameter], (stream,), centers)
            self._perturber.place(*copy)

        def copy_rows(out: torch.Tensor, rows: range) -> None:
            self._perturber.perturb_([out], parameter, point, centers, rows)

        try:
            with LookedUpRows(parameter.param, copy_rows, place_whole):
                yield
        finally:
            self._perturber.restore([parameter.ordinal])

    def _multiply_in_blocks(
        self,
        module: Any,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        pair: tuple[int, ...],
        centers: Centers,
    ) -> None:
        weight = self._large(module)
        assert weight is not None
        others = [p for p in self._whole(module) if p is not weight]
        multiply_in_blocks(self._perturber, module, weight, others, inputs, outputs, pair, centers)

    def _parameter(self, module: torch.nn.Module, param: Any) -> Perturbable | None:
        return next((p for p in self._whole(module) if p.param is param), None)


def _users_hooks(module: torch.nn.Module) -> bool:
    """Whether a module has hooks of its user that do not run inside its wrapped forward yet."""
    return any(
        is_users(hook)
        for of in (module._forward_pre_hooks, module._forward_hooks)
        for hook in of.values()
    )
