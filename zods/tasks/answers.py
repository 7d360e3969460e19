"""Questions with a text as answer, which is generated and compared with reference answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
from torch import Tensor

from zods.data.answer_metrics import exact_match, last_number_match, token_f1
from zods.data.batch import REFERENCES as OF_BATCH
from zods.data.evaluation import Candidates, Generation
from zods.tasks.instruction import Instruction
from zods.tasks.prompts import answer_labels, fit_prompt, leading_special_tokens
from zods.tasks.task import Row, pad_inputs

REFERENCES = "references"  # column with the right answers of a row, a list of texts
PROMPT = "prompt"  # column with the tokens of the prompt alone


def with_references(
    collate: Callable[[Sequence[Row]], dict[str, Any]],
) -> Callable[[Sequence[Row]], dict[str, Any]]:
    """A collate function whose batches have the references of rows that have them.

    The key is that of `zods.data.batch.REFERENCES`.
    """

    def collated(rows: Sequence[Row]) -> dict[str, Any]:
        given = {OF_BATCH: [row[REFERENCES] for row in rows]} if REFERENCES in rows[0] else {}
        return {**collate(rows), **given}

    return collated


@dataclass(frozen=True)
class Answers:
    """Train as `Instruction`, and evaluate by greedy generation.

    A generated answer ends at the end-of-sequence token, at the first line break, or, with the
    metric "last_number", where another question begins. The references are in the column REFERENCES, or else the response itself.

    Attributes:
        learning: the training on prompt and response.
        max_new_tokens: most tokens of a generated answer; never more than half of `max_length`.
            Prompts are truncated on the left to leave room for them.
        metric: "f1" for exact match and F1 of words, as in SQuAD's official script; "last_number"
            for exact match of the last number, as in GSM8K.
    """

    name: ClassVar[str] = "answers"
    predicts_next_token: ClassVar[bool] = True
    learning: Instruction
    max_new_tokens: int = 50
    metric: str = "f1"

    @property
    def num_generated(self) -> int:
        """Most tokens of a generated answer."""
        return max(1, min(self.max_new_tokens, self.learning.max_length // 2))

    def auto_class(self) -> type[Any]:
        return self.learning.auto_class()

    def model_kwargs(self) -> dict[str, Any]:
        return self.learning.model_kwargs()

    def mistakes(self, dataset: datasets.Dataset) -> Iterator[tuple[int, str]]:
        yield from self.learning.mistakes(dataset)

    def prepare(
        self,
        dataset: datasets.Dataset,
        row_name: str = "row",
        beside: Mapping[str, Sequence[Any]] | None = None,
    ) -> datasets.Dataset:
        """Tokenise the rows as `Instruction` does, and keep REFERENCES and the prompts alone."""
        if REFERENCES in dataset.column_names:
            references = dataset[REFERENCES][:]
        else:
            references = [[text] for text in dataset[self.learning.template.answer][:]]
        kept = {**(beside or {}), REFERENCES: references, PROMPT: self._prompts(dataset)}
        return self.learning.prepare(dataset, row_name, kept)

    def _prompts(self, dataset: datasets.Dataset) -> list[list[int]]:
        """The tokens of each prompt alone, without spaces at its end.

        The prompt of a training row may end one token earlier, where a token spans its end and the
        beginning of the right answer.
        """
        columns = self.learning.template.columns
        prompts: list[list[int]] = []
        for batch in dataset.select_columns(list(columns)).iter(batch_size=1000):
            # rows without a text are reported by `prepare`
            filled = {name: [text or "" for text in texts] for name, texts in batch.items()}
            texts = [text.rstrip(" ") for text in self.learning.template.prompts(filled)]
            prompts += self.learning.tokenizer(texts, add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
        return prompts

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Collate `input_ids`, `attention_mask` and `labels`, all (B, L)."""
        return self.learning.collate(rows)

    def collate_eval(self, rows: Sequence[Row]) -> tuple[Generation, dict[str, Any]]:
        """Collate (prompts and right answers, the references of each row)."""
        answers, counts = self.learning.collate_eval(rows)
        start = leading_special_tokens(self.learning.tokenizer)
        limit = self.learning.max_length - self.num_generated - len(start)
        prompts = [fit_prompt(start, row[PROMPT], limit) for row in rows]
        generation = Generation(
            **pad_inputs(prompts, self.learning.pad_id),
            answers=Candidates(**answers, labels=answer_labels(answers, counts)),
            max_new_tokens=self.num_generated,
            end=self.learning.tokenizer.eos_token_id,
            pad=self.learning.pad_id,
        )
        return generation, {REFERENCES: [row[REFERENCES] for row in rows]}

    def measure(self, outputs: Any, inputs: Any, targets: Any) -> dict[str, tuple[float, float]]:
        """Sum the loss of the right answers, and the metrics of the generated ones.

        "accuracy" is the exact match.
        """
        losses = -outputs["log_likelihood"] / outputs["num_tokens"]
        pairs = list(zip(self._texts(outputs["generated"]), targets[REFERENCES], strict=True))
        size = float(len(pairs))
        found = {"loss": (losses.sum().item(), size)}
        if self.metric == "last_number":
            return {**found, "accuracy": (sum(last_number_match(*pair) for pair in pairs), size)}
        return {
            **found,
            "accuracy": (sum(exact_match(*pair) for pair in pairs), size),
            "f1": (sum(token_f1(*pair) for pair in pairs), size),
        }

    def _texts(self, generated: Tensor) -> list[str]:
        """The generated answers, up to where they end."""
        tokenizer, texts = self.learning.tokenizer, []
        for tokens in generated.tolist():
            end = tokenizer.eos_token_id
            kept = tokens[: tokens.index(end)] if end in tokens else tokens
            text = str(tokenizer.decode(kept, skip_special_tokens=True)).strip()
            if self.metric != "last_number":
                texts.append(text.partition("\n")[0])
            elif question := self.learning.template.pieces[0][0].strip():
                # a model that was not trained goes on with another question
                texts.append(text.partition(f"\n{question}")[0])
            else:
                texts.append(text)
        return texts
