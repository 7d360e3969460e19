"""Greedy generation: prompts are continued by the token with the highest logit.

Two ways give the logits of the next tokens. `Recomputed` runs a forward over the whole sequences
for every token. `Cached` runs the prompts once, and then one forward of one position per row, with
the keys and values that the model returned before. Both take prompts that are padded on the right,
and give the same logits up to rounding.

Callers: evaluations (`zods.data.evaluation`), and training steps on generated texts
(`zods.forward.generated_scores`). What decides on the cache is `zods.forward.cached_generation`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

# maps the inputs of a forward to the model's outputs
Outputs = Callable[[dict[str, Any]], Any]
CACHE_ARGUMENTS = frozenset({"use_cache", "past_key_values"})


class Prompts(NamedTuple):
    """Prompts, padded on the right. input_ids, attention_mask: (B, L) int64."""

    input_ids: Tensor
    attention_mask: Tensor

    def rows(self, rows: Sequence[int]) -> Prompts:
        """Some of the prompts, with repetitions, without columns that are padding in all of them."""
        chosen = torch.tensor(rows, device=self.input_ids.device)
        mask = self.attention_mask[chosen]
        length = int(mask.sum(1).max())
        return Prompts(self.input_ids[chosen, :length], mask[:, :length])


class Decoding(NamedTuple):
    """When generation ends.

    max_new_tokens: most tokens of a row. end: id of the end-of-sequence token. pad: id that follows
    the end of a row.
    """

    max_new_tokens: int
    end: int
    pad: int


class NextLogits(Protocol):
    """Logits of the next tokens of sequences that grow."""

    def __call__(self, tokens: Tensor | None) -> Tensor:
        """Append tokens (B,) to the sequences, none in the first call; return logits (B, V)."""
        ...


class Recomputed:
    """Logits of the next tokens, each from a forward over the whole sequences."""

    def __init__(self, outputs: Outputs, prompts: Prompts) -> None:
        self._outputs = outputs
        self._ids, self._mask = (tensor.clone() for tensor in prompts)
        self._rows = torch.arange(len(self._ids), device=self._ids.device)
        self._lengths = self._mask.sum(1)

    def __call__(self, tokens: Tensor | None) -> Tensor:
        if tokens is not None:
            if int(self._lengths.max()) == self._ids.shape[1]:
                self._ids = functional.pad(self._ids, (0, 1))
                self._mask = functional.pad(self._mask, (0, 1))
            self._ids[self._rows, self._lengths] = tokens
            self._mask[self._rows, self._lengths] = 1
            self._lengths = self._lengths + 1
        found = self._outputs({"input_ids": self._ids, "attention_mask": self._mask})
        # without the logits of virtual tokens, which prompt tuning puts before the sequences
        logits = found["logits"][:, -self._ids.shape[1] :]
        return logits[self._rows, self._lengths - 1]


class Cached:
    """Logits of the next tokens, from forwards with a cache of keys and values.

    Padding is moved to the left, so that the entries of a row are next to each other in the cache,
    as the window of a sliding attention counts them. Position ids are given to models that take
    them; other models count positions by the mask.
    """

    def __init__(self, outputs: Outputs, prompts: Prompts, arguments: Collection[str]) -> None:
        """arguments: names of the arguments that the model's forward takes."""
        self._outputs, self._arguments = outputs, arguments
        order = prompts.attention_mask.argsort(dim=1, stable=True)
        self._ids = prompts.input_ids.gather(1, order)
        self._mask = prompts.attention_mask.gather(1, order)
        self._cache: Any = None

    def __call__(self, tokens: Tensor | None) -> Tensor:
        """Raises ValueError where the model returns no cache."""
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        if tokens is not None:
            self._ids, positions = tokens[:, None], positions[:, -1:] + 1
            self._mask = functional.pad(self._mask, (0, 1), value=1)
        inputs = {"input_ids": self._ids, "attention_mask": self._mask, "use_cache": True}
        if "position_ids" in self._arguments:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self._arguments:
            inputs["logits_to_keep"] = 1
        if self._cache is not None:
            inputs["past_key_values"] = self._cache
        found = self._outputs(inputs)
        self._cache = found.get("past_key_values") if isinstance(found, Mapping) else None
        if self._cache is None:
            raise ValueError("the model returns no past_key_values")
        return found["logits"][:, -1]


def generate(
    next_logits: NextLogits,
    decoding: Decoding,
    largest: Callable[[int], int] = int,
) -> Tensor:
    """Continue prompts greedily, until all rows have ended.

    largest: maps a number to the largest of all ranks, for ranks that make the same number of
    forwards; collective.

    Returns tokens (B, T) int64, T at most `max_new_tokens`. A row has the end-of-sequence token if
    it ended, and then padding.
    """
    tokens: Tensor | None = None
    is_done: Tensor | None = None
    generated: list[Tensor] = []
    while len(generated) < decoding.max_new_tokens:
        if is_done is not None and not largest(int(not is_done.all())):
            break
        found = next_logits(tokens).argmax(-1)
        is_done = torch.zeros_like(found, dtype=torch.bool) if is_done is None else is_done
        tokens = found.masked_fill(is_done, decoding.pad)
        generated.append(tokens)
        is_done = is_done | (tokens == decoding.end)
    return torch.stack(generated, 1)


def largest_difference(first: NextLogits, second: NextLogits, steps: int) -> float:
    """The largest relative difference of two ways to compute the same logits, in some steps.

    Both get the tokens that the second one predicts. Every forward is made before the comparison:
    ranks that share parameters make the same ones.
    """
    differences: list[float] = []
    tokens: Tensor | None = None
    for _ in range(steps):
        found, expected = first(tokens).float(), second(tokens).float()
        tokens = expected.argmax(-1)
        differences.append(float((found - expected).norm() / expected.norm()))
    return max(differences)
