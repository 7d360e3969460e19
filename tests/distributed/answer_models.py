"""Prompts with answers, and models that compute logits at given positions, rightly or wrongly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.distributed.zoo import CLASSIFIERS, ZOO, zoo_batch, zoo_model

CAUSAL = [name for name in ZOO if name not in (*CLASSIFIERS, "t5", "bert, masked", "mamba")]
LENGTH = 12
# the labels of the rows end at 12, 9, 10 and 12 tokens, and there are two of each row
ENDS = (12, 9, 10, 12)
NUM_POSITIONS = 6  # before a label, and the last one


def prompted_batch(name: str, weighted: bool = False) -> dict[str, Tensor]:
    """Four rows padded on the right, of which the last two tokens have labels."""
    batch = zoo_batch(name, length=LENGTH)
    positions, ends = torch.arange(LENGTH), torch.tensor(ENDS)[:, None]
    batch["attention_mask"] = (positions < ends).long()
    is_answer = (positions < ends) & (positions >= ends - 2)
    batch["labels"] = batch["input_ids"].where(is_answer, -100)
    weights = {"example_weights": torch.tensor([1.0, 0.0, 2.0, 0.5])} if weighted else {}
    return {**batch, **weights}


class IgnoresPositions(nn.Module):
    """A model that takes positions, and returns all logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo_model("llama")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        logits_to_keep: Any = 0,
    ) -> Any:
        self.before(logits_to_keep)
        outputs = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return self.after(outputs, logits_to_keep)

    def before(self, positions: Any) -> None:
        """Look at the positions before the forward of the inner model."""

    def after(self, outputs: Any, positions: Any) -> Any:
        """Return the outputs for the positions."""
        return outputs


class TakesTheFirst(IgnoresPositions):
    """A model that returns as many logits as it is given positions, but others."""

    def after(self, outputs: Any, positions: Any) -> Any:
        if isinstance(positions, Tensor):
            outputs.logits = outputs.logits[:, : len(positions)]
        return outputs


class TakesANumber(IgnoresPositions):
    """A model that takes the number of the last positions alone."""

    def before(self, positions: Any) -> None:
        if not isinstance(positions, int):
            raise TypeError("logits_to_keep is no number")


class RefusesAtTheEnd(IgnoresPositions):
    """A model that refuses positions when its parameters have been gathered."""

    def after(self, outputs: Any, positions: Any) -> Any:
        if isinstance(positions, Tensor):
            raise TypeError("logits_to_keep is a tensor")
        return outputs
