"""Sums of losses at points, and of their differences between the points of a pair.

Made by `zods.forward.evaluator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from zods.core.example_groups import Group


@dataclass(frozen=True)
class LossSums:
    """Sums of losses at points, each over its rows of a batch, float64.

    sums: (number of points,); 0 where no label counts. count: the number of tokens or examples of
    which the loss of the whole batch is the mean, 0-d. rows: see
    `zods.forward.forms.PointLosses`.
    """

    sums: torch.Tensor
    count: torch.Tensor
    rows: tuple[torch.Tensor, ...] | None


@dataclass(frozen=True)
class PairSums:
    """The losses of a micro-batch at pairs of points, float64 on the device.

    groups: indices of the groups of its rows. differences: (groups, sets of pairs), the loss sum at
    the first point of a pair less that at the second. sums: (sets of pairs,), the loss sum over all
    rows, mean of a pair's points. count: what a loss is the mean over, 0-d. units, squares: the
    units of which differences are known, and (sets of pairs,), the sum over them of the squared
    difference by the unit's number of rows. A unit is a row, or the rows of a group where the
    losses of rows are not computed. examples: number of rows.
    """

    groups: list[int]
    differences: torch.Tensor
    sums: torch.Tensor
    count: torch.Tensor
    units: int
    squares: torch.Tensor
    examples: int


class PassDifferences(NamedTuple):
    """Differences of losses over many examples, the same on all ranks.

    values: L(first of a pair) - L(second) for each group and set of pairs, group by group. A
    group's loss is its share in the mean over all examples under the objective. NaN if no label
    counts. means: for each set, the mean loss over all examples and the points of their pairs.
    squares, units: as in `PairSums`, in the unit of `values`.
    """

    values: list[float]
    means: list[float]
    squares: list[float]
    units: int


def pair_sums_of(
    found: LossSums, groups: Sequence[Group], num_sets: int, examples: int
) -> PairSums:
    """Take the differences between the points of each pair.

    found: at the points of all pairs, first point and second: for each set of pairs, a pair for each
    group. examples: rows of the batch.
    """
    by_pair = found.sums.view(num_sets, len(groups), 2)
    differences = by_pair[..., 0] - by_pair[..., 1]
    if found.rows is None:
        sizes = [examples if group.rows is None else len(group.rows) for group in groups]
        units = len(groups)
        squares = differences.square() @ differences.new_tensor([1.0 / size for size in sizes])
    else:
        of_rows = torch.cat(found.rows[0::2]) - torch.cat(found.rows[1::2])
        units = of_rows.numel() // num_sets
        squares = of_rows.square().view(num_sets, units).sum(1)
    return PairSums(
        [group.index for group in groups],
        differences.T,
        by_pair.sum((1, 2)) / 2,
        found.count,
        units,
        squares,
        examples,
    )
