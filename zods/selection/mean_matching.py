"""Mean matching: choose the k of n candidates whose mean feature is nearest to the mean of all.

    E(S) = || n sum_{j in S} x_j - k sum_i x_i ||^2 = (n k)^2 || mean of S - mean of all ||^2

Features are random projections of gradients, so that E estimates the error of the mean gradient of
the chosen examples. The choice starts from pair balancing: of each pair of neighbours, the one is
kept that leaves the smaller running sum (Lu et al. 2022, "GraB", arXiv:2205.10733, chooses signs in
the same way). Then chosen and unchosen candidates are swapped as long as a swap lowers E.

All numbers are integers in int64, so that a choice is exact and the same on every rank. Of equal
scores, the lowest id wins.

The module is pure: it knows no ranks. Caller: `zods.selection.selector`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zods.selection.facility_location import check_budget

# Sweeps over the chosen candidates. On mixtures of six sources, 64 of 128 chosen, no swap is left
# after 3 to 9.
_MAX_SWEEPS = 10
_INT16_BITS = 15  # of the magnitude


def mean_matching(features: Tensor, k: int) -> list[int]:
    """Choose min(k, n) candidates by `balanced_start` and `swapped`. Returns ids, ascending.

    features: (n, m) int16, on any device. The work is O(n m) for the start and O(k n m) for each
    sweep of swaps. Every rank does all of it.
    """
    check_budget(k)
    if k == 0 or k >= len(features):
        return list(range(min(k, len(features))))
    values = narrowed(features.cpu())
    return swapped(values, balanced_start(values, k))


def feature_bits(n: int, m: int) -> int:
    """The number of bits of a feature's magnitude for which no number here exceeds int64.

    With |x| <= 2^b, each sum n S - k T of this module is at most 2^(b+1) n^2, and a score
    2 r.d + n d.d with d the difference of two features at most 2^(2b+4) m n^2. The 15 bits of int16
    fit up to 2,048 candidates with 64 features; 100,000 candidates keep 9 bits.
    """
    bits = (59 - (m - 1).bit_length() - 2 * (n - 1).bit_length()) // 2
    return min(bits, _INT16_BITS)


def narrowed(features: Tensor) -> Tensor:
    """Round features (n, m) int16 to `feature_bits`. Returns int64."""
    shift = _INT16_BITS - feature_bits(*features.shape)
    values = features.to(torch.int64)
    return values if shift == 0 else (values + (1 << (shift - 1))) >> shift


def balanced_start(values: Tensor, k: int) -> list[int]:
    """Choose one candidate of each of k groups of neighbours, so that the running sum stays small.

    The groups are ranges of ids of nearly equal size: pairs for n = 2 k. The running sum is
    n sum(chosen) - k sum(members of the groups so far). values: (n, m), 0 < k <= n.
    """
    n = len(values)
    running, chosen = values.new_zeros(values.shape[1]), []
    for group in range(k):
        first, end = group * n // k, (group + 1) * n // k
        members = values[first:end]
        running = running - k * members.sum(0)
        scores = 2 * (members @ running) + n * members.square().sum(1)
        pick = _first_least(scores)
        running = running + n * members[pick]
        chosen.append(first + pick)
    return chosen


def swapped(values: Tensor, chosen: list[int]) -> list[int]:
    """Swap chosen for unchosen candidates as long as E falls. Returns ids, ascending.

    A sweep takes the chosen candidates by ascending id, and exchanges each for the unchosen
    candidate that lowers E most, if there is one. At most 10 sweeps are made.
    """
    n, k = len(values), len(chosen)
    squares = n * values.square().sum(1)
    is_chosen = torch.zeros(n, dtype=torch.bool)
    is_chosen[chosen] = True
    residual = n * values[chosen].sum(0) - k * values.sum(0)
    for _ in range(_MAX_SWEEPS):
        swaps = 0
        for old in is_chosen.nonzero().squeeze(1).tolist():
            # (E after the swap - E) / n, for each candidate in place of `old`
            changes = values @ (2 * (residual - n * values[old])) + squares
            changes = (changes - changes[old]).masked_fill(is_chosen, 0)
            new = _first_least(changes)
            if changes[new] < 0:
                residual = residual + n * (values[new] - values[old])
                is_chosen[old], is_chosen[new] = False, True
                swaps += 1
        if not swaps:
            break
    return is_chosen.nonzero().squeeze(1).tolist()


def _first_least(scores: Tensor) -> int:
    """The lowest index of the smallest score."""
    return int((scores == scores.min()).nonzero()[0, 0])
