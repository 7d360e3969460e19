"""Baselines of the selection: simpler choices, and the features of the paper.

Choices: the longest examples, the examples of the highest or lowest loss, random examples; and two
approximations of the greedy choice of `zods.selection.facility_location`: stochastic greedy
(Mirzasoleiman et al. 2015, arXiv:1409.7938) and GreeDi (Mirzasoleiman et al. 2013).
Features: section 4.3 of Nguyen et al. 2024, arXiv:2407.19580v1.

Caller: `zods.selection.selector`, on every rank with the same arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zods import kernels
from zods.core.directions import Parameter
from zods.selection.facility_location import (
    Chosen,
    Problem,
    best,
    check_budget,
    choice,
    lazy_greedy,
)

BETAS = (0.9, 0.999)
EPSILON = 1e-8


# --- orders in which examples are taken -----------------------------------------------------------


def longest_first(indices: Sequence[int], num_tokens: Sequence[int]) -> list[int]:
    """Sort indices by number of tokens, the largest first; equals by index."""
    return sorted(indices, key=lambda i: (-num_tokens[i], i))


def by_loss(indices: Sequence[int], losses: Sequence[float], *, highest: bool) -> list[int]:
    """Sort indices by loss, the highest or the lowest first; equals by index."""
    sign = -1 if highest else 1
    return sorted(indices, key=lambda i: (sign * losses[i], i))


def shuffled(indices: Sequence[int], seed: int) -> list[int]:
    """Put indices into random order."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))
    return [indices[i] for i in order.tolist()]


# --- approximations of the greedy choice ----------------------------------------------------------


def stochastic_greedy(problem: Problem, k: int, *, seed: int, epsilon: float = 0.01) -> Chosen:
    """Choose min(k, n) candidates, each as the best of a random sample.

    A sample has n / k ln(1 / epsilon) of the remaining candidates. The objective is at least
    (1 - 1/e - epsilon) of the optimum in expectation. The number of gains that are evaluated does
    not grow with k.
    """
    check_budget(k)
    generator = torch.Generator().manual_seed(seed)
    size = math.ceil(problem.num_candidates / max(1, k) * math.log(1.0 / epsilon))
    left, nearest = torch.arange(problem.num_candidates, device=problem.device), problem.start()
    ids: list[int] = []
    while len(ids) < k and len(left):
        drawn = left[torch.randperm(len(left), generator=generator)[:size].to(left.device)]
        ids.append(best(problem, drawn, nearest))
        left = left[left != ids[-1]]
        nearest = torch.minimum(nearest, problem.distances(left.new_tensor(ids[-1:]))[0])
    return choice(problem, ids)


def greedi(
    problem: Problem,
    k: int,
    parts: Sequence[Sequence[int]],
    quotas: Sequence[int],
) -> Chosen:
    """Choose k candidates in two rounds.

    The first round chooses the quota of each part among the part only. The second round chooses k
    of these. Returns the best of the second round's choice and of the parts' own choices that have
    k candidates.
    """
    check_budget(k)
    of_parts = []
    for part, quota in zip(parts, quotas, strict=True):
        ids = torch.tensor(part, dtype=torch.int64, device=problem.device)
        of_parts.append(
            ids[lazy_greedy(problem.among(ids), quota).ids].tolist() if len(part) else []
        )
    union = sorted(i for first in of_parts for i in first)
    own = torch.tensor(union, dtype=torch.int64, device=problem.device)
    tried = [lazy_greedy(problem, k, own=own)]
    tried += [choice(problem, first) for first in of_parts if len(first) == k]
    return max(tried, key=lambda chosen: chosen.objective)


# --- the features of the paper --------------------------------------------------------------------


class PaperFeatures:
    """Features of the paper, and the Adam moments that they need.

    All examples share one direction z of `parameter`. An example's gradient is estimated as g_i z,
    with g_i one difference of losses. The estimate is normalised like an Adam step, with the
    moments of the gradients of earlier selections. Of the result, the `top` elements are kept that
    are largest over the candidates. So all features lie on a curve with the one parameter g_i.

    history: (seed of z, mean g_i of the chosen examples) of every selection. The moments follow
    from the history, so that a checkpoint stores only the history.
    """

    def __init__(self, parameter: Parameter, top: int) -> None:
        self._parameter, self._top = parameter, top
        self._numel = math.prod(parameter.shape)
        self.load([])

    def expand(self, differences: Tensor, seed: int) -> Tensor:
        """Make features (n, top) float32 from the candidates' derivatives (n,) along z(seed)."""
        z = self._z(seed)
        total = torch.zeros(self._numel)
        for g in differences.tolist():
            total += self._normalised(g * z).abs()
        kept = total.topk(min(self._top, self._numel)).indices.sort().values
        return torch.stack([self._normalised(g * z[kept], kept) for g in differences.tolist()])

    def record(self, seed: int, mean: float) -> None:
        """Update the moments with the mean derivative of the chosen examples along z(seed)."""
        self.history.append((seed, mean))
        self._moments = self._updated_moments(mean * self._z(seed), slice(None))

    def load(self, history: list[tuple[int, float]]) -> None:
        """Compute the moments from a history."""
        self.history: list[tuple[int, float]] = []
        self._moments = (torch.zeros(self._numel), torch.zeros(self._numel))
        for seed, mean in history:
            self.record(seed, mean)

    def _z(self, seed: int) -> Tensor:
        return kernels.direction(
            self._numel,
            seed=seed,
            distribution="gaussian",
            parameter=self._parameter.ordinal,
            offset=0,
        )

    def _updated_moments(self, gradient: Tensor, where: Tensor | slice) -> tuple[Tensor, Tensor]:
        first, second = (moment[where] for moment in self._moments)
        return first.lerp(gradient, 1 - BETAS[0]), second.lerp(gradient.square(), 1 - BETAS[1])

    def _normalised(self, gradient: Tensor, where: Tensor | slice = slice(None)) -> Tensor:
        first, second = self._updated_moments(gradient, where)
        step = len(self.history) + 1
        return first / (1 - BETAS[0] ** step) / ((second / (1 - BETAS[1] ** step)).sqrt() + EPSILON)
