"""Tasks on one sequence of tokens, some of them labelled: conversations, and plain text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from zods.data.objectives import IGNORE_INDEX
from zods.tasks.chat import ChatTemplate
from zods.tasks.formats import NO_RESPONSE, ConversationFormat, TextFormat, text_of
from zods.tasks.prompts import leading_special_tokens, measure_answers
from zods.tasks.task import Columns, Row, check_rows, map_rows, pad_inputs, pad_right


@dataclass(frozen=True)
class _LabelledTokens(ABC):
    """The common part of the tasks on labelled sequences.

    A sequence that is too long is truncated on the right: its first tokens are kept. A row without
    a label among them is left out.
    """

    name: ClassVar[str] = "instruction"
    predicts_next_token: ClassVar[bool] = True
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    pad_id: int

    def auto_class(self) -> type[Any]:
        return AutoModelForCausalLM

    def model_kwargs(self) -> dict[str, Any]:
        return {}

    @abstractmethod
    def mistakes(self, dataset: datasets.Dataset) -> Iterator[tuple[int, str]]: ...

    @abstractmethod
    def make_rows(self, batch: Columns) -> Columns: ...

    def prepare(
        self,
        dataset: datasets.Dataset,
        row_name: str = "row",
        beside: Mapping[str, Sequence[Any]] | None = None,
    ) -> datasets.Dataset:
        """Tokenise the rows: `input_ids` and `labels`, -100 where a token is not labelled."""
        check_rows(self, [(dataset, row_name)])
        return map_rows(dataset, self.make_rows, self.max_length, row_name, beside)

    def _row(self, ids: list[int], labels: list[int], unusable: str = "") -> Row:
        """One row of `make_rows`. A row's first label is never predicted, so it does not count."""
        skipped = ""
        if not unusable and all(label == IGNORE_INDEX for label in labels[1 : self.max_length]):
            is_cut = any(label != IGNORE_INDEX for label in labels[1:])
            skipped = f"no label in {self.max_length} tokens" if is_cut else NO_RESPONSE
        return {
            "input_ids": ids[: self.max_length],
            "labels": labels[: self.max_length],
            "truncated": len(ids) > self.max_length and not skipped,
            "skipped": skipped,
            "unusable": unusable,
        }

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Collate `input_ids`, `attention_mask` and `labels`, all (B, L)."""
        inputs, labels = self.collate_eval(rows)
        return {**inputs, "labels": labels}

    def collate_eval(self, rows: Sequence[Row]) -> tuple[dict[str, Tensor], Tensor]:
        """Collate (inputs (B, L), labels (B, L))."""
        inputs = pad_inputs([row["input_ids"] for row in rows], self.pad_id)
        return inputs, pad_right([row["labels"] for row in rows], IGNORE_INDEX)

    def measure(
        self, outputs: Any, inputs: dict[str, Tensor], targets: Tensor
    ) -> dict[str, tuple[float, float]]:
        """Sum the loss and the token accuracy over the examples, as `Instruction` does."""
        return measure_answers(outputs["logits"], targets)


@dataclass(frozen=True)
class Chat(_LabelledTokens):
    """Train by cross entropy on the assistant's turns of a conversation."""

    template: ChatTemplate
    data_format: ConversationFormat

    def mistakes(self, dataset: datasets.Dataset) -> Iterator[tuple[int, str]]:
        yield from self.data_format.mistakes(dataset)

    def make_rows(self, batch: Columns) -> Columns:
        names = list(batch)
        rows = []
        for values in zip(*batch.values(), strict=True):
            messages = self.data_format.read(dict(zip(names, values, strict=True)))
            try:
                rows.append(self._row(*self.template.tokenize(messages)))
            except ValueError as error:
                rows.append(self._row([], [], unusable=str(error)))
        return {name: [row[name] for row in rows] for name in rows[0]}


@dataclass(frozen=True)
class PlainText(_LabelledTokens):
    """Train by cross entropy on all tokens of a text and the end-of-sequence token."""

    data_format: ClassVar[TextFormat] = TextFormat()

    def __post_init__(self) -> None:
        """Raise ValueError for a tokenizer without an end-of-sequence token."""
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no eos token to end a text; set tokenizer.eos_token"
            )

    def mistakes(self, dataset: datasets.Dataset) -> Iterator[tuple[int, str]]:
        yield from self.data_format.mistakes(dataset)

    def make_rows(self, batch: Columns) -> Columns:
        start = leading_special_tokens(self.tokenizer)
        texts = [text_of(value) for value in batch[self.data_format.column]]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        rows = []
        for text, ids in zip(texts, encoded["input_ids"], strict=True):
            tokens = [*ids, self.tokenizer.eos_token_id]
            labels = tokens if text.strip() else [IGNORE_INDEX] * len(tokens)
            rows.append(self._row(start + tokens, [IGNORE_INDEX] * len(start) + labels))
        return {name: [row[name] for row in rows] for name in rows[0]}
