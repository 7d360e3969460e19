"""Perturbed copies of parameters: made at a point, put in place of the stored data, removed again.

A copy is in place only while a module that uses the parameter runs, so stored weights are never
changed. `Perturber` knows nothing of modules. `zods.forward.module_runners` decides which copies a
module needs, and when.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from zods.core.directions import Direction
from zods.core.points import Center, Point
from zods.forward.copy_buffer import Scratch
from zods.forward.parameter_usage import Perturbable

# For one run of a module, which makes a center once for all points that have it. Key: (the point's
# `center`, ordinal of the parameter).
Centers = dict[Any, Center]
Copies = list[tuple[Perturbable, torch.Tensor]]  # for one stream


@functools.lru_cache(maxsize=32)  # in a forward, all modules need the same ones
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of a few numbers, which is not to be changed. To make one on a GPU is to wait for it."""
    return torch.tensor(values, dtype=dtype, device=device)


class _InPlace(NamedTuple):
    """A copy that stands in for a parameter's stored data."""

    parameter: Perturbable
    stored: torch.Tensor
    copy: torch.Tensor


class Perturber:
    """Make perturbed copies of parameters, put them in place, and restore the stored data.

    points: one for each stream of the forward that runs. in_place: the copies that are in place,
    by ordinal of the parameter. scratch: the buffer for copies. buffered: whether it is used. With
    the buffer, copies must be released in the reverse of the order in which they were made.
    """

    def __init__(self, direction: Direction) -> None:
        self.direction = direction
        self.points: tuple[Point, ...] = ()
        self.in_place: dict[int, _InPlace] = {}
        self.scratch = Scratch()
        self.buffered = True

    # --- make -------------------------------------------------------------------------------------

    def copies(
        self, parameters: Sequence[Perturbable], pair: tuple[int, ...], centers: Centers
    ) -> list[Copies]:
        """Make copies of the parameters for each stream of a pair, with the values at its point."""
        point = self.points[pair[0]]
        copies: list[Copies] = [[] for _ in pair]
        # inside a model's jvp, new tensors would be wrapped and have no storage
        with torch._C._DisableFuncTorch():
            self.reserve([p.param.data for p in parameters], len(pair))
            for parameter in parameters:
                made = [self.empty_like(parameter.param.data) for _ in pair]
                self.perturb_(made, parameter, point, centers)
                for of_stream, tensor in zip(copies, made, strict=True):
                    of_stream.append((parameter, tensor))
        return copies

    def values_of_streams(
        self, parameter: Perturbable, pairs: Sequence[tuple[int, ...]], centers: Centers
    ) -> torch.Tensor:
        """A parameter's values at the points of all streams, (streams, numel), in its dtype.

        For a parameter without factors.
        """
        stored = parameter.param.data
        seeds = [self.points[pair[0]].seed for pair in pairs]
        lengths = constant(tuple(len(pair) for pair in pairs), torch.int64, stored.device)
        z = self.direction.stack(parameter, seeds, stored.device)
        z = z.repeat_interleave(lengths, 0, output_size=len(self.points))
        coefficients = constant(
            tuple(p.coefficient for p in self.points), torch.float32, stored.device
        )
        starts = []
        for _, of_center in itertools.groupby(self.points, key=lambda point: point.center):
            points = list(of_center)
            start = self._start(parameter, self.center(parameter, stored, points[0], centers))
            starts.append(start.view(1, -1).expand(len(points), -1))
        return torch.addcmul(torch.cat(starts), z, coefficients[:, None]).to(stored.dtype)

    def _start(self, parameter: Perturbable, center: Center) -> torch.Tensor:
        """A parameter's value at a center, in float32."""
        weight = center.weight.float()
        if center.scale == 1.0 and not center.seeds:
            return weight
        return self.direction.combine_(
            torch.empty_like(weight),
            parameter,
            weight=weight,
            scale=center.scale,
            seeds=center.seeds,
            coefficients=center.coefficients,
        )

    def perturb_(
        self,
        made: Sequence[torch.Tensor],
        parameter: Perturbable,
        point: Point,
        centers: Centers,
        rows: range | None = None,
    ) -> None:
        """Write a parameter's values at `point` into made[0].

        If there is a made[1], the values at the point's mirror are written into it. rows: the rows
        of a matrix to write; None: the whole parameter.
        """
        center = self.center(parameter, parameter.param.data, point, centers)
        self.direction.combine_(
            made[0],
            parameter,
            0 if rows is None else rows.start * parameter.shape[1],
            weight=center.weight if rows is None else center.weight[rows.start : rows.stop],
            scale=center.scale,
            seeds=(*center.seeds, point.seed),
            coefficients=(*center.coefficients, point.coefficient),
            mirror=made[1] if len(made) > 1 else None,
        )

    @staticmethod
    def center(
        parameter: Perturbable, stored: torch.Tensor, point: Point, centers: Centers
    ) -> Center:
        """Return a parameter's value at the center of `point`, from `centers` if it is there.

        Otherwise it is made, and kept in `centers`. stored: the parameter's data.
        """
        key = (point.center, parameter.ordinal)
        if key not in centers:
            centers[key] = point.center(parameter, stored)
        return centers[key]

    def reserve(self, tensors: Sequence[torch.Tensor], number: int) -> None:
        """Make the buffer large enough for `number` copies of each tensor, if it is used."""
        if self.buffered:
            self.scratch.reserve(tensors, number)

    def empty_like(self, stored: torch.Tensor) -> torch.Tensor:
        """Allocate a copy of the shape, dtype and device of `stored`, not filled."""
        if self.buffered:
            return self.scratch.empty_like(stored)
        return torch.empty_like(stored, memory_format=torch.contiguous_format)

    # --- put in place, restore --------------------------------------------------------------------

    @contextmanager
    def placed(self, copies: Sequence[tuple[Perturbable, torch.Tensor]]) -> Iterator[None]:
        """A context in which the copies are in place."""
        for parameter, copy in copies:
            self.place(parameter, copy)
        try:
            with self.scratch.saving() if torch.is_grad_enabled() else nullcontext():
                yield
        finally:
            self.restore([parameter.ordinal for parameter, _ in copies])

    def place(self, parameter: Perturbable, copy: torch.Tensor) -> None:
        """Put a copy in place of a parameter's stored data."""
        with torch._C._DisableFuncTorch():
            self.in_place[parameter.ordinal] = _InPlace(parameter, parameter.param.data, copy)
            parameter.param.data = copy

    def restore(self, ordinals: Sequence[int]) -> None:
        """Put the stored data of these parameters back, where a copy is in place."""
        with torch._C._DisableFuncTorch():
            for ordinal in ordinals:
                # None if a stream in lockstep was aborted while it waited
                found = self.in_place.pop(ordinal, None)
                if found is not None:
                    found.parameter.param.data = found.stored

    def restore_all(self) -> None:
        self.restore(list(self.in_place))

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """A context in which no copy is in place. At its end the same copies are in place again.

        Other streams may place copies of their own inside.
        """
        suspended = dict(self.in_place)
        self.restore(list(suspended))
        try:
            yield
        finally:
            self.in_place = {}
        for parameter, _, copy in suspended.values():
            self.place(parameter, copy)
