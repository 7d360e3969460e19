"""The loss of a global batch: the same number whatever micro-batches and ranks the batch is cut
into.

Every micro-batch gives its mean loss (`batch_loss`) and what that mean is taken over
(`loss_count`). Over all micro-batches and ranks the objective is sum(count * mean) / sum(count),
with `Objective.mean`

tokens    sum of the losses of all label tokens / their number, as transformers does with `num_items_in_batch`
examples  sum over examples of the mean over the example's own label tokens / number of examples with a label token

Labels of -100 do not count. With weights w_i of examples: sum_i w_i sum_t loss_it / sum_i w_i n_i
for tokens, and sum_i w_i mean_i / sum_i w_i for examples. For labels of one dimension (classes)
both are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zods.data.batch import WEIGHTS, describe, num_examples

IGNORE_INDEX = -100  # transformers' mark for a token that is not scored

_CHUNK_ELEMENTS = 1 << 24  # logits turned into float32 at a time: 64 MiB
# what stays in its cache: seven times faster there for bfloat16 logits
_CHUNK_ELEMENTS_ON_CPU = 1 << 20


@dataclass(frozen=True)
class Objective:
    """The denominator of a mean loss, and the alignment of the model's labels.

    mean: "tokens" or "examples". shifted: position t predicts label t + 1, so that a row's first
    label never counts (causal language models); otherwise position t predicts label t (masked
    language models, encoder-decoders). own: the model gives a loss that is not the cross entropy of
    its logits, so that the losses of single examples are not known.
    """

    mean: str = "tokens"
    shifted: bool = True
    own: bool = False


PLAIN = Objective()


def batch_loss(outputs: Any, batch: Any, objective: Objective = PLAIN) -> Tensor:
    """The mean loss of a model's outputs on a batch, over what `loss_count` counts.

    The model's own loss is taken where there is one: `outputs` itself when it is a 0-d tensor, the
    first element of a tuple when that is a 0-d tensor, or the entry (or attribute) `loss`. Where
    that is the plain cross entropy of a classification rounded to 16 bits, as transformers takes it
    in the dtype of the logits, it is taken again in float32: the rounding would swallow the
    difference of two nearby points. A mean over the examples of a batch with several is taken from
    the logits.

    Where the model gives no loss, it is the cross entropy of `logits` against `batch["labels"]`:
    logits (B, C) with labels (B,) are a classification; logits (B, L, V) with labels (B, L) a
    language model, aligned as `objective` says. A batch without any counted label gives NaN, as in
    transformers.

    Of a batch with weights it is the weighted mean, whatever loss the model gives; 0 where all
    weights are 0.

    Args:
        outputs: what the model's forward returned.
        batch: what it was given: a dict, or a tuple of tensors (which names no labels).

    Returns:
        0-d float64 tensor. Losses of tokens are float32, sums of them float64: so the cut of a batch does not show in how a
        sum is rounded.

    Raises:
        ValueError: neither a scalar loss nor logits with labels; or their shapes do not fit each other; or the mean over
            examples is wanted of a loss that the model gives for several at once.
    """
    loss = own_loss(outputs)
    logits, labels = _entry(outputs, "logits"), _entry(batch, "labels")
    if weights_of(batch) is not None:
        tiny = torch.finfo(torch.float64).tiny
        return weighted_sum(outputs, batch, objective) / loss_count(batch, objective).clamp(
            min=tiny
        )
    if loss is not None and not needs_rows(batch, objective):
        rounded = loss.dtype.itemsize < 4 and _is_classification(logits, labels)
        if rounded and torch.equal(functional.cross_entropy(logits, labels), loss):
            return functional.cross_entropy(logits.float(), labels).double()
        return loss.double()
    if loss is not None and objective.own:
        raise ValueError(refusal_of_examples(len(labels)))
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        raise ValueError(
            "the model's forward gives neither a loss nor logits with labels: "
            f"it returned {describe(outputs)} for a batch of {describe(batch)}; "
            "pass labels, or wrap the model so that forward returns a scalar loss"
        )
    sums, counts = row_sums(logits, labels, objective.shifted)
    if objective.mean == "tokens":
        return sums.sum() / counts.sum()
    return (sums / counts)[counts > 0].mean()


def loss_count(batch: Any, objective: Objective = PLAIN) -> Tensor:
    """Return the weight of a micro-batch among others: what the mean of `batch_loss` is taken over.
    0-d float64.

    tokens: the number of label tokens that count. examples: the number of examples with such a
    token. Of a batch with weights the sum of w_i n_i, or of w_i. Without integer labels it is the
    number of examples.
    """
    labels, weights = _entry(batch, "labels"), weights_of(batch)
    counts = label_counts(labels, objective.shifted)
    if counts is None:
        return torch.tensor(float(num_examples(batch)), dtype=torch.float64)
    if objective.mean == "examples":
        counts = counts > 0
    return counts.double().sum() if weights is None else (counts * weights.double()).sum()


def label_counts(labels: Any, shifted: bool = True) -> Tensor | None:
    """The number of labels that count in each row, (B,) int64; None where there are no integer
    labels.
    """
    if not isinstance(labels, Tensor) or labels.ndim == 0 or labels.is_floating_point():
        return None
    if labels.ndim == 2 and shifted:
        labels = labels[:, 1:]
    return (labels != IGNORE_INDEX).view(len(labels), -1).sum(1)


def own_loss(outputs: Any) -> Tensor | None:
    """The loss that a model gives, 0-d, or None.

    Raises ValueError where it gives another thing of that name.
    """
    first = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
    loss = first if isinstance(first, Tensor) and first.ndim == 0 else _entry(outputs, "loss")
    if loss is not None and not (isinstance(loss, Tensor) and loss.ndim == 0):
        found = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"the model's loss must be a 0-d tensor, the mean over the batch; it is {found}"
        )
    return loss


def other_labels(batch: dict[str, Any], logits: Tensor) -> list[dict[str, Any]]:
    """Batches with the inputs of this one and labels that show more of a loss: spread over the
    classes, some left out.

    logits: of the batch. Labels (B,) are spread over up to 16 classes, B of them to a batch. Of
    labels (B, L) those that count are spread over the classes, and where the first example has more
    than one, some of them no longer count. The end of its attention mask is cleared, for a loss
    that counts by the mask.
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


def needs_rows(batch: Any, objective: Objective) -> bool:
    """Whether a model's own loss, the mean over a batch's label tokens, is not the mean that is
    wanted.
    """
    labels = _entry(batch, "labels")
    return (
        objective.mean == "examples"
        and label_counts(labels) is not None
        and labels.ndim > 1
        and len(labels) > 1
    )


def refusal_of_examples(size: int) -> str:
    """Return the reason why a loss that the model gives for `size` examples at once cannot be part
    of a mean over examples.
    """
    return (
        f'zeroth_order.loss_mean: "examples" needs the loss of each example, but the model gives '
        f"one for {size} together, and "
        'it is not the cross entropy of its logits. Use "tokens", or '
        "train_micro_batch_size_per_gpu 1."
    )


def fits_cross_entropy(outputs: Any, batch: Any, shifted: bool) -> bool | None:
    """Whether a model's own loss is the cross entropy of its logits, but for rounding.

    None where that cannot be told: the batch has no label that counts.
    """
    loss, logits, labels = own_loss(outputs), _entry(outputs, "logits"), _entry(batch, "labels")
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
    """A batch whose rows have a label at their last position only, and one with a label at their
    first position, too.

    A model whose position t predicts label t + 1 gives one loss for both. None where labels are not
    integers (B, L).
    """
    labels = _entry(batch, "labels")
    if not isinstance(batch, Mapping) or label_counts(labels) is None or labels.ndim != 2:
        return None
    without = torch.full_like(labels, IGNORE_INDEX)
    without[:, -1] = labels.max().clamp(min=0)
    with_first = without.clone()
    with_first[:, 0] = without[:, -1]
    return {**batch, "labels": without}, {**batch, "labels": with_first}


def weights_of(batch: Any) -> Tensor | None:
    """The weights of a batch's examples, (B,), where it has some."""
    return batch.get(WEIGHTS) if isinstance(batch, Mapping) else None


def weighted_sum(outputs: Any, batch: Any, objective: Objective = PLAIN) -> Tensor:
    """The sum over a batch of each example's weight times its loss, 0-d float64.

    tokens: an example's loss is the sum over its label tokens; examples: their mean. An example of
    weight 0, or without any label token, counts nothing.

    Raises ValueError where the outputs have no logits, or no labels fit them.
    """
    logits, labels, weights = logits_of(outputs), _entry(batch, "labels"), weights_of(batch)
    if logits is None or not isinstance(labels, Tensor) or weights is None:
        raise ValueError(
            f"weights of examples need logits and labels; the model returned {describe(outputs)} "
            f"for {describe(batch)}"
        )
    sums, counts = row_sums(logits, labels, objective.shifted)
    counted = (weights != 0) & (counts > 0)
    losses = sums[counted] if objective.mean == "tokens" else sums[counted] / counts[counted]
    total = (losses * weights[counted]).sum()
    # where nothing counts no graph is made, but DeepSpeed's backward wants one, and ZeRO-3 one on
    # every rank
    return total if total.requires_grad else total + logits[:0].sum()


def row_sums(logits: Tensor, labels: Tensor, shifted: bool = True) -> tuple[Tensor, Tensor]:
    """The cross entropy of each row, summed over its label tokens, (B,) float64, and their numbers,
    (B,) int64.

    logits (B, C) with labels (B,), or (B, L, V) with (B, L), as in `batch_loss`. Raises ValueError
    for other shapes.
    """
    if _is_classification(logits, labels):
        losses = functional.cross_entropy(
            logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none"
        )
        return losses.double(), (labels != IGNORE_INDEX).long()
    if logits.ndim == 3 and labels.shape == logits.shape[:2]:
        log_likelihood, num_tokens = sequence_log_likelihood(logits, labels, shifted)
        return -log_likelihood, num_tokens
    raise ValueError(_misfit(logits, labels))


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each example, (B,) float32: the mean over its own labelled tokens, NaN where it
    has none.

    Shapes and errors as in `row_sums`.
    """
    sums, counts = row_sums(logits, labels)
    return (sums / counts).float()


def _misfit(logits: Tensor, labels: Tensor) -> str:
    return (
        f"logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(labels.shape)} "
        f"and {labels.dtype}; "
        "allowed are (B, C) with integer labels (B,), and (B, L, V) with (B, L); "
        "for another objective, return a scalar loss from forward"
    )


def _is_classification(logits: Any, labels: Any) -> bool:
    """Logits (B, C) with integer labels (B,)."""
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        return False
    return logits.ndim == 2 and labels.shape == logits.shape[:1] and not labels.is_floating_point()


def logits_of(outputs: Any) -> Tensor | None:
    """The logits among a model's outputs: the entry or attribute of that name, or a tensor that is
    all there is.
    """
    found = outputs if isinstance(outputs, Tensor) and outputs.ndim else _entry(outputs, "logits")
    return found if isinstance(found, Tensor) else None


def sequence_log_likelihood(
    logits: Tensor, labels: Tensor, shifted: bool = True
) -> tuple[Tensor, Tensor]:
    """Per row, the sum of the labelled tokens' log-probabilities, and their number.

    log p(row) = sum over t with labels[t + 1] != -100 of log softmax(logits[t])[labels[t + 1]], in
    float32; where not `shifted`, of log softmax(logits[t])[labels[t]] over t with labels[t] !=
    -100. Only labelled positions are looked at, some at a time, so that there is never a float32
    copy of all logits. Infinities and NaN in the logits of a labelled position pass through to its
    row.

    Args:
        logits: (B, L, V), any floating dtype.
        labels: (B, L), int64; -100 where a token is not scored. Where shifted, a row's first label has no predecessor and
            never is.

    Returns:
        (B,) float64 sums of float32 log-probabilities, and (B,) int64 counts.
    """
    # (B, L)
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) if shifted else labels
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
        parts.append(
            -functional.cross_entropy(
                rows.float(), wanted[part], ignore_index=IGNORE_INDEX, reduction="none"
            )
        )
    token_log_probs = torch.zeros(targets.numel(), dtype=torch.float32, device=logits.device)
    if parts:
        token_log_probs[slice(None) if chosen is None else chosen] = torch.cat(parts)
    return token_log_probs.view_as(targets).sum(1, dtype=torch.float64), num_tokens


def _entry(container: Any, name: str) -> Any:
    return container.get(name) if isinstance(container, Mapping) else getattr(container, name, None)
