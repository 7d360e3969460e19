"""A causal language model whose first blocks are frozen, and run once for each sequence.

With `methods.py --blocks K` only the last K blocks are trained. What enters them does not change
during a run, so it is kept (in the model's dtype, 70 kB for 60 tokens of SmolLM2-135M). Logits are
computed only where a label follows. For SmolLM2-135M and K = 8 a forward takes about a fifth.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

IGNORE_INDEX = -100


def only_labelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add `positions` (B, W) to a right-padded batch, and shorten `labels` to (B, W).

    W is one more than the largest number of labelled tokens of a row, which are its last ones. The
    logits at positions[:, j] predict labels[:, j + 1].
    """
    ends = batch["attention_mask"].sum(1, keepdim=True)
    width = int((batch["labels"] != IGNORE_INDEX).sum(1).max()) + 1
    positions = (ends - width + torch.arange(width)).clamp(min=0)
    return {**batch, "positions": positions, "labels": batch["labels"].gather(1, positions)}


class LastBlocks(nn.Module):
    """The last blocks of a Llama-like model, its final norm and its head.

    The model's parameters keep their names, except for the numbers of the blocks.
    """

    def __init__(self, model: PreTrainedModel, num_blocks: int) -> None:
        """`model` gives away its first blocks."""
        super().__init__()
        self.config = model.config
        self.prefix = _prefix(model, num_blocks)
        model.model.layers = model.model.layers[-num_blocks:]
        self.model, self.lm_head = model.model, model.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> CausalLMOutput:
        """Compute the logits (B, W, V) at `positions` (B, W), or at all positions (B, L, V)."""
        inputs = self.prefix(input_ids, attention_mask).to(self.model.norm.weight.dtype)
        outputs = self.model(inputs_embeds=inputs, attention_mask=attention_mask)
        hidden = outputs.last_hidden_state
        if positions is not None:
            hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self.lm_head(hidden)
        if labels is None:
            return CausalLMOutput(logits=logits)
        return CausalLMOutput(
            loss=cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()),
            logits=logits,
        )


def _prefix(model: PreTrainedModel, num_blocks: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The call that maps right-padded tokens (B, L) to the last blocks' inputs (B, L, width)."""
    first: Any = copy.deepcopy(model.model).eval()
    first.layers, first.norm = first.layers[:-num_blocks], nn.Identity()
    found: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def prefix(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        lengths = attention_mask.sum(1).tolist()
        keys = [
            tuple(row[:length]) for row, length in zip(input_ids.tolist(), lengths, strict=True)
        ]
        for key in keys:
            if key not in found:
                found[key] = first(input_ids=torch.tensor([key])).last_hidden_state[0]
        rows = pad_sequence([found[key] for key in keys], batch_first=True)
        return nn.functional.pad(rows, (0, 0, 0, input_ids.shape[1] - rows.shape[1]))

    return prefix
