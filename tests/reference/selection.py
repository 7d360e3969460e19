"""Facility location, mean matching and similarity to targets written out: the references of `zods.selection`."""

from __future__ import annotations

import math
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


def mean_error(features: Sequence[Sequence[int]], chosen: Sequence[int]) -> int:
    """|| n sum_{j in chosen} x_j - k sum_i x_i ||^2 for all n features, k of them chosen."""
    n, k = len(features), len(chosen)
    return sum(
        (n * sum(column[j] for j in chosen) - k * sum(column)) ** 2
        for column in zip(*features, strict=True)
    )


def balanced_start(features: Sequence[Sequence[int]], k: int) -> list[int]:
    """One candidate of each of k ranges of ids: the one after which the running sum is smallest."""
    n, chosen = len(features), list[int]()
    for group in range(k):
        members = range(group * n // k, (group + 1) * n // k)

        def running(j: int, end: int = members.stop) -> int:
            return sum(
                (n * sum(column[i] for i in [*chosen, j]) - k * sum(column[:end])) ** 2
                for column in zip(*features, strict=True)
            )

        chosen.append(min(members, key=lambda j: (running(j), j)))
    return chosen


def best_swap(features: Sequence[Sequence[int]], chosen: Sequence[int], old: int) -> int:
    """The candidate that leaves the smallest error in the place of `old`; `old` if none is better."""
    others = [j for j in range(len(features)) if j not in chosen]
    kept = [j for j in chosen if j != old]
    best = min(others, key=lambda j: (mean_error(features, [*kept, j]), j), default=old)
    better = mean_error(features, [*kept, best]) < mean_error(features, chosen)
    return best if better else old


def mean_matching(features: Sequence[Sequence[int]], k: int, sweeps: int = 10) -> list[int]:
    """`balanced_start`, then in each sweep the best swap of each chosen candidate, by its id."""
    chosen = balanced_start(features, k)
    for _ in range(sweeps):
        before = sorted(chosen)
        for old in before:
            new = best_swap(features, chosen, old)
            chosen = [new if j == old else j for j in chosen]
        if sorted(chosen) == before:
            break
    return sorted(chosen)


def most_similar(
    features: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], k: int
) -> list[int]:
    """The targets take turns; each takes the candidate with the largest x . t / |x| that is left,
    the lowest id of equals."""
    chosen: list[int] = []
    for turn in range(min(k, len(features))):
        target = targets[turn % len(targets)]

        def similarity(i: int, target: Sequence[int] = target) -> float:
            product = sum(a * b for a, b in zip(features[i], target, strict=True))
            return product / math.sqrt(max(1, sum(a * a for a in features[i])))

        left = [i for i in range(len(features)) if i not in chosen]
        chosen.append(min(left, key=lambda i: (-similarity(i), i)))
    return sorted(chosen)


def largest_remainder(sizes: Sequence[int], budget: int) -> list[int]:
    """Quotas in proportion to `sizes` that sum to `budget` (at most their sum): whole parts, then
    the largest remainders; the earlier of equals."""
    total = sum(sizes)
    quotas = [budget * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(budget * sizes[i] % total), i))
    for i in by_remainder[: budget - sum(quotas)]:
        quotas[i] += 1
    return quotas
