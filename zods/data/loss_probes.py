"""Compare the loss that a model returns with the cross entropy of its logits.

Called by the modules of `zods.forward`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zods.data.objectives import Objective, batch_loss, entry, label_counts, own_loss
from zods.data.scores import IGNORE_INDEX


def other_labels(batch: dict[str, Any], logits: Tensor) -> list[dict[str, Any]]:
    """Copies of a batch with other labels, to compare a model's loss with a plain cross entropy.

    logits: the model's logits for the batch. Labels (B,) are spread over up to 16 classes, B
    classes per batch. Labels (B, L) that count are spread over the classes. If more than two labels
    of the first example count, some of them are masked. The end of the first example's attention
    mask is cleared, for a loss that counts tokens by the mask.
    """
    labels, number = batch.get("labels"), logits.shape[-1]
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.ndim not in (1, 2)
        or not number
    ):
        return [dict(batch)]
    changed = dict(batch)
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        changed["attention_mask"] = mask.clone()
        changed["attention_mask"][0, mask.shape[1] * 3 // 4 :] = 0
    if labels.ndim == 1 and labels.shape != logits.shape[:1]:
        return [changed]
    if labels.ndim == 1:
        classes = torch.linspace(0, number - 1, min(number, 16), device=labels.device).long()
        sets = classes.split(max(1, len(labels)))
        return [
            {**changed, "labels": of_set[torch.arange(len(labels)) % len(of_set)].to(labels.dtype)}
            for of_set in sets
        ]
    counted = labels != IGNORE_INDEX
    spread = (
        torch.arange(int(counted.sum()), device=labels.device)
        * max(1, number // max(1, int(counted.sum())))
        + 1
    )
    changed["labels"] = labels.clone()
    changed["labels"][counted] = (spread % number).to(labels.dtype)
    if int(counted[0].sum()) > 2:
        changed["labels"][0, labels.shape[1] * 2 // 4 : labels.shape[1] * 3 // 4] = IGNORE_INDEX
    return [changed]


def fits_cross_entropy(outputs: Any, batch: Any, shifted: bool) -> bool | None:
    """Whether a model's own loss is the cross entropy of its logits, up to rounding.

    None if the batch has no label that counts: the two cannot be compared then.
    """
    loss, logits, labels = own_loss(outputs), entry(outputs, "logits"), entry(batch, "labels")
    if loss is None or not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        return False
    counts = label_counts(labels, shifted)
    if (
        counts is None
        or logits.ndim != labels.ndim + 1
        or labels.shape != logits.shape[:-1]
        or labels.ndim > 2
    ):
        return False
    if not counts.any():
        return None
    expected = batch_loss({"logits": logits}, {"labels": labels}, Objective(shifted=shifted))
    tolerance = 1e-5 if loss.dtype.itemsize >= 4 and logits.dtype.itemsize >= 4 else 2.0**-7
    return torch.allclose(loss.double(), expected, rtol=tolerance, atol=0.1 * tolerance)


def shift_probes(batch: Any) -> tuple[Any, Any] | None:
    """Two batches that show whether a model shifts its labels.

    The rows of the first batch have a label at their last position only. The rows of the second
    have one at their first position, too. A model whose position t predicts label t + 1 returns the
    same loss for both. None if the labels are not integers (B, L).
    """
    labels = entry(batch, "labels")
    if not isinstance(batch, Mapping) or label_counts(labels) is None or labels.ndim != 2:
        return None
    without = torch.full_like(labels, IGNORE_INDEX)
    without[:, -1] = labels.max().clamp(min=0)
    with_first = without.clone()
    with_first[:, 0] = without[:, -1]
    return {**batch, "labels": without}, {**batch, "labels": with_first}
