"""Multiple choice: each row has candidates of its own, of which one is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from zods.data.evaluation import Candidates
from zods.tasks.candidates import (
    candidate_rows,
    collate_candidates,
    collate_right_candidates,
    measure_candidates,
)
from zods.tasks.prompts import Template
from zods.tasks.task import Columns, Row, check_rows, check_text_columns, map_rows, text_mistakes

ROW_COLUMNS = ("f1", "exact")  # of each candidate, where the data have them


@dataclass(frozen=True)
class Options:
    """Train by cross entropy on the tokens of the right candidate.

    The template's answer names the column with the candidates, a list of texts. The column "answer"
    has the index of the right one. The columns "f1" and "exact", lists of numbers, may say how good
    each candidate is. Prompts are truncated on the left.

    Attributes:
        scoring: how candidates are compared, see `measure_candidates`.
    """

    name: ClassVar[str] = "options"
    predicts_next_token: ClassVar[bool] = True
    tokenizer: PreTrainedTokenizerBase
    template: Template
    max_length: int
    pad_id: int
    scoring: str = "mean"

    def auto_class(self) -> type[Any]:
        return AutoModelForCausalLM

    def model_kwargs(self) -> dict[str, Any]:
        return {}

    def mistakes(self, dataset: datasets.Dataset) -> Iterator[tuple[int, str]]:
        check_text_columns(dataset, self.template.columns, [self.template.answer, "answer"])
        yield from text_mistakes(dataset, self.template.columns)
        rows = zip(dataset[self.template.answer][:], dataset["answer"][:], strict=True)
        for position, (candidates, answer) in enumerate(rows):
            if candidates is None or len(candidates) < 2:
                yield position, "fewer than two candidates"
            elif any(text is None or not text.strip() for text in candidates):
                yield position, f"a blank candidate among {candidates!r:.100}"
            elif answer is None or not 0 <= answer < len(candidates):
                yield (
                    position,
                    f"the answer is {answer}; the candidates are 0 to {len(candidates) - 1}",
                )

    def prepare(
        self,
        dataset: datasets.Dataset,
        row_name: str = "row",
        beside: Mapping[str, Sequence[Any]] | None = None,
    ) -> datasets.Dataset:
        """Tokenise the rows: `prompt`, `words` (token ids of each candidate) and `answer`."""
        check_rows(self, [(dataset, row_name)])
        return map_rows(dataset, self._make_rows, self.max_length, row_name, beside)

    def _make_rows(self, batch: Columns) -> Columns:
        rows = candidate_rows(
            self.tokenizer,
            self.template.prompts(batch),
            batch[self.template.answer],
            max_length=self.max_length,
            cue=self.template.cue if self.scoring == "calibrated" else None,
        )
        kept = {name: batch[name] for name in ROW_COLUMNS if name in batch}
        return {**rows, **kept, "answer": batch["answer"]}

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Collate prompts with their right candidates, which alone are labelled, (B, L)."""
        return collate_right_candidates(rows, self.pad_id)

    def collate_eval(self, rows: Sequence[Row]) -> tuple[Candidates, dict[str, Tensor]]:
        return collate_candidates(rows, self.pad_id)

    def measure(self, outputs: Any, inputs: Any, targets: Any) -> dict[str, tuple[float, float]]:
        """Sum the loss, the accuracy and, where the data have it, the F1 over the examples."""
        return measure_candidates(outputs, targets, self.scoring)
