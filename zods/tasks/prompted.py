"""Classification by a language model: the label's word follows a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from zods.data.objectives import sequence_log_likelihood
from zods.tasks.labels import Labels
from zods.tasks.prompts import (
    Template,
    answer_labels,
    collate_answers,
    fit_prompt,
    leading_special_tokens,
    num_tokens,
    tokenize_continuations,
    unusable,
)
from zods.tasks.task import (
    Columns,
    Row,
    check_rows,
    check_text_columns,
    map_rows,
    pad_inputs,
    text_mistakes,
)


@dataclass(frozen=True)
class Prompted:
    """Train by cross entropy on the tokens of the right label word.

    The prediction is the word with the highest mean log-probability. A prompt that is too long is
    truncated on the left, after the tokenizer's leading special token. The end of the prompt, with
    the cue before the label, is kept.
    """

    name: ClassVar[str] = "prompted"
    predicts_next_token: ClassVar[bool] = True
    tokenizer: PreTrainedTokenizerBase
    template: Template
    labels: Labels
    max_length: int
    pad_id: int

    def __post_init__(self) -> None:
        """Check the label words and the length.

        Raises ValueError for words without tokens or with the same tokens, and for a max_length
        that is too short for the cue and a word.
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

    def prepare(self, dataset: datasets.Dataset, row_name: str = "row") -> datasets.Dataset:
        """Tokenise the rows: `prompt`, `words` and `answer`.

        `prompt` holds token ids, `words` the token ids of each label's word, and `answer` the
        label's id.
        """
        check_rows(self, [(dataset, row_name)])
        return map_rows(dataset, self._make_rows, self.max_length, row_name)

    def _make_rows(self, batch: Columns) -> Columns:
        start = leading_special_tokens(self.tokenizer)
        texts = self.template.prompts(batch)
        columns: Columns = {"prompt": [], "words": [], "truncated": []}
        tokenized = tokenize_continuations(self.tokenizer, texts, [self.labels.names] * len(texts))
        for prompt, words in tokenized:
            limit = self.max_length - len(start) - max(map(len, words))
            columns["prompt"].append(fit_prompt(start, prompt, limit))
            columns["words"].append(words)
            columns["truncated"].append(len(prompt) > limit)
        answers = self.labels.ids(batch[self.labels.column])
        return {**columns, "answer": answers, "unusable": unusable(columns["prompt"])}

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Collate `input_ids`, `attention_mask` and `labels`, all (B, L).

        A row is the prompt and the right word. Only the word is labelled.
        """
        words = [row["words"][row["answer"]] for row in rows]
        answers = [
            {"input_ids": row["prompt"] + word, "num_answer_tokens": len(word)}
            for row, word in zip(rows, words, strict=True)
        ]
        return collate_answers(answers, self.pad_id)

    def collate_eval(self, rows: Sequence[Row]) -> tuple[dict[str, Tensor], Tensor]:
        """Collate (inputs (B W, L), targets (B, 1 + W)), with W words per row.

        The inputs are each row with each of the words, row by row. The targets are the index of the
        right word, and the number of tokens of each word.
        """
        inputs = pad_inputs(
            [row["prompt"] + word for row in rows for word in row["words"]], self.pad_id
        )
        return inputs, torch.tensor([[row["answer"], *map(len, row["words"])] for row in rows])

    def measure(
        self, outputs: Any, inputs: dict[str, Tensor], targets: Tensor
    ) -> dict[str, tuple[float, float]]:
        """Sum the loss and the accuracy over the examples.

        An example's loss is the mean negative log-likelihood per token of the right word. Its
        accuracy is 1 where the right word has the best score.
        """
        answers, num_word_tokens = targets[:, 0], targets[:, 1:]
        labels = answer_labels(inputs, num_word_tokens.flatten())
        log_likelihood, counts = sequence_log_likelihood(outputs["logits"], labels)
        scores = (log_likelihood / counts).view(num_word_tokens.shape)  # (B, W)
        loss = -scores.gather(1, answers[:, None]).sum()
        num_correct = (scores.argmax(1) == answers).sum()
        return {"loss": (loss.item(), len(answers)), "accuracy": (float(num_correct), len(answers))}
