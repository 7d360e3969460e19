"""Prepared rows with a prompt and candidate continuations, of which one is right.

Callers: the tasks `Prompted`, with the same candidates for all rows, and `Options`, with candidates
of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from zods.data.evaluation import Candidates
from zods.tasks.metrics import confusion_counts
from zods.tasks.prompts import (
    answer_labels,
    collate_answers,
    fit_prompt,
    leading_special_tokens,
    tokenize_continuations,
    unusable,
)
from zods.tasks.task import Columns, Row, pad_inputs

SCORINGS = ("mean", "sum", "calibrated")


def candidate_rows(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    *,
    max_length: int,
    cue: str | None,
) -> Columns:
    """Tokenise prompts with their candidates: `prompt`, `words`, `truncated` and `unusable`.

    `prompt` holds token ids, `words` the token ids of each candidate. A prompt that is too long is
    truncated on the left.

    Args:
        cue: the end of the prompt that is the same in all rows, for calibrated scores; None
            without. `bare_prompt` and `bare_words` are then the tokens of the cue alone and of the
            candidates after it.
    """
    start = leading_special_tokens(tokenizer)
    columns: Columns = {"prompt": [], "words": [], "truncated": []}
    for prompt, words in tokenize_continuations(tokenizer, prompts, candidates):
        limit = max_length - len(start) - max(map(len, words))
        columns["prompt"].append(fit_prompt(start, prompt, limit))
        columns["words"].append(words)
        columns["truncated"].append(len(prompt) > limit)
    columns["unusable"] = unusable(columns["prompt"])
    if cue is not None:
        # A model needs a token from which to predict the first one.
        text = cue if cue.strip() or start else "\n" + cue
        bare = tokenize_continuations(tokenizer, [text] * len(candidates), candidates)
        columns["bare_prompt"] = [start + prompt for prompt, _ in bare]
        columns["bare_words"] = [words for _, words in bare]
    return columns


def collate_right_candidates(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """Collate each prompt with its right candidate, which alone is labelled."""
    words = [row["words"][row["answer"]] for row in rows]
    answers = [
        {"input_ids": row["prompt"] + word, "num_answer_tokens": len(word)}
        for row, word in zip(rows, words, strict=True)
    ]
    return collate_answers(answers, pad_id)


def collate_candidates(rows: Sequence[Row], pad_id: int) -> tuple[Candidates, dict[str, Tensor]]:
    """Collate all candidates of all rows, row by row: (sequences to score, targets).

    The calibrating sequences of the rows, where there are any, follow all others. Targets are
    `answer` (B,), the index of the right candidate, `num_candidates` (B,), and (B, W) `f1` and
    `exact` of each candidate, where the rows have these. W is the largest number of candidates.
    """
    sequences = [(row["prompt"], word) for row in rows for word in row["words"]]
    if "bare_prompt" in rows[0]:
        sequences += [(row["bare_prompt"], word) for row in rows for word in row["bare_words"]]
    inputs = pad_inputs([prompt + word for prompt, word in sequences], pad_id)
    labels = answer_labels(inputs, torch.tensor([len(word) for _, word in sequences]))
    targets = {
        "answer": torch.tensor([row["answer"] for row in rows]),
        "num_candidates": torch.tensor([len(row["words"]) for row in rows]),
    }
    for name in {"f1", "exact"} & set(rows[0]):
        values = [torch.tensor(row[name], dtype=torch.float64) for row in rows]
        targets[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
    return Candidates(**inputs, labels=labels), targets


def measure_candidates(
    outputs: dict[str, Tensor], targets: dict[str, Tensor], scoring: str, metric: str = "accuracy"
) -> dict[str, tuple[float, float]]:
    """Sum the loss and the metrics over the examples.

    An example's loss is the mean negative log-likelihood per token of the right candidate. The
    prediction is the candidate with the best score:

    - mean: log p(candidate | prompt) per token;
    - sum: log p(candidate | prompt);
    - calibrated: log p(candidate | prompt) - log p(candidate | cue), so that a frequent candidate
      is not preferred in all rows (Holtzman et al. 2021, arXiv:2104.08315).

    Args:
        outputs: the result of `Candidates.run`.
        targets: from `collate_candidates`.
        metric: "accuracy", or a metric that `with_derived` computes from counts of predictions.
    """
    answers, num_candidates = targets["answer"], targets["num_candidates"]
    total = int(num_candidates.sum())
    log_likelihood, counts = outputs["log_likelihood"], outputs["num_tokens"]
    means = log_likelihood[:total] / counts[:total]
    scores = means if scoring == "mean" else log_likelihood[:total]
    if scoring == "calibrated":
        scores = scores - log_likelihood[total:]
    predictions = _by_row(scores, num_candidates).argmax(1)
    loss = -_by_row(means, num_candidates).gather(1, answers[:, None]).sum()
    right = (predictions == answers).double()
    if "exact" in targets:
        right = targets["exact"].gather(1, predictions[:, None])[:, 0]
    size = float(len(answers))
    metrics: dict[str, Any] = {"loss": (loss.item(), size), "accuracy": (right.sum().item(), size)}
    if "f1" in targets:
        metrics["f1"] = (targets["f1"].gather(1, predictions[:, None]).sum().item(), size)
        return metrics
    counted = confusion_counts(
        metric, answers.tolist(), predictions.tolist(), int(num_candidates.max())
    )
    return metrics | counted


def _by_row(values: Tensor, num_candidates: Tensor) -> Tensor:
    """Arrange the values of candidates (S,) by row: (B, W), -inf where a row has fewer."""
    widest = int(num_candidates.max())
    there = torch.arange(widest, device=values.device) < num_candidates[:, None]
    padded = values.new_full(there.shape, -torch.inf)
    padded[there] = values
    return padded
