"""The loss of a global batch.

The loss does not depend on how the batch is split into micro-batches and ranks. Every micro-batch
gives its mean loss (`batch_loss`) and the count that the mean is taken over (`loss_count`). Over
all micro-batches and ranks, the objective is sum(count * mean) / sum(count).
`Objective.loss_mean` is one of

tokens    The sum of the losses of all label tokens, divided by the number of label tokens; the same
          as transformers computes with `num_items_in_batch`.
examples  The sum over examples of each example's mean over its own label tokens, divided by the
          number of examples with a label token.

Labels of -100 do not count. With weights w_i of examples, the objective is
sum_i w_i sum_t loss_it / sum_i w_i n_i for tokens, and sum_i w_i mean_i / sum_i w_i for examples.
For labels of one dimension (classes) both means are the same. With `Objective.score`, the loss of
an example is minus its score, and the mean is over examples. Called by the modules of
`zods.forward` and `zods.training`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zods.data.batch import WEIGHTS, describe, num_examples
from zods.data.scores import IGNORE_INDEX, Score

# Logits that are converted to float32 at a time: 64 MiB. On CPU, fewer: they then stay in the
# cache, which was seven times faster for bfloat16 logits.
_CHUNK_ELEMENTS = 1 << 24
_CHUNK_ELEMENTS_ON_CPU = 1 << 20


@dataclass(frozen=True)
class Objective:
    """Definition of the mean loss, and the alignment of the model's labels.

    loss_mean: "tokens" or "examples". shifted: position t predicts label t + 1, so that a row's
    first label never counts (causal language models); otherwise position t predicts label t (masked
    language models, encoder-decoders). own: the model returns a loss that is not the cross entropy
    of its logits, so that the losses of single examples are not known. score: takes the place of
    the cross entropy, see `zods.data.scores`.
    """

    loss_mean: str = "tokens"
    shifted: bool = True
    own: bool = False
    score: Score | None = None


PLAIN = Objective()


def batch_loss(outputs: Any, batch: Any, objective: Objective = PLAIN) -> Tensor:
    """The mean loss of a model's outputs on a batch, over the count of `loss_count`.

    If the model returns a loss, this loss is taken: `outputs` itself if it is a 0-d tensor, the
    first element of a tuple if this element is a 0-d tensor, or the entry (or attribute) `loss`.
    There are three exceptions:

    - A plain cross entropy of a classification in 16 bits is computed again in float32.
      transformers computes it in the dtype of the logits. The rounding to 16 bits would hide the
      difference between two nearby points.
    - The mean over examples of a batch with several examples is computed from the logits.
    - A batch with weights has the weighted mean, computed from the logits; 0 if all weights are 0.

    If the model returns no loss, the loss is the cross entropy of `logits` and `batch["labels"]`.
    Logits (B, C) with labels (B,) are a classification. Logits (B, L, V) with labels (B, L) are a
    language model, aligned as `objective` says. A batch without any counted label gives NaN, as in
    transformers.

    Args:
        outputs: the return value of the model's forward.
        batch: the batch that forward was given: a dict, or a tuple of tensors (without labels).

    Returns:
        0-d float64 tensor. Losses of tokens are float32 and their sums float64, so that the split
        of a batch does not change the rounding of a sum.

    Raises:
        ValueError: there is neither a scalar loss nor logits with labels; or the shapes of logits
            and labels do not fit; or the mean over examples is wanted, but the model returns one
            loss for several examples.
    """
    if objective.score is not None:
        return scored_losses(outputs, batch, objective)[0]
    loss = own_loss(outputs)
    logits, labels = entry(outputs, "logits"), entry(batch, "labels")
    if weights_of(batch) is not None:
        tiny = torch.finfo(torch.float64).tiny
        return weighted_sum(outputs, batch, objective) / loss_count(batch, objective).clamp(
            min=tiny
        )
    if loss is not None and not needs_row_losses(batch, objective):
        rounded = loss.dtype.itemsize < 4 and _is_classification(logits, labels)
        if rounded and torch.equal(functional.cross_entropy(logits, labels), loss):
            return functional.cross_entropy(logits.float(), labels).double()
        return loss.double()
    if loss is not None and objective.own:
        raise ValueError(refusal_of_examples(len(labels)))
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        raise ValueError(
            "the model's forward gives neither a loss nor logits with labels: it returned "
            f"{describe(outputs)} for a batch of {describe(batch)}; pass labels, or wrap the model "
            "so that forward returns a scalar loss"
        )
    return losses_of_logits(logits, labels, objective)[0]


def losses_of_logits(
    logits: Tensor, labels: Tensor, objective: Objective = PLAIN
) -> tuple[Tensor, Tensor]:
    """The mean loss of a batch without weights, and the losses of its rows.

    Returns (0-d float64, (B,) float64). The rows add up to the mean times the count of
    `loss_count`. Shapes and errors are as in `row_sums`.
    """
    sums, counts = row_sums(logits, labels, objective.shifted)
    if objective.loss_mean == "tokens":
        return sums.sum() / counts.sum(), sums
    means = sums / counts
    return means[counts > 0].mean(), torch.where(counts > 0, means, 0.0)


def scored_losses(outputs: Any, batch: Any, objective: Objective) -> tuple[Tensor, Tensor]:
    """Minus the scores of a batch, as `losses_of_scores` returns them.

    Raises ValueError if there are no logits or labels, or by the score.
    """
    logits, labels = logits_of(outputs), entry(batch, "labels")
    if logits is None or label_counts(labels, objective.shifted) is None:
        raise ValueError(
            "zeroth_order.objective: a score needs logits and integer labels; the model returned "
            f"{describe(outputs)} for {describe(batch)}"
        )
    assert objective.score is not None
    if logits.ndim == 3:  # without those of virtual tokens, as of prompt tuning
        logits = logits[:, -labels.shape[1] :]
    scores = objective.score(logits, batch, objective.shifted)
    return losses_of_scores(scores, batch, objective.shifted)


def losses_of_scores(
    scores: Tensor, batch: Mapping[str, Any], shifted: bool
) -> tuple[Tensor, Tensor]:
    """Minus the scores (B,) of a batch: their mean, 0-d float64, and those of its rows, (B,)
    float64.

    The rows add up to the mean times the count of `loss_count`, over examples. Weights multiply
    them, and rows without a label that counts are 0. The mean is NaN where no row counts.
    """
    counts, given = label_counts(batch["labels"], shifted), weights_of(batch)
    assert counts is not None
    weights = (counts > 0).double()
    if given is not None:
        weights *= given.double()
    rows = torch.where(weights != 0, -weights * scores, 0.0)
    return rows.sum() / weights.sum(), rows


def loss_count(batch: Any, objective: Objective = PLAIN) -> Tensor:
    """The count that the mean of `batch_loss` is taken over, 0-d float64.

    It is the weight of a micro-batch among others. tokens: the number of label tokens that count.
    examples: the number of examples with such a token. For a batch with weights it is the sum of
    w_i n_i (tokens) or of w_i (examples). Without integer labels it is the number of examples.
    """
    labels, weights = entry(batch, "labels"), weights_of(batch)
    counts = label_counts(labels, objective.shifted)
    if counts is None:
        return torch.tensor(float(num_examples(batch)), dtype=torch.float64)
    if objective.loss_mean == "examples":
        counts = counts > 0
    return counts.double().sum() if weights is None else (counts * weights.double()).sum()


def label_counts(labels: Any, shifted: bool = True) -> Tensor | None:
    """The number of labels that count in each row, (B,) int64; None without integer labels.

    >>> label_counts(torch.tensor([[7, 8, -100]]))  # the first label is never predicted
    tensor([1])
    """
    if not isinstance(labels, Tensor) or labels.ndim == 0 or labels.is_floating_point():
        return None
    if labels.ndim == 2 and shifted:
        labels = labels[:, 1:]
    return (labels != IGNORE_INDEX).view(len(labels), -1).sum(1)


def own_loss(outputs: Any) -> Tensor | None:
    """The loss that a model returns, 0-d; None without one.

    Raises ValueError if the output named `loss` is not a 0-d tensor.
    """
    first = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
    loss = first if isinstance(first, Tensor) and first.ndim == 0 else entry(outputs, "loss")
    if loss is not None and not (isinstance(loss, Tensor) and loss.ndim == 0):
        found = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"the model's loss must be a 0-d tensor, the mean over the batch; it is {found}. "
            "Return such a loss from forward"
        )
    return loss


def needs_row_losses(batch: Any, objective: Objective) -> bool:
    """Whether the loss of each row is needed.

    It is where the mean over examples is wanted, and the model returns a mean over tokens.
    """
    labels = entry(batch, "labels")
    return (
        objective.loss_mean == "examples"
        and label_counts(labels) is not None
        and labels.ndim > 1
        and len(labels) > 1
    )


def refusal_of_examples(size: int) -> str:
    """The error message for the mean over examples, where `size` examples have one loss."""
    return (
        'zeroth_order.loss_mean: "examples" needs the loss of each example, but the model gives '
        f"one for {size} together, and it is not the cross entropy of its logits. "
        'Use "tokens", or train_micro_batch_size_per_gpu 1.'
    )


def weights_of(batch: Any) -> Tensor | None:
    """The weights of a batch's examples, (B,); None without weights."""
    return batch.get(WEIGHTS) if isinstance(batch, Mapping) else None


def weighted_sum(outputs: Any, batch: Any, objective: Objective = PLAIN) -> Tensor:
    """The sum over a batch of each example's weight times its loss, 0-d float64.

    With "tokens" an example's loss is the sum over its label tokens, with "examples" the mean over
    them. An example of weight 0, or without any label token, contributes 0.

    Raises ValueError if logits or labels are missing, or their shapes do not fit.
    """
    logits, labels, weights = logits_of(outputs), entry(batch, "labels"), weights_of(batch)
    if logits is None or not isinstance(labels, Tensor) or weights is None:
        raise ValueError(
            f"weights of examples need logits and labels; the model returned {describe(outputs)} "
            f"for {describe(batch)}"
        )
    sums, counts = row_sums(logits, labels, objective.shifted)
    counted = (weights != 0) & (counts > 0)
    losses = sums[counted] if objective.loss_mean == "tokens" else sums[counted] / counts[counted]
    total = (losses * weights[counted]).sum()
    # If no example counts, the sum has no autograd graph. DeepSpeed's backward needs one, and
    # ZeRO-3 needs it on every rank.
    return total if total.requires_grad else total + logits[:0].sum()


def row_sums(logits: Tensor, labels: Tensor, shifted: bool = True) -> tuple[Tensor, Tensor]:
    """The cross entropy of each row, summed over its label tokens, and the number of label tokens.

    logits (B, C) with labels (B,), or (B, L, V) with (B, L), as in `batch_loss`. Returns (B,)
    float64 sums and (B,) int64 numbers. Raises ValueError for other shapes.
    """
    if _is_classification(logits, labels):
        losses = functional.cross_entropy(
            logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none"
        )
        return losses.double(), (labels != IGNORE_INDEX).long()
    if logits.ndim == 3 and labels.shape == logits.shape[:2]:
        log_likelihood, num_tokens = sequence_log_likelihood(logits, labels, shifted)
        return -log_likelihood, num_tokens
    raise ValueError(_shape_mismatch(logits, labels))


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each example, (B,) float32: the mean over its own label tokens.

    NaN for an example without label tokens. Shapes and errors are as in `row_sums`.
    """
    sums, counts = row_sums(logits, labels)
    return (sums / counts).float()


def _shape_mismatch(logits: Tensor, labels: Tensor) -> str:
    return (
        f"logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(labels.shape)} "
        f"and {labels.dtype}; allowed are (B, C) with integer labels (B,), and (B, L, V) with (B, "
        "L); for another objective, return a scalar loss from forward"
    )


def _is_classification(logits: Any, labels: Any) -> bool:
    """Whether these are logits (B, C) with integer labels (B,)."""
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        return False
    return logits.ndim == 2 and labels.shape == logits.shape[:1] and not labels.is_floating_point()


def logits_of(outputs: Any) -> Tensor | None:
    """The logits of a model's outputs: a single tensor, or the entry or attribute `logits`."""
    found = outputs if isinstance(outputs, Tensor) and outputs.ndim else entry(outputs, "logits")
    return found if isinstance(found, Tensor) else None


def sequence_log_likelihood(
    logits: Tensor, labels: Tensor, shifted: bool = True
) -> tuple[Tensor, Tensor]:
    """Per row, the sum of the labelled tokens' log-probabilities, and the number of these tokens.

    shifted: log p(row) = sum over t with labels[t + 1] != -100 of
    log softmax(logits[t])[labels[t + 1]]. Otherwise: log p(row) = sum over t with
    labels[t] != -100 of log softmax(logits[t])[labels[t]]. Both in float32.

    Only labelled positions count. They are processed in chunks, so that there is never a float32
    copy of all logits. An infinity or NaN in the logits of a labelled position propagates to its
    row.

    Args:
        logits: (B, L, V), any floating dtype. Those of virtual tokens before the row's own, as prompt
            tuning gives them, are left out.
        labels: (B, L), int64; -100 where a token is not scored. If shifted, a row's first label has
            no predecessor and is never scored.

    Returns:
        (B,) float64 sums of float32 log-probabilities, and (B,) int64 counts.
    """
    logits = logits[:, -labels.shape[1] :]
    # (B, L)
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) if shifted else labels
    counted = targets != IGNORE_INDEX
    num_tokens = counted.sum(1)
    elements = _CHUNK_ELEMENTS_ON_CPU if logits.device.type == "cpu" else _CHUNK_ELEMENTS
    chunk = max(1, elements // logits.shape[-1])
    # If most positions are labelled, all are processed: this avoids a copy of the labelled ones.
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


def entry(container: Any, name: str) -> Any:
    """The entry of a dict, or the attribute of another object, by name; None without one."""
    return container.get(name) if isinstance(container, Mapping) else getattr(container, name, None)
