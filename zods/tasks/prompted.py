"""Classification by a language model: the label's word follows a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from zods.data.batch import CANDIDATES
from zods.data.evaluation import Candidates
from zods.tasks.candidates import (
    candidate_rows,
    collate_candidates,
    collate_right_candidates,
    measure_candidates,
)
from zods.tasks.labels import Labels
from zods.tasks.prompts import (
    Template,
    leading_special_tokens,
    num_tokens,
    tokenize_continuations,
)
from zods.tasks.task import (
    Columns,
    Row,
    Task,
    check_rows,
    check_text_columns,
    map_rows,
    text_mistakes,
)

SEVERAL_TOKENS = "a label word is more than one token after this prompt (use the objective loss)"


@dataclass(frozen=True)
class Prompted:
    """Train by cross entropy on the tokens of the right label word, over the whole vocabulary, or
    over the label words alone.

    The prediction is the word with the best score. A prompt that is too long is
    truncated on the left, after the tokenizer's leading special token. The end of the prompt, with
    the cue before the label, is kept.

    Attributes:
        scoring: how label words are compared, see `measure_candidates`; by default by their mean
            log-probability per token.
        metric: "accuracy", or a further metric: "f1", "f1_macro" or "matthews".
        over_words: whether training batches have the tokens of all label words, for the objective
            "candidates". Each word must then be one token after its prompt.
    """

    name: ClassVar[str] = "prompted"
    predicts_next_token: ClassVar[bool] = True
    tokenizer: PreTrainedTokenizerBase
    template: Template
    labels: Labels
    max_length: int
    pad_id: int
    scoring: str = "mean"
    metric: str = "accuracy"
    over_words: bool = False

    def __post_init__(self) -> None:
        """Check the label words and the length.

        Raises ValueError for words without tokens or with the same tokens, for words of several
        tokens with `over_words`, and for a max_length that is too short for the cue and a word.
        """
        _, words = tokenize_continuations(
            self.tokenizer, ["a" + self.template.cue], [self.labels.names]
        )[0]
        seen: dict[tuple[int, ...], str] = {}
        for name, tokens in zip(self.labels.names, words, strict=True):
            if not name.strip() or not tokens:
                raise ValueError(
                    f"label word {name!r} has no tokens; give each label a word by label_words"
                )
            if tuple(tokens) in seen:
                raise ValueError(
                    f"label words {seen[tuple(tokens)]!r} and {name!r} have the same tokens "
                    f"{tokens}; give each label a word of its own by label_words"
                )
            seen[tuple(tokens)] = name
        several = [f"{name!r} ({len(tokens)})" for tokens, name in seen.items() if len(tokens) > 1]
        if self.over_words and several:
            raise ValueError(
                f"label words of several tokens: {', '.join(several)}. The cross entropy over the "
                'label words (objective "candidates") needs words of one token: give others by '
                'label_words, or use the objective "loss"'
            )
        needed = (
            len(leading_special_tokens(self.tokenizer))
            + num_tokens(self.tokenizer, self.template.cue)
            + 1
        )
        needed += max(map(len, words))
        if self.max_length < needed:
            raise ValueError(
                f"max_length {self.max_length} is too short for the end of the template and the "
                f"longest label word; they need {needed} tokens. Raise max_length"
            )

    def auto_class(self) -> type[Any]:
        return AutoModelForCausalLM

    def model_kwargs(self) -> dict[str, Any]:
        return {}

    def mistakes(self, dataset: datasets.Dataset) -> Iterator[tuple[int, str]]:
        check_text_columns(dataset, self.template.columns, [self.labels.column])
        yield from text_mistakes(dataset, self.template.columns)
        yield from self.labels.mistakes(dataset)

    def prepare(
        self,
        dataset: datasets.Dataset,
        row_name: str = "row",
        beside: Mapping[str, Sequence[Any]] | None = None,
    ) -> datasets.Dataset:
        """Tokenise the rows: `prompt`, `words` and `answer`.

        `prompt` holds token ids, `words` the token ids of each label's word, and `answer` the
        label's id.
        """
        check_rows(self, [(dataset, row_name)])
        return map_rows(dataset, self._make_rows, self.max_length, row_name, beside)

    def _make_rows(self, batch: Columns) -> Columns:
        texts = self.template.prompts(batch)
        rows = candidate_rows(
            self.tokenizer,
            texts,
            [self.labels.names] * len(texts),
            max_length=self.max_length,
            cue=self.template.cue if self.scoring == "calibrated" else None,
        )
        if self.over_words:
            rows["unusable"] = [
                reason or ("" if set(map(len, words)) == {1} else SEVERAL_TOKENS)
                for reason, words in zip(rows["unusable"], rows["words"], strict=True)
            ]
        return {**rows, "answer": self.labels.ids(batch[self.labels.column])}

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Collate `input_ids`, `attention_mask` and `labels`, all (B, L).

        A row is the prompt and the right word. Only the word is labelled. With `over_words` the
        entry CANDIDATES (B, number of labels) has the tokens of all words.
        """
        batch = collate_right_candidates(rows, self.pad_id)
        if self.over_words:
            batch[CANDIDATES] = torch.tensor([[token for (token,) in row["words"]] for row in rows])
        return batch

    def collate_eval(self, rows: Sequence[Row]) -> tuple[Candidates, dict[str, Tensor]]:
        return collate_candidates(rows, self.pad_id)

    def measure(self, outputs: Any, inputs: Any, targets: Any) -> dict[str, tuple[float, float]]:
        """Sum the loss, the accuracy and the counts for `metric`; see `measure_candidates`."""
        return measure_candidates(outputs, targets, self.scoring, self.metric)


def over_label_words(task: Task) -> Task:
    """The task with the cross entropy over its label words alone, for the objective "candidates".

    Raises ValueError where it has no label words, or words of several tokens.
    """
    if not isinstance(task, Prompted):
        raise ValueError(
            'zeroth_order.objective: "candidates" is the cross entropy over label words; the task '
            f'{task.name} has none. Use the objective "loss", or --task prompted'
        )
    return replace(task, over_words=True)
