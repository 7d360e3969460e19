"""The loss of a model's outputs on a batch, and the log-likelihood of labelled tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zods.batch import WEIGHTS, describe

IGNORE_INDEX = -100  # transformers' mark for a token that is not scored

_CHUNK_ELEMENTS = 1 << 24  # logits turned into float32 at a time: 64 MiB
_CHUNK_ELEMENTS_ON_CPU = 1 << 20  # what stays in its cache: seven times faster there for bfloat16 logits


def batch_loss(outputs: Any, batch: Any) -> Tensor:
    """The mean loss of a model's outputs on a batch.

    The model's own loss is taken where there is one: `outputs` itself when it is a 0-d tensor, the first element of a
    tuple when that is a 0-d tensor, or the entry (or attribute) `loss`. Where that is the plain cross entropy of a
    classification rounded to 16 bits, as transformers takes it in the dtype of the logits, it is taken again in float32:
    the rounding would swallow the difference of two nearby points. Where there is none, it is the cross entropy of
    `logits` against `batch["labels"]`: logits (B, C) with labels (B,) are a classification; logits (B, L, V) with
    labels (B, L) a causal language model, where position t predicts label t + 1 and labels of -100 do not count. A batch
    without any counted label gives NaN, as in transformers.

    Of a batch with weights it is their weighted mean of `example_losses`, whatever loss the model gives; 0 where all are 0.

    Args:
        outputs: what the model's forward returned.
        batch: what it was given: a dict, or a tuple of tensors (which names no labels).

    Returns:
        0-d float32 tensor.

    Raises:
        ValueError: neither a scalar loss nor logits with labels; or their shapes do not fit each other.
    """
    first = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
    loss = first if isinstance(first, Tensor) and first.ndim == 0 else _entry(outputs, "loss")
    logits, labels = _entry(outputs, "logits"), _entry(batch, "labels")
    weights = weights_of(batch)
    if weights is not None:
        return weighted_sum(outputs, batch) / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)
    if isinstance(loss, Tensor) and loss.ndim == 0:
        rounded = loss.dtype.itemsize < 4 and _is_classification(logits, labels)
        if rounded and torch.equal(functional.cross_entropy(logits, labels), loss):
            return functional.cross_entropy(logits.float(), labels)
        return loss.float()
    if loss is not None:
        found = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the model's loss must be a 0-d tensor, the mean over the batch; it is {found}")

    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        raise ValueError(
            "the model's forward gives neither a loss nor logits with labels: "
            f"it returned {describe(outputs)} for a batch of {describe(batch)}; "
            "pass labels, or wrap the model so that forward returns a scalar loss"
        )
    if _is_classification(logits, labels):
        return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX)
    if logits.ndim == 3 and labels.shape == logits.shape[:2]:
        log_likelihood, num_tokens = sequence_log_likelihood(logits, labels)
        return -log_likelihood.sum() / num_tokens.sum()
    raise ValueError(_misfit(logits, labels))


def weights_of(batch: Any) -> Tensor | None:
    """The weights of a batch's examples, (B,), where it has some."""
    return batch.get(WEIGHTS) if isinstance(batch, Mapping) else None


def weighted_sum(outputs: Any, batch: Any) -> Tensor:
    """The sum over a batch of its weights times `example_losses`, 0-d float32; an example of weight 0 counts nothing.

    Raises ValueError where the outputs have no logits, or no labels fit them.
    """
    logits, labels, weights = logits_of(outputs), _entry(batch, "labels"), weights_of(batch)
    if logits is None or not isinstance(labels, Tensor) or weights is None:
        raise ValueError(
            f"weights of examples need logits and labels; the model returned {describe(outputs)} for {describe(batch)}"
        )
    counted = weights != 0
    return (example_losses(logits, labels)[counted] * weights[counted]).sum()


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each example, (B,) float32: the mean over its own labelled tokens, NaN where it has none.

    logits (B, C) with labels (B,), or (B, L, V) with (B, L), as in `batch_loss`. Raises ValueError for other shapes.
    """
    if _is_classification(logits, labels):
        losses = functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
        return losses.masked_fill(labels == IGNORE_INDEX, torch.nan)
    if logits.ndim == 3 and labels.shape == logits.shape[:2]:
        log_likelihood, num_tokens = sequence_log_likelihood(logits, labels)
        return -log_likelihood / num_tokens
    raise ValueError(_misfit(logits, labels))


def _misfit(logits: Tensor, labels: Tensor) -> str:
    return (
        f"logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(labels.shape)} and {labels.dtype}; "
        "allowed are (B, C) with integer labels (B,), and (B, L, V) with (B, L); "
        "for another objective, return a scalar loss from forward"
    )


def _is_classification(logits: Any, labels: Any) -> bool:
    """Logits (B, C) with integer labels (B,)."""
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        return False
    return logits.ndim == 2 and labels.shape == logits.shape[:1] and not labels.is_floating_point()


def logits_of(outputs: Any) -> Tensor | None:
    """The logits among a model's outputs: the entry or attribute of that name, or a tensor that is all there is."""
    found = outputs if isinstance(outputs, Tensor) and outputs.ndim else _entry(outputs, "logits")
    return found if isinstance(found, Tensor) else None


def sequence_log_likelihood(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, the sum of the labelled tokens' log-probabilities, and their number.

    log p(row) = sum over t with labels[t + 1] != -100 of log softmax(logits[t])[labels[t + 1]], in float32. Only
    labelled positions are looked at, some at a time, so that there is never a float32 copy of all logits. Infinities
    and NaN in the logits of a labelled position pass through to its row.

    Args:
        logits: (B, L, V), any floating dtype.
        labels: (B, L), int64; -100 where a token is not scored. A row's first label has no predecessor and never is.

    Returns:
        (B,) float32 sums, and (B,) int64 counts.
    """
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, L)
    counted = targets != IGNORE_INDEX
    num_tokens = counted.sum(1)
    elements = _CHUNK_ELEMENTS_ON_CPU if logits.device.type == "cpu" else _CHUNK_ELEMENTS
    chunk = max(1, elements // logits.shape[-1])
    # where most positions are labelled, looking at all of them spares a copy of those that are
    few = 2 * int(num_tokens.sum()) < targets.numel()
    chosen = counted.flatten().nonzero().squeeze(1) if few else None
    wanted = targets.flatten() if chosen is None else targets.flatten()[chosen]
    scores = logits.reshape(-1, logits.shape[-1])
    parts = []
    for start in range(0, len(wanted), chunk):
        part = slice(start, start + chunk)
        rows = scores[part] if chosen is None else scores[chosen[part]]
        parts.append(-functional.cross_entropy(rows.float(), wanted[part], ignore_index=IGNORE_INDEX, reduction="none"))
    token_log_probs = torch.zeros(targets.numel(), dtype=torch.float32, device=logits.device)
    if parts:
        token_log_probs[slice(None) if chosen is None else chosen] = torch.cat(parts)
    return token_log_probs.view_as(targets).sum(1), num_tokens


def _entry(container: Any, name: str) -> Any:
    return container.get(name) if isinstance(container, Mapping) else getattr(container, name, None)
