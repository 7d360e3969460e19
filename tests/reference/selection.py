"""Facility location written out: the reference that `zods.selection` is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch

from zods.selection.facility_location import Chosen, Problem, choice


def objective(similarities: Sequence[Sequence[int]], chosen: Sequence[int]) -> int:
    """sum_i max_{j in chosen} s[i][j]."""
    return sum(max((row[j] for j in chosen), default=0) for row in similarities)


def greedy(similarities: Sequence[Sequence[int]], k: int) -> list[int]:
    """The candidate that adds most, k times; the lowest id of several."""
    chosen: list[int] = []
    candidates = range(len(similarities[0]))
    for _ in range(min(k, len(candidates))):
        left = [j for j in candidates if j not in chosen]
        chosen.append(max(left, key=lambda j: (objective(similarities, [*chosen, j]), -j)))
    return chosen


def eager_greedy(problem: Problem, k: int) -> Chosen:
    """`greedy` of a problem, with every gain made anew for every pick."""
    problem.keep_distances()
    left, nearest = torch.arange(problem.num_candidates), problem.start()
    ids: list[int] = []
    while len(ids) < k and len(left):
        gains = problem.gains(left, nearest)
        ids.append(int(left[gains == gains.max()][0]))
        left = left[left != ids[-1]]
        nearest = torch.minimum(nearest, problem.distances(torch.tensor(ids[-1:]))[0])
    return choice(problem, ids)


def optimum(similarities: Sequence[Sequence[int]], k: int) -> int:
    """The best objective of any k candidates, by enumeration."""
    return max(
        objective(similarities, chosen) for chosen in combinations(range(len(similarities[0])), k)
    )


def largest_remainder(sizes: Sequence[int], budget: int) -> list[int]:
    """Quotas in proportion to `sizes` that sum to `budget` (at most their sum): whole parts, then
    the largest remainders; the earlier of equals."""
    total = sum(sizes)
    quotas = [budget * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(budget * sizes[i] % total), i))
    for i in by_remainder[: budget - sum(quotas)]:
        quotas[i] += 1
    return quotas
