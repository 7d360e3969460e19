"""Evaluation batches that need more than one forward: candidates to score, text to generate.

A task's `collate_eval` returns one of these in place of the inputs of a single forward.
`zods.forward.dataset_metrics` runs it. Parameters may be sharded over the ranks, so all ranks make
the same number of forwards, and no forward has more sequences than a micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zods.data.generation import Decoding, NextLogits, Outputs, Prompts, Recomputed, generate
from zods.data.objectives import sequence_log_likelihood


def whole_logits(outputs: Outputs, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of all positions, and the labels."""
    return outputs(inputs)["logits"], labels


@dataclass(frozen=True)
class Forwards:
    """The forwards of a model on this rank.

    Attributes:
        outputs: maps the inputs of a forward to the model's outputs.
        micro_batch: largest number of sequences of a forward.
        largest: maps a number to the largest of the numbers of all ranks; collective.
        next_logits: how generation computes logits, for `outputs` and prompts.
        labelled_logits: how logits are computed for labels, for `outputs`, inputs and labels; see
            `zods.forward.labelled_logits.LabelledLogits`.
    """

    outputs: Outputs
    micro_batch: int
    largest: Callable[[int], int] = int
    next_logits: Callable[[Outputs, Prompts], NextLogits] = Recomputed
    labelled_logits: Callable[[Outputs, dict[str, Any], Tensor], tuple[Tensor, Tensor]] = (
        whole_logits
    )


class SeveralForwards(ABC):
    """Inputs that are evaluated in several forwards. A subclass is a dataclass of tensors."""

    @abstractmethod
    def run(self, forwards: Forwards) -> Any:
        """Make the forwards. Returns what the task's `measure` takes as outputs. Collective."""


@dataclass(frozen=True)
class Candidates(SeveralForwards):
    """Sequences whose labelled tokens are scored.

    Attributes:
        input_ids, attention_mask: (S, L) int64, padded on the right.
        labels: (S, L) int64, -100 where a token is not scored.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def run(self, forwards: Forwards) -> dict[str, Tensor]:
        """Score the sequences.

        Returns `log_likelihood`, (S,) float64 sums over the labelled tokens, and `num_tokens`, (S,)
        int64.
        """
        size, total = forwards.micro_batch, len(self.input_ids)
        scored = []
        for number in range(forwards.largest(-(-total // size))):
            start = number * size
            # A rank that is done repeats its first part, for the other ranks.
            part = slice(start, start + size) if start < total else slice(size)
            mask = self.attention_mask[part]
            length = int(mask.sum(1).max())
            inputs = {
                "input_ids": self.input_ids[part, :length],
                "attention_mask": mask[:, :length],
            }
            found = forwards.labelled_logits(forwards.outputs, inputs, self.labels[part, :length])
            if start < total:
                scored.append(sequence_log_likelihood(*found))
        log_likelihood, num_tokens = (torch.cat(column) for column in zip(*scored, strict=True))
        return {"log_likelihood": log_likelihood, "num_tokens": num_tokens}


@dataclass(frozen=True)
class Generation(SeveralForwards):
    """Prompts that are continued greedily, and right answers that are scored.

    Attributes:
        input_ids, attention_mask: (B, L) int64, the prompts, padded on the right.
        answers: the prompts with their right answers.
        max_new_tokens: most tokens that are generated.
        end, pad: ids of the end-of-sequence token and of padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answers: Candidates
    max_new_tokens: int
    end: int
    pad: int

    def run(self, forwards: Forwards) -> dict[str, Tensor]:
        """Score the answers and continue the prompts.

        Returns the entries of `Candidates.run`, and `generated`, (B, T) int64, padded after the end
        of sequence.
        """
        scored = self.answers.run(forwards)
        prompts = Prompts(self.input_ids, self.attention_mask)
        decoding = Decoding(self.max_new_tokens, self.end, self.pad)
        logits = forwards.next_logits(forwards.outputs, prompts)
        return {**scored, "generated": generate(logits, decoding, forwards.largest)}
