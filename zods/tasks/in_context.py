"""In-context learning: solved examples of the training data before each held-out prompt.

The examples stand one after the other with an empty line after each, as in MeZO's evaluation
(Malladi et al. 2023, arXiv:2305.17333). Caller: `zods.cli.prepared_data`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import datasets

from zods.tasks.answers import PROMPT, Answers
from zods.tasks.instruction import Instruction
from zods.tasks.options import Options
from zods.tasks.prompted import Prompted
from zods.tasks.prompts import leading_special_tokens, num_tokens
from zods.tasks.shots import draw_shots
from zods.tasks.task import Columns, Row, Task

logger = logging.getLogger(__name__)

EXAMPLES = "__examples__"  # column with the solved examples before a row's prompt, as one text
SEPARATOR = "\n\n"  # after each solved example


@dataclass(frozen=True)
class SolvedExamples:
    """Solved examples of a task, which stand before the prompts of other examples.

    Attributes:
        task: the task.
        texts: the examples, each a prompt with its right answer.
    """

    task: Prompted | Options | Answers
    texts: tuple[str, ...]

    @classmethod
    def draw(cls, task: Task, dataset: datasets.Dataset, shots: int, seed: int) -> SolvedExamples:
        """Draw solved examples of a dataset without mistakes by `seed`, their classes mixed.

        shots: number of examples of each class, or in all where the task has no label words.

        Raises ValueError where the answers of the task cannot be compared, and where the dataset or
        a class of it has fewer examples.
        """
        if not isinstance(task, (Prompted, Options, Answers)):
            raise ValueError(f"--icl: {_reason(task)}. Leave --icl out, or use a task with prompts")
        rows = draw_shots(task, dataset, shots, seed, "--icl").shuffle(seed=seed)[:]
        prompts = _asking(task).template.prompts(rows)
        solved = zip(prompts, _right_answers(task, rows), strict=True)
        return cls(task, tuple((prompt + answer).strip() for prompt, answer in solved))

    def before(
        self, dataset: datasets.Dataset, prepared: datasets.Dataset, row_name: str
    ) -> datasets.Dataset:
        """Prepare a dataset as the task does, with the solved examples before each prompt.

        Where not all of them fit into the task's `max_length`, beside a row's prompt and its
        longest answer, the last ones that fit stand there. A line of the log says how many.

        Args:
            prepared: the result of the task's `prepare` for the dataset.
            row_name: see `Task.prepare`.

        Raises ValueError where no example fits before any prompt.
        """
        asking = _asking(self.task)
        texts = list(accumulate(reversed(self.texts), lambda all_, text: text + SEPARATOR + all_))
        # The "a" stands for the prompt: some tokenizers divide a separator that a text follows.
        sizes = [num_tokens(asking.tokenizer, text + SEPARATOR + "a") for text in texts]
        counts = []
        for row in prepared:
            room = asking.max_length - _longest_sequence(self.task, row)
            counts.append(sum(size <= room for size in sizes))
        if not any(counts):
            raise ValueError(
                f"--icl: none of the {len(texts)} solved examples fits before a prompt; the last "
                f"one has {sizes[0]} tokens, and max_length is {asking.max_length}. Raise "
                "--max_length"
            )
        if min(counts) == len(texts):
            logger.info("--icl: %d solved examples before each prompt", len(texts))
        else:
            logger.warning(
                "--icl: %.1f of %d solved examples before a prompt on average: more do not fit "
                "into max_length %d",
                sum(counts) / len(counts),
                len(texts),
                asking.max_length,
            )
        column = [f"{texts[count - 1]}{SEPARATOR}" if count else "" for count in counts]
        return _with_examples(self.task).prepare(dataset.add_column(EXAMPLES, column), row_name)


def _reason(task: Task) -> str:
    """Why no solved examples can stand before the prompts of a task."""
    if task.name == "classification":
        return "a classification head reads no prompt"
    if isinstance(task, Instruction):
        return "the responses of instruction data are not generated and compared with right ones"
    return "a conversation, or a plain text, is no prompt with one right answer"


def _asking(task: Prompted | Options | Answers) -> Prompted | Options | Instruction:
    """The part of a task with the template."""
    return task.learning if isinstance(task, Answers) else task


def _with_examples(task: Prompted | Options | Instruction | Answers) -> Any:
    """The task with the column EXAMPLES before its prompts."""
    if isinstance(task, Answers):
        return replace(task, learning=_with_examples(task.learning))
    pieces = (("", EXAMPLES), *task.template.pieces)
    return replace(task, template=replace(task.template, pieces=pieces))


def _right_answers(task: Prompted | Options | Answers, rows: Columns) -> Sequence[str]:
    if isinstance(task, Prompted):
        return [task.labels.names[label] for label in task.labels.ids(rows[task.labels.column])]
    answers: Sequence = rows[_asking(task).template.answer]
    if isinstance(task, Answers):
        return answers
    return [texts[right] for texts, right in zip(answers, rows["answer"], strict=True)]


def _longest_sequence(task: Prompted | Options | Answers, row: Row) -> int:
    """Tokens of the longest sequence that is evaluated for a prepared row."""
    if not isinstance(task, Answers):
        return len(row["prompt"]) + max(map(len, row["words"]))
    start = leading_special_tokens(task.learning.tokenizer)
    generated = len(start) + len(row[PROMPT]) + task.num_generated
    return max(generated, len(row["input_ids"]))
