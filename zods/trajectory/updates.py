"""From the records of a log to updates of the parameters.

A live run and a replay both use this module, so that they cannot differ. `History` converts a
record to a `Change`. `replay_` applies many changes to a slice of one parameter in one pass over
memory: one change after the other at every element.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from zods.config.schema import ZerothOrderConfig
from zods.core import estimators
from zods.core.directions import Direction, Parameter
from zods.core.estimators import Term, Update
from zods.core.update_rule import StepRule
from zods.trajectory.records import Record, Refresh, RunRecord, Step

_BLOCK = 2**20  # elements of a stored anchor gradient that are recomputed at a time
_WORK = 2**32  # elements times terms that are processed at a time: one or two seconds


@dataclass(frozen=True)
class Change:
    """An update of all trained parameters.

    gradient: the terms of the anchor gradient that `update.anchor_grad_coefficient` multiplies.
    """

    update: Update
    gradient: tuple[Term, ...] = ()


def stores_gradient(section: ZerothOrderConfig) -> bool:
    """Whether the anchor gradient is stored as a tensor, rounded to the parameters' dtype."""
    return section.is_svrg and section.anchor.gradient != "terms"


def direction_of(section: ZerothOrderConfig) -> Direction:
    """The direction that a configuration defines."""
    return Direction(section.direction.distribution, section.direction.rank)


class History:
    """Converter of records to changes. Records must be passed in their order.

    gradient: the terms of the anchor gradient in force.
    """

    def __init__(
        self, section: ZerothOrderConfig | None = None, gradient: Sequence[Term] = ()
    ) -> None:
        """Set the initial values, which are needed if the first record is not a run record."""
        self._section = section
        self.gradient = tuple(gradient)

    def change(self, record: Record) -> Change | None:
        """The change of the parameters by a record; None if the record changes no parameter.

        Raises ValueError if the record contradicts the configuration in force.
        """
        if isinstance(record, RunRecord):
            self._section = record.section
        if not isinstance(record, (Step, Refresh)) or not record.coefficients:
            if isinstance(record, Step) and record.coefficients is None:
                raise ValueError(
                    f"step {record.step}: of first-order training. Such a log holds the selections "
                    "only and cannot be replayed. Use the run's checkpoints."
                )
            return None
        section = self._section
        assert section is not None
        rule, stored = StepRule(section), stores_gradient(section)
        if isinstance(record, Refresh):
            if not section.is_svrg:
                raise ValueError(
                    f"step {record.step}: a refresh of an anchor, but the method is "
                    f"{section.method}."
                )
            self.gradient = rule.anchor_gradient(record.step, record.coefficients)
            along = estimators.along_gradient(self.gradient, stored, record.step_size)
            return Change(rule.anchor_update(record.step, *along), self.gradient)
        try:
            estimate = rule.estimate_of(record.step, record.coefficients)
        except ValueError as error:
            raise ValueError(f"step {record.step}: {error}") from None
        along = (
            estimators.along_gradient(self.gradient, stored, record.step_size * record.weight)
            if section.is_svrg
            else ((), 0.0)
        )
        update = rule.update(record.step, estimate, record.lr, record.step_size, *along)
        return Change(update, self.gradient)


def num_terms(changes: Sequence[Change]) -> int:
    """The number of terms per element of a replay, a measure of its time."""
    stored = [
        of[0].gradient
        for of in _segments(changes)
        if any(c.update.anchor_grad_coefficient for c in of)
    ]
    return sum(map(len, stored)) + sum(len(change.update.terms) for change in changes)


def replay_(
    elements: torch.Tensor,
    parameter: Parameter,
    offset: int,
    changes: Sequence[Change],
    direction: Direction,
    progress: Callable[[int], object] = lambda _: None,
) -> torch.Tensor:
    """Apply changes, in their order and in place, to elements of a parameter.

    elements: the elements of the flat parameter from index `offset` on, 1-D and contiguous.
    progress: called with the number of elements times terms that were processed. Returns
    `elements`. The result has the same bits as the run, which applied one change at a time.
    """
    decays = len(parameter.shape) >= 2
    segments = [
        (of[0].gradient, [change.update.sweep(decays) for change in of], num_terms(of))
        for of in _segments(changes)
    ]
    size = _block_size(changes)
    for start in range(0, elements.numel() if changes else 0, size):
        block = elements[start : start + size]
        for gradient, sweeps, terms in segments:
            dense = None
            if any(sweep.dense_coefficient for sweep in sweeps):
                dense = direction.combine_(
                    torch.empty_like(block),
                    parameter,
                    offset + start,
                    seeds=[term.seed for term in gradient],
                    coefficients=[term.coefficient for term in gradient],
                )
            direction.replay_(block, parameter, offset + start, sweeps, dense)
            progress(block.numel() * terms)
    return elements


def _block_size(changes: Sequence[Change]) -> int:
    """The number of elements to process at a time.

    It is small enough for regular progress reports, and for a small recomputed anchor gradient.
    """
    dense = any(change.update.anchor_grad_coefficient for change in changes)
    fitting = max(_WORK // max(num_terms(changes), 1), 2**16)
    return min(fitting, _BLOCK) if dense else fitting


def _segments(changes: Sequence[Change]) -> list[list[Change]]:
    """Group consecutive changes that have the same anchor gradient."""
    return [
        list(of) for _, of in itertools.groupby(changes, key=lambda change: id(change.gradient))
    ]
