"""Sequence classification: one or two texts in, one label out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from zods.tasks.labels import Labels
from zods.tasks.metrics import confusion_counts
from zods.tasks.task import (
    Columns,
    Row,
    check_rows,
    check_text_columns,
    map_rows,
    pad_inputs,
    pad_right,
    text_mistakes,
)


@dataclass(frozen=True)
class Classification:
    """Train by cross entropy over the labels.

    Texts longer than `max_length` are truncated by the tokenizer.

    Attributes:
        text_columns: one column, or two for text pairs.
        pad_id: see `pad_token_id`.
        has_token_types: whether the model has embeddings of token types. Some models without them
            (GPT-2) accept `token_type_ids` and embed them as words, so the tokenizer's output
            cannot decide this.
        metric: "accuracy", or a metric that `with_derived` computes from counts of predictions.
    """

    name: ClassVar[str] = "classification"
    predicts_next_token: ClassVar[bool] = False
    tokenizer: PreTrainedTokenizerBase
    text_columns: tuple[str, ...]
    labels: Labels
    max_length: int
    pad_id: int
    has_token_types: bool
    metric: str = "accuracy"

    def auto_class(self) -> type[Any]:
        return AutoModelForSequenceClassification

    def model_kwargs(self) -> dict[str, Any]:
        """The labels, and the pad token, by which a decoder model finds its last token."""
        return {
            "num_labels": len(self.labels.names),
            "id2label": dict(enumerate(self.labels.names)),
            "label2id": {name: i for i, name in enumerate(self.labels.names)},
            "pad_token_id": self.pad_id,
        }

    def mistakes(self, dataset: datasets.Dataset) -> Iterator[tuple[int, str]]:
        check_text_columns(dataset, self.text_columns, [self.labels.column])
        yield from text_mistakes(dataset, self.text_columns)
        yield from self.labels.mistakes(dataset)

    def prepare(
        self,
        dataset: datasets.Dataset,
        row_name: str = "row",
        beside: Mapping[str, Sequence[Any]] | None = None,
    ) -> datasets.Dataset:
        """Tokenise the rows: `input_ids`, `answer` (the label's id) and maybe `token_type_ids`.

        `token_type_ids` are there where both the tokenizer and the model have them.
        """
        check_rows(self, [(dataset, row_name)])
        return map_rows(dataset, self._make_rows, self.max_length, row_name, beside)

    def _make_rows(self, batch: Columns) -> Columns:
        texts = [batch[column] for column in self.text_columns]
        options = {
            "return_attention_mask": False,
            "return_token_type_ids": None
            if self.has_token_types
            else False,  # None: as the tokenizer does
            "verbose": False,
        }
        encoded = self.tokenizer(*texts, **options)
        columns = {key: list(values) for key, values in encoded.items()}
        too_long = [len(ids) > self.max_length for ids in columns["input_ids"]]
        if any(too_long):
            cut = self.tokenizer(
                *(list(compress(column, too_long)) for column in texts),
                truncation=True,
                max_length=self.max_length,
                **options,
            )
            for key, values in cut.items():
                for row, value in zip(
                    compress(range(len(too_long)), too_long), values, strict=True
                ):
                    columns[key][row] = value
        return {
            **columns,
            "answer": self.labels.ids(batch[self.labels.column]),
            "truncated": too_long,
        }

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Collate `input_ids`, `attention_mask`, `token_type_ids` (B, L) and `labels` (B,).

        `token_type_ids` are there where the rows have them.
        """
        inputs, answers = self.collate_eval(rows)
        return {**inputs, "labels": answers}

    def collate_eval(self, rows: Sequence[Row]) -> tuple[dict[str, Tensor], Tensor]:
        """Collate (inputs (B, L), labels (B,))."""
        inputs = pad_inputs([row["input_ids"] for row in rows], self.pad_id)
        if "token_type_ids" in rows[0]:
            inputs["token_type_ids"] = pad_right([row["token_type_ids"] for row in rows], 0)
        return inputs, torch.tensor([row["answer"] for row in rows])

    def measure(
        self, outputs: Any, inputs: dict[str, Tensor], targets: Tensor
    ) -> dict[str, tuple[float, float]]:
        """Sum the cross entropy and the accuracy of logits (B, num_labels)."""
        logits = outputs["logits"].float()
        loss = functional.cross_entropy(logits, targets, reduction="sum")
        predictions, size = logits.argmax(1), len(targets)
        return {
            "loss": (loss.item(), size),
            "accuracy": (float((predictions == targets).sum()), size),
            **confusion_counts(
                self.metric, targets.tolist(), predictions.tolist(), len(self.labels.names)
            ),
        }
