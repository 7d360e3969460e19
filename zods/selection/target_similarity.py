"""Choose the candidates most similar to examples of a target task.

    s(x, t) = x . t / (|x| |t|)

The targets take turns. Each takes the candidate with the largest s that is not taken yet, so that
every target has its share of the choice. Features are random projections of gradients: a step along
the gradient of a candidate with a large s lowers the target's loss (Xia et al. 2024, "LESS",
arXiv:2402.04333). Turns in place of a mean over the targets: Ivison et al. 2025, arXiv:2503.01807.

Products of features are integers in int64. Their quotients are float64 on the CPU, correctly
rounded, so that a choice is the same on every rank. Of equal similarities, the lowest id wins.

The module is pure: it knows no ranks. Caller: `zods.selection.selector`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zods.selection.facility_location import check_budget


def most_similar(features: Tensor, targets: Tensor, k: int) -> list[int]:
    """Choose min(k, n) candidates, the targets taking turns. Returns ids, ascending.

    features: (n, m) int16, on any device. targets: (T, m) int16, T at least 1; their scale may be
    another one. The similarity of features that are all 0 is 0. The work is O(n T m + k n), done by
    every rank.
    """
    check_budget(k)
    similarity = _similarity(features.cpu(), targets.cpu())
    chosen: list[int] = []
    for turn in range(min(k, len(features))):
        of_target = similarity[turn % len(targets)]
        pick = int((of_target == of_target.max()).nonzero()[0, 0])
        chosen.append(pick)
        similarity[:, pick] = -torch.inf
    return sorted(chosen)


def _similarity(features: Tensor, targets: Tensor) -> Tensor:
    """x . t / |x|, (T, n) float64. A target's own length does not change its order."""
    values = features.to(torch.int64)
    products = targets.to(torch.int64) @ values.T
    lengths = values.square().sum(1).double().sqrt()
    return products.double() / lengths.clamp(min=1.0)
