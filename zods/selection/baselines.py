"""Baselines that the default selection is compared with: other choices, and the features of the
paper.

choices   the longest examples, those of the highest loss, random ones; stochastic greedy and GreeDi,
          which approximate the greedy choice of `zods.selection.facility_location`
features  those of Nguyen et al. 2024, arXiv:2407.19580v1, section 4.3

`zods.selection.selector` calls them, on every rank with the same arguments. Stochastic greedy:
Mirzasoleiman et al. 2015, arXiv:1409.7938. GreeDi: Mirzasoleiman et al. 2013.
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
    """Places by their number of tokens, the first of equals first."""
    return sorted(indices, key=lambda i: (-num_tokens[i], i))


def highest_loss_first(indices: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Places by their loss, the first of equals first."""
    return sorted(indices, key=lambda i: (-losses[i], i))


def shuffled(indices: Sequence[int], seed: int) -> list[int]:
    """Places in random order."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))
    return [indices[i] for i in order.tolist()]


# --- approximations of the greedy choice ----------------------------------------------------------


def stochastic_greedy(problem: Problem, k: int, *, seed: int, epsilon: float = 0.01) -> Chosen:
    """Choose min(k, n) candidates, each the best of n / k ln(1 / epsilon) drawn at random.

    The objective is (1 - 1/e - epsilon) of the optimum in expectation. The cost does not grow with
    k.
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
    """Choose k candidates in two rounds: a quota of each part, by the part alone, then k of these.

    Returns the better of that choice and of those parts' own choices that have k candidates.
    """
    check_budget(k)
    firsts = []
    for part, quota in zip(parts, quotas, strict=True):
        ids = torch.tensor(part, dtype=torch.int64, device=problem.device)
        firsts.append(ids[lazy_greedy(problem.among(ids), quota).ids].tolist() if len(part) else [])
    union = sorted(i for first in firsts for i in first)
    own = torch.tensor(union, dtype=torch.int64, device=problem.device)
    tried = [lazy_greedy(problem, k, own=own)]
    tried += [choice(problem, first) for first in firsts if len(first) == k]
    return max(tried, key=lambda chosen: chosen.objective)


# --- the features of the paper --------------------------------------------------------------------


class PaperFeatures:
    """Features of the paper, and the moments of the gradients along the directions chosen so far.

    All examples share one direction z of `parameter`: an example's gradient is estimated as g_i z,
    with g_i one difference of losses. It is made what an Adam step would be from it, by the moments
    of the gradients chosen so far, and cut to the `top` elements that are largest over the
    candidates. So the features are a curve with one parameter; g_i tells examples apart.

    history: (seed of z, mean g_i of the chosen) of every selection. The moments follow from it, so
    that a checkpoint keeps nothing else.
    """

    def __init__(self, parameter: Parameter, top: int) -> None:
        self._parameter, self._top = parameter, top
        self._numel = math.prod(parameter.shape)
        self.load([])

    def expand(self, differences: Tensor, seed: int) -> Tensor:
        """(n, top) float32 of the candidates' derivatives (n,) along z(seed)."""
        z = self._z(seed)
        total = torch.zeros(self._numel)
        for g in differences.tolist():
            total += self._normalised(g * z).abs()
        kept = total.topk(min(self._top, self._numel)).indices.sort().values
        return torch.stack([self._normalised(g * z[kept], kept) for g in differences.tolist()])

    def record(self, seed: int, mean: float) -> None:
        """Take into the moments that the chosen have this mean derivative along z(seed)."""
        self.history.append((seed, mean))
        self._moments = self._moved(mean * self._z(seed), slice(None))

    def load(self, history: list[tuple[int, float]]) -> None:
        """Make the moments that follow from a history."""
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

    def _moved(self, gradient: Tensor, where: Tensor | slice) -> tuple[Tensor, Tensor]:
        first, second = (moment[where] for moment in self._moments)
        return first.lerp(gradient, 1 - BETAS[0]), second.lerp(gradient.square(), 1 - BETAS[1])

    def _normalised(self, gradient: Tensor, where: Tensor | slice = slice(None)) -> Tensor:
        first, second = self._moved(gradient, where)
        step = len(self.history) + 1
        return first / (1 - BETAS[0] ** step) / ((second / (1 - BETAS[1] ** step)).sqrt() + EPSILON)
