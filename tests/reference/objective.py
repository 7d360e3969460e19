"""The objective written out: a global batch on one rank, token by token, in float64."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


def token_losses(logits: Tensor, labels: Tensor, shifted: bool) -> list[Tensor]:
    """The losses of each example's labels that are not -100.

    logits: (B, C) with labels (B,), or (B, L, V) with labels (B, L).
    """
    found = []
    for scores, wanted in zip(logits.double(), labels, strict=True):
        if wanted.ndim == 0:
            scores, wanted = scores[None], wanted[None]
        elif shifted:
            scores, wanted = scores[:-1], wanted[1:]
        counted = wanted != -100
        found.append(functional.cross_entropy(scores[counted], wanted[counted], reduction="none"))
    return found


def objective(
    losses: Sequence[Tensor], mean: str, weights: Sequence[float] | None = None
) -> Tensor:
    """The weighted mean over all label tokens, or over the means of the examples.

    losses: for each example, the losses of its label tokens. mean: "tokens" or "examples".
    """
    weights = [1.0] * len(losses) if weights is None else weights
    pairs = [
        (weight, of_one) for weight, of_one in zip(weights, losses, strict=True) if len(of_one)
    ]
    if mean == "tokens":
        return sum(w * one.sum() for w, one in pairs) / sum(w * len(one) for w, one in pairs)
    return sum(w * one.mean() for w, one in pairs) / sum(w for w, _ in pairs)


def objective_of(logits: Tensor, labels: Tensor, mean: str, shifted: bool) -> Tensor:
    return objective(token_losses(logits, labels, shifted), mean)
