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
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from deepspeed.utils.z3_leaf_module import z3_leaf_module

from zods.core.directions import Direction
from zods.core.points import Center, Point
from zods.forward import low_rank
from zods.forward.copy_buffer import Scratch
from zods.forward.large_matrices import LookedUpRows, blocks, is_large
from zods.forward.lockstep import Lockstep
from zods.forward.parameter_usage import Observer, Perturbable
from zods.forward.stacked import Stacking
from zods.forward.wrapping import WrappedForward, is_users


class Deferred(Protocol):
    """Updates that are applied to parameters when these are loaded; see
    `zods.params.deferred_update`.
    """

    def loaded(self, ordinals: Sequence[int]) -> None: ...
    def before_release(self) -> None: ...


class _Placed(NamedTuple):
    """A copy that stands in for a parameter's data."""

    parameter: Perturbable
    live: torch.Tensor
    copy: torch.Tensor


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
        self._direction = direction
        self._points: tuple[Point, ...] = ()
        self._pairs: list[
            tuple[int, ...]
        ] = []  # streams in order, a stream and its mirror together
        self._stream: int | None = None  # the one that runs alone; None: a stack of all
        self._live: dict[int, _Placed] = {}  # by ordinal
        self._held: dict[torch.nn.Module, list[Perturbable]] = {}  # what each module puts in place
        self._wrapped: dict[torch.nn.Module, WrappedForward] = {}
        self.branches: set[str] = set()  # see `zods.forward.parameter_usage.Observer`
        self._num_hooks = 0  # of all modules, when that was last looked at
        self._recording = False
        self._scratch = Scratch()
        self._shared_centers: dict[
            Any, Center
        ] = {}  # of the module at which streams in lockstep are
        self._shared_at: Any = None
        self._sharded = any(hasattr(p.param, "ds_tensor") for p in parameters)
        # holders that ran inside another, so once per stream of a stack
        self.nested: set[torch.nn.Module] = set()
        self.stacking = Stacking(module)
        self._lockstep = Lockstep(self.stacking.names)
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
            # where they are frozen, streams in lockstep wait for each other none the less
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
        return self._scratch.bytes

    # --- what the engine calls --------------------------------------------------------------------

    @contextmanager
    def at(self, point: Point | None, *, record: int | None = None) -> Iterator[None]:
        """Forwards inside run at `point`; None is the parameters as they are. record: the examples
        of a batch, to learn from its forward how a stack of such batches is to be cut."""
        self._recording = record is not None
        self._begin(() if point is None else (point,), 0)
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def at_all(self, points: Sequence[Point], num_examples: int) -> Iterator[None]:
        """Forwards inside run on a stack of as many batches of `num_examples` as there are points.

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
        try:
            return self._lockstep.run(call, len(points), self._resume)
        finally:
            self._end()

    def _resume(self, stream: int) -> None:
        """Switch to a stream. None of its copies is in place after a wait."""
        self._stream, self._live = stream, {}

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
        self._points, self._stream = points, stream
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
        self._restore(list(self._live))  # nothing, unless a forward was cut short
        self._points, self._stream, self._recording = (), None, False
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
                if self._points
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
            if self._recording and not self._live:
                self.stacking.record(module, (args, kwargs))
            return self._run_stream(module, original, args, kwargs)
        streams, carries = self.stacking.split(module, (args, kwargs))
        form = self._form(module, args, kwargs) if carries else None
        if form is not None and self._direction.distribution == "low_rank":
            return self._run_factored(module, form, original, args[0])
        whole = low_rank.empty_output(module, args[0]) if form == "linear" else None
        parts = None if whole is None else whole.chunk(len(streams))
        outputs = []
        centers: dict[Any, Center] = {}
        for pair in self._pairs:
            if parts is not None and self._large(module) is not None:
                inputs = [streams[k][0][0] for k in pair]
                self._multiply_in_blocks(module, inputs, [parts[k] for k in pair], pair, centers)
                continue
            with self._scratch.scope():
                looked_up = self._looked_up(module)
                copies = self._copies(
                    [p for p in self._whole(module) if p is not looked_up], pair, centers
                )
                for k, of_stream in zip(pair, copies, strict=True):
                    with (
                        self._placed(of_stream),
                        self._alone(k),
                        self._rows_of(looked_up, k, centers),
                    ):
                        if parts is None:
                            outputs.append(
                                self._scratch.kept(original(*streams[k][0], **streams[k][1]))
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
        if self._live and self._held[module] and module not in self._inside_leaves:
            self.nested.add(module)
        centers, pair = self._centers_at(module), (self._stream,)
        if self._large(module) is not None and self._form(module, args, kwargs) == "linear":
            output = low_rank.empty_output(module, args[0])
            if output is not None:
                self._multiply_in_blocks(module, [args[0]], [output], pair, centers)
                return output
        looked_up = self._looked_up(module)
        missing = [
            p for p in self._whole(module) if p.ordinal not in self._live and p is not looked_up
        ]
        with self._scratch.scope():
            (copies,) = self._copies(missing, pair, centers)
            with self._placed(copies), self._rows_of(looked_up, self._stream, centers):
                return self._scratch.kept(original(*args, **kwargs))

    def _centers_at(self, module: torch.nn.Module) -> dict[Any, Center]:
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
        stream, mine = self._stream, dict(self._live)
        self._restore(list(mine))
        try:
            self._lockstep.wait(module)
        finally:
            self._stream, self._live = stream, {}
        for parameter, _, copy in mine.values():
            self._place(parameter, copy)

    # --- copies -----------------------------------------------------------------------------------

    def _copies(
        self, parameters: Sequence[Perturbable], pair: tuple[int, ...], centers: dict[Any, Center]
    ) -> list[list[tuple[Perturbable, torch.Tensor]]]:
        """Make, for each stream of a pair, the values of the parameters at its point."""
        point = self._points[pair[0]]
        copies: list[list[tuple[Perturbable, torch.Tensor]]] = [[] for _ in pair]
        # inside a model's jvp, new tensors would be wrapped and have no storage
        with torch._C._DisableFuncTorch():
            if not self._lockstep.is_running:
                self._scratch.reserve([p.param.data for p in parameters], len(pair))
            for parameter in parameters:
                made = [self._empty_like(parameter.param.data) for _ in pair]
                self._perturb(made, parameter, point, centers)
                for of_stream, tensor in zip(copies, made, strict=True):
                    of_stream.append((parameter, tensor))
        return copies

    def _perturb(
        self,
        made: Sequence[torch.Tensor],
        parameter: Perturbable,
        point: Point,
        centers: dict[Any, Center],
        rows: range | None = None,
    ) -> None:
        """Write a parameter's values at `point`, and at its mirror where two are to be made; rows:
        those of a matrix.
        """
        center = self._center(parameter, parameter.param.data, point, centers)
        self._direction.combine_(
            made[0],
            parameter,
            0 if rows is None else rows.start * parameter.shape[1],
            weight=center.weight if rows is None else center.weight[rows.start : rows.stop],
            scale=center.scale,
            seeds=(*center.seeds, point.seed),
            coefficients=(*center.coefficients, point.coefficient),
            mirror=made[1] if len(made) > 1 else None,
        )

    def _empty_like(self, live: torch.Tensor) -> torch.Tensor:
        if not self._lockstep.is_running:
            return self._scratch.empty_like(live)
        # streams do not end in the order they began
        return torch.empty_like(live, memory_format=torch.contiguous_format)

    @staticmethod
    def _center(
        parameter: Perturbable, live: torch.Tensor, point: Point, centers: dict[Any, Center]
    ) -> Center:
        key = (point.center, parameter.ordinal)
        if key not in centers:
            centers[key] = point.center(parameter, live)
        return centers[key]

    @contextmanager
    def _placed(self, copies: Sequence[tuple[Perturbable, torch.Tensor]]) -> Iterator[None]:
        for parameter, copy in copies:
            self._place(parameter, copy)
        try:
            with self._scratch.saving() if torch.is_grad_enabled() else nullcontext():
                yield
        finally:
            self._restore([parameter.ordinal for parameter, _ in copies])

    def _place(self, parameter: Perturbable, copy: torch.Tensor) -> None:
        with torch._C._DisableFuncTorch():
            self._live[parameter.ordinal] = _Placed(parameter, parameter.param.data, copy)
            parameter.param.data = copy

    def _restore(self, ordinals: Sequence[int]) -> None:
        with torch._C._DisableFuncTorch():
            for ordinal in ordinals:
                # None where a stream in lockstep was cut short while it waited
                placed = self._live.pop(ordinal, None)
                if placed is not None:
                    placed.parameter.param.data = placed.live

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
        return None if parameter is None or parameter.ordinal in self._live else parameter

    def _looked_up(self, module: torch.nn.Module) -> Perturbable | None:
        return self._large(module) if isinstance(module, torch.nn.Embedding) else None

    @contextmanager
    def _rows_of(
        self, parameter: Perturbable | None, stream: int, centers: dict[Any, Center]
    ) -> Iterator[None]:
        """Rows that are looked up inside are those of a stream's point."""
        if parameter is None:
            yield
            return
        point = self._points[stream]

        def place_whole() -> None:
            ((copy,),) = self._copies([parameter], (stream,), centers)
            self._place(*copy)

        def copy_rows(out: torch.Tensor, rows: range) -> None:
            self._perturb([out], parameter, point, centers, rows)

        try:
            with LookedUpRows(parameter.param, copy_rows, place_whole):
                yield
        finally:
            self._restore([parameter.ordinal])

    def _multiply_in_blocks(
        self,
        module: Any,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        pair: tuple[int, ...],
        centers: dict[Any, Center],
    ) -> None:
        """A linear module's outputs for the streams of a pair, from copies of some rows of its
        weight at a time.
        """
        weight = self._large(module)
        assert weight is not None
        parts = [(slice(rows.start, rows.stop), rows) for rows in blocks(weight.param.data)]
        others = [p for p in self._whole(module) if p is not weight]
        with self._scratch.scope():
            largest = weight.param.data[parts[0][0]]
            if not self._lockstep.is_running:
                self._scratch.reserve([largest, *(p.param.data for p in others)], len(pair))
            copies = self._copies(others, pair, centers)
            for part, rows in parts:
                with self._scratch.scope():
                    made = [self._empty_like(weight.param.data[part]) for _ in pair]
                    self._perturb(made, weight, self._points[pair[0]], centers, rows)
                    for x, output, matrix, of_stream in zip(
                        inputs, outputs, made, copies, strict=True
                    ):
                        with self._placed(of_stream):
                            bias = None if module.bias is None else module.bias[part]
                            low_rank.linear_(
                                output.view(-1, output.shape[-1])[:, part], x, matrix, bias
                            )

    # --- low-rank directions ----------------------------------------------------------------------

    def _run_factored(
        self, module: torch.nn.Module, form: low_rank.Form, original: Callable, x: torch.Tensor
    ) -> Any:
        """Run a matrix module once over the streams that have the same center, then add the
        perturbation of each stream.
        """
        size = x.shape[0] // len(self._points)
        centers: dict[Any, Center] = {}
        held = {p.param: (p, p.param.data) for p in self._whole(module)}
        starts = [
            {
                param: self._center(p, live, self._points[pair[0]], centers)
                for param, (p, live) in held.items()
            }
            for pair in self._pairs
        ]
        outputs, begin = [], 0
        for i, pair in enumerate(self._pairs):
            same = i + 1 < len(starts) and all(
                starts[i + 1][k].weight is starts[i][k].weight for k in held
            )
            if not same:
                end = (pair[-1] + 1) * size
                stored = [
                    (p, starts[i][k].weight)
                    for k, (p, live) in held.items()
                    if starts[i][k].weight is not live
                ]
                with self._placed(stored):
                    outputs.append(original(x[begin:end]))
                begin = end
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        for pair, start in zip(self._pairs, starts, strict=True):
            part = slice(pair[0] * size, (pair[-1] + 1) * size)
            with self._scratch.scope():
                self._add_missing(module, form, output[part], x[part], pair, start, centers)
        return output

    def _add_missing(
        self,
        module: Any,
        form: low_rank.Form,
        output: torch.Tensor,
        x: torch.Tensor,
        pair: tuple[int, ...],
        start: dict[Any, Center],
        centers: dict[Any, Center],
    ) -> None:
        """Bring a pair's output at the weights it starts from to its points: the matrix's part, and
        the bias's.
        """
        inner, outer, scale = [], [], 1.0
        parameter = self._parameter(module, module.weight)
        if parameter is not None:
            center, point = start[module.weight], self._points[pair[0]]
            seeds, coefficients = (
                (*center.seeds, point.seed),
                (*center.coefficients, point.coefficient),
            )
            rows = range(parameter.shape[0])
            left, right = self._direction.factors(parameter, seeds, coefficients, rows, x.device)
            mirrored = right.shape[0] // len(seeds) if len(pair) > 1 else 0
            matrices = low_rank.projected(form, x, left, right, mirrored)
            inner, outer, scale = [matrices[0]], [matrices[1]], center.scale
        bias = getattr(module, "bias", None)
        if bias is not None:
            used, wanted = bias.data, [bias.data] * len(pair)
            if (parameter := self._parameter(module, bias)) is not None:
                used = start[bias].weight
                wanted = [copies[0][1] for copies in self._copies([parameter], pair, centers)]
            num_rows = output.numel() // output.shape[-1]
            streams = torch.eye(len(pair), device=x.device).repeat_interleave(
                num_rows // len(pair), 0
            )
            inner.append(streams)
            outer.extend((value.float() - scale * used.float())[None] for value in wanted)
        low_rank.add_(output, torch.cat(inner, 1), torch.cat(outer), scale)

    def _parameter(self, module: torch.nn.Module, param: Any) -> Perturbable | None:
        return next((p for p in self._whole(module) if p.param is param), None)


def _users_hooks(module: torch.nn.Module) -> bool:
    """Whether a module has hooks of its user that do not run inside its wrapped forward yet."""
    return any(
        is_users(hook)
        for of in (module._forward_pre_hooks, module._forward_hooks)
        for hook in of.values()
    )
