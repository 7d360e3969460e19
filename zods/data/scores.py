"""Objectives without gradients: a score of each example, which training raises.

A zeroth-order step needs losses at points only, so any number that can be computed from a model's
outputs can be optimised, such as accuracy (Malladi et al. 2023, arXiv:2305.17333, section 3.3). The
loss of an example is minus its score. Scores need no baseline: an estimate uses only the difference
of the scores of one example at the two points of a pair, in which whatever does not depend on the
point drops out, also the mean over the other points of a group that leaves this one out.
`zods.data.text_scores` has the scores of generated texts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zods.data.batch import CANDIDATES, describe

IGNORE_INDEX = -100  # label of a token that is not scored, as in transformers

# (logits, batch with labels, whether position t predicts label t + 1) -> scores (B,)
Score = Callable[[Tensor, Mapping[str, Any], bool], Tensor]


def right_labels(logits: Tensor, labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """Which labels have the highest logit, and which count, both bool (B,) or (B, L).

    logits (B, C) with labels (B,), or (B, L, V) with (B, L). With `shifted` the results are
    (B, L - 1).
    """
    if labels.ndim == 2 and shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits.argmax(-1) == labels, labels != IGNORE_INDEX


def accuracy(logits: Tensor, batch: Mapping[str, Any], shifted: bool) -> Tensor:
    """1 for an example whose label tokens all have the highest logit, else 0."""
    right, counts = right_labels(logits, batch["labels"], shifted)
    scores = (right | ~counts).view(len(right), -1).all(1).double()
    return scores.where(_finite(logits), torch.nan)


def token_accuracy(logits: Tensor, batch: Mapping[str, Any], shifted: bool) -> Tensor:
    """The share of an example's label tokens that have the highest logit."""
    right, counts = (
        x.view(len(logits), -1) for x in right_labels(logits, batch["labels"], shifted)
    )
    scores = (right & counts).sum(1).double() / counts.sum(1).clamp(min=1)
    return scores.where(_finite(logits), torch.nan)


def candidates(logits: Tensor, batch: Mapping[str, Any], shifted: bool) -> Tensor:
    """The log-probability of an example's label token among its candidates alone.

    It is log softmax over the logits of the tokens batch[CANDIDATES] (B, W), at the one labelled
    position (Gao et al. 2021, arXiv:2012.15723, equation 1). Minus this score is a cross entropy:
    smooth, and never negative.

    Raises ValueError where the batch has no candidates, and where a row with a label does not have
    its label's token once among them.
    """
    if CANDIDATES not in batch:
        raise ValueError(
            f'zeroth_order.objective: "candidates" needs the entry {CANDIDATES!r} of a batch, the '
            "tokens of each example's candidates (B, W); the batch is "
            f"{describe(batch)}. Use zods.finetune with label words, or add the entry in collate_fn."
        )
    labels = batch["labels"]
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    rows = torch.arange(len(labels), device=labels.device)
    at = (labels != IGNORE_INDEX).int().argmax(1)
    of_candidates = logits[rows, at].gather(1, batch[CANDIDATES]).float().log_softmax(1)
    is_right = batch[CANDIDATES] == labels[rows, at][:, None]
    wrong = (is_right.sum(1) != 1) & (labels != IGNORE_INDEX).any(1)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise ValueError(
            f'zeroth_order.objective: "candidates": row {row} of a batch has the label token '
            f"{int(labels[row, at[row]])}, and the candidates {batch[CANDIDATES][row].tolist()}. Give "
            "the label's token once among them, and no padding."
        )
    return of_candidates.where(is_right, 0.0).sum(1).double()


def _finite(logits: Tensor) -> Tensor:
    """Whether the logits of each example have no NaN, bool (B,): others have no highest one."""
    return ~logits.view(len(logits), -1).isnan().any(1)


SCORES: dict[str, Score] = {
    "accuracy": accuracy,
    "token_accuracy": token_accuracy,
    "candidates": candidates,
}


def find_score(name: str) -> Score:
    """The score with a name: a key of SCORES, or a function as "package.module:name".

    The function is called as function(outputs, batch), with outputs["logits"], and returns scores
    (B,). Both are on the device. It is called once for each point of a step.

    Raises ValueError where there is no such function.
    """
    if name in SCORES:
        return SCORES[name]
    function = imported_function(name)

    def score(logits: Tensor, batch: Mapping[str, Any], shifted: bool) -> Tensor:
        return checked_scores(function({"logits": logits}, batch), name, len(logits))

    return score


def imported_function(name: str) -> Callable[..., Any]:
    """The function with the name "package.module:name". Raises ValueError where there is none."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f'zeroth_order.objective: "{name}" cannot be imported ({error}). Give the name of a '
            "function that Python finds from the folder of the run, such as "
            '"package.module:function".'
        ) from None
    if not callable(function):
        raise ValueError(
            f'zeroth_order.objective: "{name}" is {type(function).__name__}, expected a function.'
        )
    return function


def checked_scores(found: Any, name: str, number: int) -> Tensor:
    """The result of a user's function as float64, detached.

    Raises ValueError where it is not a tensor of one score for each of `number` examples.
    """
    if not isinstance(found, Tensor) or found.shape != (number,):
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f'zeroth_order.objective: "{name}" returned {what} for {number} examples, '
            f"expected a tensor of shape ({number},): the score of each example."
        )
    return found.detach().to(torch.float64)
