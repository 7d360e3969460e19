"""A model whose loss of an example has the same bits in any batch, with data and methods for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SECTION = {"method": "mezo", "eps": 1e-2, "lr": 1e-2, "seed": 5}
METHODS: dict[str, dict[str, Any]] = {
    "mezo": {"method": "mezo", "num_directions": 2},
    "mezo, low rank": {"method": "mezo", "direction": {"distribution": "low_rank", "rank": 2}},
    "svrg": {"method": "mezo_svrg", "anchor_interval": 3, "anchor_directions": 4},
}


class RowByRow(nn.Module):
    """A classifier whose logits of an example have the same bits in any batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 16))
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        # without a loss: zods adds up the losses of single examples, in float64
        return {"logits": (x[:, None] * self.weight).sum(-1) + self.bias}


def row_data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {"x": torch.randn(16, generator=generator), "labels": torch.tensor(i % 5)}
        for i in range(36)
    ]
