"""How a module runs at several points, one class per form of evaluation.

A stream is the forward of a batch, or of some of its rows, at one point.

    PointRunner      one stream: the module runs once, with copies of its parameters at the point
    StackRunner      all streams in one forward, stacked on dim 0. A module that uses parameters
                     runs once per stream, on the stream's part of the stack. All other
                     modules see the whole stack. With low-rank directions a matrix module runs once
                     for all streams, and the perturbations are added to its output. Blocks before
                     the first perturbed parameter run once for each row of the batch.
    LockstepRunner   as many forwards as streams, which wait for each other at every module

With the last two, ZeRO-3 gathers a module's parameters once for all streams. The forms of
evaluation (`zods.forward.forms`) own the runners. `PerturbedModules` passes each call of a wrapped
module to the runner of the form in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from zods.core.points import Point
from zods.forward import low_rank
from zods.forward.fused_norms import was_compared
from zods.forward.large_matrices import large_weight, perturbed_rows
from zods.forward.lockstep import LockstepScheduler
from zods.forward.matrix_forwards import Pair, multiply_in_blocks, plain_product, run_low_rank
from zods.forward.parameter_copies import Centers, constant
from zods.forward.perturbed_modules import PerturbedModules
from zods.forward.repeated_rows import RepeatedRows
from zods.forward.stacked import Arguments, NotStackable, Stacking


class _Runner:
    """Methods that all runners share."""

    every_module = False

    def __init__(self, modules: PerturbedModules) -> None:
        self._modules, self._perturber = modules, modules.perturber

    def run_frozen(
        self, block: Any, original: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Run a block without perturbed parameters."""
        return original(*args, **kwargs)

    def _product(
        self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> low_rank.MatrixProduct | None:
        """Return the product that a call of a module makes, if it makes no other computation."""
        if self._modules.has_hooks(module):
            return None
        return plain_product(module, self._modules.held[module], args, kwargs)

    def _run_pair(
        self,
        module: torch.nn.Module,
        pair: Pair,
        centers: Centers,
        run: Callable[[int], Any],
    ) -> list[Any]:
        """Return [run(k) for each stream k of a pair].

        Each call has the stream's copies of the module's parameters in place.
        """
        gathered = self._modules.gathered(module)
        looked_up = None
        if isinstance(module, torch.nn.Embedding):
            looked_up = large_weight(self._perturber, module, gathered)
        missing = [
            p
            for p in gathered
            # a tied parameter may be in place already
            if p.ordinal not in self._perturber.in_place and p is not looked_up
        ]
        outputs = []
        with self._perturber.scratch.scope():
            copies = self._perturber.copies(missing, pair, centers)
            for stream, of_stream in zip(pair, copies, strict=True):
                with (
                    self._perturber.placed(of_stream),
                    perturbed_rows(self._perturber, looked_up, stream, centers),
                ):
                    outputs.append(self._perturber.scratch.kept(run(stream)))
        return outputs


class PointRunner(_Runner):
    """Run modules for one stream."""

    def __init__(self, modules: PerturbedModules, stream: int = 0) -> None:
        super().__init__(modules)
        self._stream = stream

    @contextmanager
    def at(self, point: Point | None) -> Iterator[None]:
        """A context in which forwards run at `point`; None: the parameters as they are."""
        points, runner = ((), None) if point is None else ((point,), self)
        with self._modules.at(points, runner):
            yield

    def run(self, module: Any, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a module at the stream's point."""
        with self._modules.loaded(module):
            return self._run_stream(module, original, args, kwargs, {})

    def _run_stream(
        self,
        module: Any,
        original: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        centers: Centers,
    ) -> Any:
        gathered = self._modules.gathered(module)
        weight = large_weight(self._perturber, module, gathered)
        if weight is not None and self._product(module, args, kwargs) == "linear":
            output = low_rank.empty_output(module, args[0])
            if output is not None:
                multiply_in_blocks(
                    self._perturber, module, weight, gathered, [args[0]], [output],
                    (self._stream,), centers,
                )  # fmt: skip
                return output
        (output,) = self._run_pair(
            module, (self._stream,), centers, lambda _: original(*args, **kwargs)
        )
        return output


class LockstepRunner(PointRunner):
    """Run modules for streams in lockstep. All of them are at the same module."""

    # the streams wait for each other also at modules with frozen parameters
    every_module = True

    def __init__(self, modules: PerturbedModules) -> None:
        super().__init__(modules)
        self._scheduler = LockstepScheduler(modules.names)
        self._shared_centers: Centers = {}  # made at `_shared_at`
        self._shared_at: Any = None

    def run_all(self, points: Sequence[Point], call: Callable[[int], Any]) -> list[Any]:
        """Return [call(k) for each point k], where call(k) is a forward on one batch.

        The forwards go together from one module that owns parameters to the next. Raises
        NotInLockstep where they do not call the same modules.
        """
        # the buffer needs copies to be released in the reverse of the order in which they were
        # made, but streams in lockstep do not end in such an order
        self._perturber.buffered = False
        try:
            with self._modules.at(points, self):
                return self._scheduler.run(call, len(points), self._resume)
        finally:
            self._perturber.buffered = True

    def _resume(self, stream: int) -> None:
        """Switch to a stream, which has no copy in place while it waits."""
        self._stream, self._perturber.in_place = stream, {}

    def run(self, module: Any, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a module for the current stream when all streams have come to the module."""
        # what runs inside a leaf module may differ from stream to stream
        waits = module not in self._modules.inside_leaves
        if waits:
            self._wait(module)
        with self._modules.loaded(module):
            output = self._run_stream(module, original, args, kwargs, self._centers_at(module))
            if waits:
                # DeepSpeed may release the parameters after this forward
                self._wait(module)
        return output

    def _wait(self, module: torch.nn.Module) -> None:
        """Wait until the other streams have come to this module, with no copy of this stream in
        place.
        """
        with self._perturber.suspended():
            self._scheduler.wait(module)

    def _centers_at(self, module: torch.nn.Module) -> Centers:
        """Return the centers that the first stream made at this module, for all streams."""
        here = (self._scheduler.round, module)
        if self._shared_at != here:
            self._shared_at, self._shared_centers = here, {}
        return self._shared_centers


class StackRunner(_Runner):
    """Run modules on a stack of the points' rows of a batch.

    nested: modules that ran inside another one in the last stack, and so once per stream.
    """

    def __init__(self, modules: PerturbedModules) -> None:
        super().__init__(modules)
        self.nested: set[torch.nn.Module] = set()
        self._stacking = Stacking(modules.names)
        self._pairs: list[Pair] = []
        self._repeated = RepeatedRows([])
        self._not_by_rows: set[torch.nn.Module] = set()  # blocks that cannot run on some rows
        self._are_equal = False  # whether all copies of a row have been computed alike so far

    @contextmanager
    def recording(self, point: Point, num_examples: int) -> Iterator[None]:
        """A context in which a forward of a batch of `num_examples`, at `point`, shows how to split
        a stack.

        Earlier recordings are forgotten.
        """
        self._stacking.begin_recording(num_examples)
        self._not_by_rows.clear()
        with self._modules.at((point,), _Recording(self._modules, self._stacking)):
            yield

    @contextmanager
    def at(self, points: Sequence[Point], rows: Sequence[Sequence[int]]) -> Iterator[None]:
        """A context for forwards on a stack with some rows of a batch for each point.

        Raises NotStackable where a module cannot run on a stack.
        """
        self._pairs = _pairs(points)
        self.nested.clear()
        self._stacking.begin([len(of_point) for of_point in rows])
        self._repeated = RepeatedRows([row for of_point in rows for row in of_point])
        self._are_equal = True
        with self._modules.at(points, self):
            yield

    def run_frozen(
        self, block: Any, original: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Run a block on one copy of each row, while all copies are equal."""
        if self._are_equal and block not in self._not_by_rows:
            try:
                args, kwargs = self._repeated.once(self._stacking.carried(block, (args, kwargs)))
            except NotStackable:
                self._not_by_rows.add(block)
            else:
                # never called twice: a block may have an effect, and gathers under ZeRO-3
                return self._repeated.for_all(original(*args, **kwargs))
        return original(*args, **kwargs)

    def run(self, module: Any, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a module for all streams of a stack."""
        self._are_equal = False
        with self._modules.loaded(module):
            arguments = self._stacking.carried(module, (args, kwargs))
            carries = any(arguments.carry)
            product = self._product(module, args, kwargs) if carries else None
            if product is not None and self._perturber.direction.distribution == "low_rank":
                held = {p.param: p for p in self._modules.gathered(module)}
                rows = self._stacking.rows_of_streams(args[0].shape[0])
                return run_low_rank(
                    self._perturber, module, held, product, original, args[0], self._pairs, rows
                )
            if carries and self._is_row_norm(module, args, kwargs):
                return self._run_norm(module, args[0])
            streams = self._stacking.split(arguments)
            if product == "linear":
                output = low_rank.empty_output(module, args[0])
                if output is not None:
                    self._write_linear(module, [args[0] for (args, _) in streams], output)
                    return output
            return self._stacking.join(module, self._outputs(module, original, streams), carries)

    def _is_row_norm(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call of a module is that of a norm which takes a weight for each row."""
        if module not in self._modules.row_norms or self._modules.has_hooks(module):
            return False
        own = {id(p) for p in module._parameters.values()}
        used = self._modules.gathered(module)
        return (
            len(args) == 1
            and not kwargs
            and was_compared(module, args[0])
            and all(id(p.param) in own and p.ordinal not in self._perturber.in_place for p in used)
            and all(p.shape == args[0].shape[-1:] for p in used)
        )

    def _run_norm(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """Run a norm once, with each stream's weights for the stream's rows."""
        shape = (len(x), *[1] * (x.ndim - 2), x.shape[-1])
        centers: Centers = {}
        of_rows = []
        for parameter in self._modules.gathered(module):
            values = self._perturber.values_of_streams(parameter, self._pairs, centers)
            if len(values) < len(x):
                rows = constant(
                    tuple(self._stacking.rows_of_streams(len(x))), torch.int64, x.device
                )
                values = values.repeat_interleave(rows, 0, output_size=len(x))
            of_rows.append((parameter, values.view(shape)))
        with self._perturber.placed(of_rows):
            return self._modules.row_norms[module](module, x)

    def _outputs(
        self, module: torch.nn.Module, original: Callable, streams: Sequence[Arguments]
    ) -> list[Any]:
        """Return the output of a module's forward for each stream."""

        def run(stream: int) -> Any:
            args, kwargs = streams[stream]
            with self._modules.run_by(_Nested(self._modules, stream, self.nested)):
                return original(*args, **kwargs)

        centers: Centers = {}
        return [
            output for pair in self._pairs for output in self._run_pair(module, pair, centers, run)
        ]

    def _write_linear(
        self, module: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor
    ) -> None:
        """Write a linear module's outputs for all streams into `output`, which saves a
        concatenation.
        """
        gathered = self._modules.gathered(module)
        weight = large_weight(self._perturber, module, gathered)
        parts = output.split([len(x) for x in inputs])

        def run(stream: int) -> None:
            out = parts[stream].view(-1, output.shape[-1])
            low_rank.linear_(out, inputs[stream], module.weight, module.bias)

        centers: Centers = {}
        for pair in self._pairs:
            if weight is None:
                self._run_pair(module, pair, centers, run)
            else:
                multiply_in_blocks(
                    self._perturber, module, weight, gathered, [inputs[k] for k in pair],
                    [parts[k] for k in pair], pair, centers,
                )  # fmt: skip


class _Nested(PointRunner):
    """Run the modules that are called inside a module of a stack, for one stream, and note them."""

    def __init__(
        self, modules: PerturbedModules, stream: int, nested: set[torch.nn.Module]
    ) -> None:
        super().__init__(modules, stream)
        self._nested = nested

    def run(self, module: Any, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        holds = self._modules.held[module] and module not in self._modules.inside_leaves
        if holds and self._perturber.in_place:
            self._nested.add(module)
        return super().run(module, original, args, kwargs)


class _Recording(PointRunner):
    """Run modules for one stream, and record the sizes of their inputs."""

    def __init__(self, modules: PerturbedModules, stacking: Stacking) -> None:
        super().__init__(modules)
        self._stacking = stacking

    def run(self, module: Any, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        # in a stack, modules inside another one do not see the stack
        if not self._perturber.in_place:
            self._stacking.record(module, (args, kwargs))
        return super().run(module, original, args, kwargs)

    def run_frozen(
        self, block: Any, original: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        if not self._perturber.in_place:
            self._stacking.record(block, (args, kwargs))
        return super().run_frozen(block, original, args, kwargs)


def _pairs(points: Sequence[Point]) -> list[Pair]:
    """The streams of the points in order, a stream together with its mirror where that is next."""
    pairs: list[Pair] = []
    k = 0
    while k < len(points):
        size = 2 if k + 1 < len(points) and points[k + 1].is_mirror_of(points[k]) else 1
        pairs.append(tuple(range(k, k + size)))
        k += size
    return pairs
