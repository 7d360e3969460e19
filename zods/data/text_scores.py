"""Objectives of generated text: a score of each example's greedy answer, which training raises.

The prompt of an example is its tokens before the first label, so every batch for a causal language
model that labels only answers can be used. The references are the batch's entry
"example_references", a list of texts for each example, or else the text of its first labelled part:
a conversation has more of them, which answer later prompts. The loss of an example is minus its
score; `zods.data.scores` says why the scores need no baseline.

`zods.forward.generated_scores` generates the texts at the points of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from typing import Any

import torch
from torch import Tensor

from zods.data.answer_metrics import exact_match, token_f1
from zods.data.batch import REFERENCES, describe
from zods.data.generation import Decoding, Prompts
from zods.data.scores import IGNORE_INDEX, checked_scores, imported_function

# (texts, references of each text) -> scores (B,)
TextScore = Callable[[list[str], list[list[str]]], Tensor]


def _first_lines(metric: Callable[[str, Sequence[str]], float]) -> TextScore:
    """The score of the first line of each text by a metric, as the task `Answers` measures it."""

    def score(texts: list[str], references: list[list[str]]) -> Tensor:
        pairs = zip(texts, references, strict=True)
        values = [metric(text.partition("\n")[0], of_text) for text, of_text in pairs]
        return torch.tensor(values, dtype=torch.float64)

    return score


TEXT_SCORES: dict[str, TextScore] = {
    "exact_match": _first_lines(exact_match),
    "f1": _first_lines(token_f1),
}


def find_text_score(name: str) -> TextScore:
    """The score with a name: "exact_match", "f1", or a function as "package.module:name".

    The function is called as function(texts, references) and returns scores (B,). A text is the
    generated answer up to the end of sequence, without spaces at its ends; the references of a text
    are a list of texts. It is called once for each point of a step and each group of rows.

    Raises ValueError where there is no such function.
    """
    if name in TEXT_SCORES:
        return TEXT_SCORES[name]
    function = imported_function(name)

    def score(texts: list[str], references: list[list[str]]) -> Tensor:
        return checked_scores(function(texts, references), name, len(texts))

    return score


@dataclass(frozen=True)
class TextObjective:
    """Scores of texts that a model generates from the prompts of a batch.

    score: see `find_text_score`. tokenizer: decodes tokens, and has an end-of-sequence token.
    max_new_tokens: most tokens of a text.
    """

    score: TextScore
    tokenizer: Any
    max_new_tokens: int

    @property
    def decoding(self) -> Decoding:
        end = self.tokenizer.eos_token_id
        return Decoding(self.max_new_tokens, end=end, pad=end)

    def scores(self, tokens: Tensor, references: list[list[str]]) -> Tensor:
        """The scores (B,) float64 of generated tokens (B, T), on their device."""
        end, texts = self.tokenizer.eos_token_id, []
        for row in tokens.tolist():
            kept = row[: row.index(end)] if end in row else row
            texts.append(self._text(kept))
        return self.score(texts, references).to(tokens.device)

    def references(self, batch: Mapping[str, Any]) -> list[list[str]]:
        """The references of each example of a batch."""
        given = batch.get(REFERENCES)
        if given is not None:
            return [list(of_example) for of_example in given]
        end = self.tokenizer.eos_token_id
        answers = [_first_labelled(row) for row in batch["labels"].tolist()]
        return [[self._text([token for token in row if token != end])] for row in answers]

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _first_labelled(labels: list[int]) -> list[int]:
    """The labels from the first one that counts up to the next one that does not.

    >>> _first_labelled([-100, 5, 6, -100, 7])
    [5, 6]
    """
    rest = dropwhile(lambda label: label == IGNORE_INDEX, labels)
    return list(takewhile(lambda label: label != IGNORE_INDEX, rest))


def prompts_of(batch: Any) -> Prompts:
    """The tokens of each example before its first label, padded on the right.

    Raises ValueError where the batch does not have them.
    """
    entries = batch if isinstance(batch, Mapping) else {}
    ids, labels, mask = map(entries.get, ("input_ids", "labels", "attention_mask"))
    if (
        not (isinstance(ids, Tensor) and isinstance(labels, Tensor))
        or labels.ndim != 2
        or ids.shape != labels.shape
    ):
        raise ValueError(
            "zeroth_order.generate: a prompt is the part of input_ids (B, L) before the first label "
            f"of labels (B, L); found {describe(batch)}. Give such batches."
        )
    kept = labels.ne(IGNORE_INDEX).cumsum(1) == 0
    if mask is not None:
        kept &= mask != 0
    lengths = kept.sum(1)
    if not int(lengths.min()):
        raise ValueError(
            "zeroth_order.generate: an example has no prompt, because its first token has a label. "
            "Set the labels of prompts to -100."
        )
    width = int(lengths.max())
    order = (~kept).long().argsort(dim=1, stable=True)[:, :width]
    columns = torch.arange(width, device=ids.device)
    return Prompts(ids.gather(1, order), (columns < lengths[:, None]).long())
