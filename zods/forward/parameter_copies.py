"""Perturbed copies of parameters: made at a point, put in place of the stored data, and restored.

A copy is in place only while a module that uses the parameter runs, so stored weights are never
changed. `Perturber` knows neither stacks nor lockstep; `zods.forward.perturbed_modules` decides
which copies a module needs, and when.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from zods.core.directions import Direction
from zods.core.points import Center, Point
from zods.forward.copy_buffer import Scratch
from zods.forward.parameter_usage import Perturbable

Centers = dict[Any, Center]  # for one run of a module; a center is made once for all its points
Copies = list[tuple[Perturbable, torch.Tensor]]


class _InPlace(NamedTuple):
    """A copy that stands in for a parameter's stored data."""

    parameter: Perturbable
    stored: torch.Tensor
    copy: torch.Tensor


class Perturber:
    """Makes, places and restores perturbed copies.

    points: at which copies are made. in_place: the copies that are in place, by ordinal.

    buffered: whether copies are made in one buffer, which is kept and used again. That needs copies
    to be released in the order in which they were made, reversed.
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
        """Make, for each stream of a pair, the values of the parameters at its point."""
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

    def perturb_(
        self,
        made: Sequence[torch.Tensor],
        parameter: Perturbable,
        point: Point,
        centers: Centers,
        rows: range | None = None,
    ) -> None:
        """Write a parameter's values at `point` into made[0], and at its mirror into made[1] if
        there are two. rows: those of a matrix that are written; None: all.
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
        """The parameter at the center of `point`, from `centers` or made and kept there."""
        key = (point.center, parameter.ordinal)
        if key not in centers:
            centers[key] = point.center(parameter, stored)
        return centers[key]

    def reserve(self, tensors: Sequence[torch.Tensor], number: int) -> None:
        """Allocate buffers for `number` copies of each tensor, if buffers are used."""
        if self.buffered:
            self.scratch.reserve(tensors, number)

    def empty_like(self, stored: torch.Tensor) -> torch.Tensor:
        if self.buffered:
            return self.scratch.empty_like(stored)
        return torch.empty_like(stored, memory_format=torch.contiguous_format)

    # --- put in place, restore --------------------------------------------------------------------

    @contextmanager
    def placed(self, copies: Sequence[tuple[Perturbable, torch.Tensor]]) -> Iterator[None]:
        """Have the copies in place inside."""
        for parameter, copy in copies:
            self.place(parameter, copy)
        try:
            with self.scratch.saving() if torch.is_grad_enabled() else nullcontext():
                yield
        finally:
            self.restore([parameter.ordinal for parameter, _ in copies])

    def place(self, parameter: Perturbable, copy: torch.Tensor) -> None:
        with torch._C._DisableFuncTorch():
            self.in_place[parameter.ordinal] = _InPlace(parameter, parameter.param.data, copy)
            parameter.param.data = copy

    def restore(self, ordinals: Sequence[int]) -> None:
        """Put the stored data of these parameters back, of those that have a copy in place."""
        with torch._C._DisableFuncTorch():
            for ordinal in ordinals:
                # None where a stream in lockstep was cut short while it waited
                found = self.in_place.pop(ordinal, None)
                if found is not None:
                    found.parameter.param.data = found.stored

    def restore_all(self) -> None:
        self.restore(list(self.in_place))

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Have no copy in place inside, and the same copies in place again after it.

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
