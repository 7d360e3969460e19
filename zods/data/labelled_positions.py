"""The positions of a batch at which a causal language model's logits count.

A model that computes logits at these positions alone makes no logits that its loss leaves out. Called
by the forms of evaluation and by evaluations of candidates (`zods.forward`).
"""

from __future__ import annotations

from typing import Any

import torch

from zods.data.scores import IGNORE_INDEX

# argument of a causal language model's forward in transformers: positions (n,) of logits (B, n, V)
POSITIONS_OF_LOGITS = "logits_to_keep"


def positions_before_labels(labels: torch.Tensor) -> torch.Tensor | None:
    """The positions at which some row's next label counts, and the last position, (n,) int64.

    labels: (B, L), aligned so that position t predicts label t + 1. None where n would be L, and
    for labels of another shape.

    >>> positions_before_labels(torch.tensor([[-100, -100, 5, -100, -100], [-100, -100, 6, 7, -100]]))
    tensor([1, 2, 4])
    """
    if labels.ndim != 2 or not labels.shape[1]:
        return None
    needed = torch.ones(labels.shape[1], dtype=torch.bool, device=labels.device)
    needed[:-1] = (labels[:, 1:] != IGNORE_INDEX).any(0)
    return None if needed.all() else needed.nonzero().squeeze(1)


def labelled_part(batch: dict[str, Any], positions: torch.Tensor) -> dict[str, Any]:
    """The batch with those labels (B, n) that logits (B, n, V) at `positions` predict.

    Label j + 1 is the one after positions[j], as if the other positions did not exist. positions:
    from `positions_before_labels`.
    """
    labels = torch.full_like(batch["labels"][:, positions], IGNORE_INDEX)
    labels[:, 1:] = batch["labels"][:, positions[:-1] + 1]
    return {**batch, "labels": labels}
