"""Instruction tuning: a response follows a prompt.

Conversations of several turns are the task `zods.tasks.sequences.Chat`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from zods.tasks.formats import NO_RESPONSE, PairFormat
from zods.tasks.prompts import (
    Template,
    answer_labels,
    collate_answers,
    fit_prompt,
    leading_special_tokens,
    measure_answers,
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
class Instruction:
    """Train by cross entropy on the tokens of the response and the end-of-sequence token.

    A prompt that is too long is truncated on the left; the cue before the response is kept. A
    response that still does not fit is truncated on the right, without an end-of-sequence token,
    and the prompt keeps up to half of the length.

    Attributes:
        data_format: how prompt and response are read from a row; the template's fields are then
            {prompt} and {response}. None: the template's fields are columns of text.
        skips_empty: whether rows with an empty response are left out; otherwise one is a mistake.
    """

    name: ClassVar[str] = "instruction"
    predicts_next_token: ClassVar[bool] = True
    tokenizer: PreTrainedTokenizerBase
    template: Template
    max_length: int
    pad_id: int
    data_format: PairFormat | None = None
    skips_empty: bool = False

    def __post_init__(self) -> None:
        """Check the tokenizer and the length.

        Raises ValueError for a tokenizer without an end-of-sequence token, and for a max_length
        that leaves no token for the response.
        """
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no eos token to end a response; set tokenizer.eos_token"
            )
        needed = len(leading_special_tokens(self.tokenizer)) + self._num_cue_tokens() + 1
        if self.max_length < needed:
            raise ValueError(
                f"max_length {self.max_length} is too short for the end of the template and a "
                f"token of the response; they need {needed} tokens. Raise max_length"
            )

    def auto_class(self) -> type[Any]:
        return AutoModelForCausalLM

    def model_kwargs(self) -> dict[str, Any]:
        return {}

    def mistakes(self, dataset: datasets.Dataset) -> Iterator[tuple[int, str]]:
        if self.data_format is not None:
            yield from self.data_format.mistakes(dataset)
            return
        check_text_columns(dataset, [*self.template.columns, self.template.answer])
        yield from text_mistakes(dataset, self.template.columns)
        yield from text_mistakes(dataset, [self.template.answer], may_be_empty=self.skips_empty)

    def prepare(
        self,
        dataset: datasets.Dataset,
        row_name: str = "row",
        beside: Mapping[str, Sequence[Any]] | None = None,
    ) -> datasets.Dataset:
        """Tokenise the rows: `input_ids` and `num_answer_tokens`.

        `input_ids` are the prompt, the response and the end of sequence; `num_answer_tokens` counts
        the last two.
        """
        check_rows(self, [(dataset, row_name)])
        return map_rows(dataset, self.make_rows, self.max_length, row_name, beside)

    def make_rows(self, batch: Columns) -> Columns:
        if self.data_format is not None:
            batch = self.data_format.texts(batch)
        start = leading_special_tokens(self.tokenizer)
        limit = self.max_length - len(start)
        num_cue_tokens = self._num_cue_tokens()
        responses = [[response or ""] for response in batch[self.template.answer]]
        columns: Columns = {
            "input_ids": [],
            "num_answer_tokens": [],
            "truncated": [],
            "answer_cut": [],
        }
        fitted = []
        tokenized = tokenize_continuations(self.tokenizer, self.template.prompts(batch), responses)
        for prompt, (response,) in tokenized:
            answer = [*response, self.tokenizer.eos_token_id]
            columns["truncated"].append(len(prompt) + len(answer) > limit)
            columns["answer_cut"].append(len(answer) > limit - min(num_cue_tokens, len(prompt)))
            if columns["answer_cut"][-1]:
                answer = answer[: limit - min(max(num_cue_tokens, limit // 2), len(prompt))]
            fitted.append(fit_prompt(start, prompt, limit - len(answer)))
            columns["input_ids"].append(fitted[-1] + answer)
            columns["num_answer_tokens"].append(len(answer))
        if self.skips_empty:
            columns["skipped"] = ["" if text.strip() else NO_RESPONSE for (text,) in responses]
        return {**columns, "unusable": unusable(fitted)}

    def _num_cue_tokens(self) -> int:
        """Count the tokens that end every prompt.

        One token before them is counted too, because the cue may have merged with it.
        """
        return num_tokens(self.tokenizer, self.template.cue) + 1

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Collate `input_ids`, `attention_mask` and `labels`, all (B, L)."""
        return collate_answers(rows, self.pad_id)

    def collate_eval(self, rows: Sequence[Row]) -> tuple[dict[str, Tensor], Tensor]:
        """Collate (inputs (B, L), the number of answer tokens (B,))."""
        inputs = pad_inputs([row["input_ids"] for row in rows], self.pad_id)
        return inputs, torch.tensor([row["num_answer_tokens"] for row in rows])

    def measure(
        self, outputs: Any, inputs: dict[str, Tensor], targets: Tensor
    ) -> dict[str, tuple[float, float]]:
        """Sum the loss and the accuracy over the examples.

        An example's loss is its mean negative log-likelihood per answer token. Its accuracy is the
        share of answer tokens predicted.
        """
        return measure_answers(outputs["logits"], answer_labels(inputs, targets))
