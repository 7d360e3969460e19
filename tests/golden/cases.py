"""The cases whose results this folder keeps: directions, and short runs of a tiny model.

`make.py` writes the results; tests/unit/test_golden.py and tests/distributed/test_golden.py read
them. The model and the data are made by arithmetic, not by a random number generator, so that every
version of torch makes the same ones. A case does not change: its files would have to be written
again. Add a case instead.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import zods
from tests.distributed.models import configuration
from zods.core.directions import Direction
from zods.kernels import reference

FOLDER = Path(__file__).parent
DIRECTIONS = FOLDER / "directions.json"
BASE, RUNS_FOLDER = FOLDER / "base", FOLDER / "runs"
AFTER = "after.safetensors"  # the last weights, in the folder of a run

# --- directions -----------------------------------------------------------------------------------

NUMEL = 1000
KINDS = {
    "gaussian": Direction("gaussian"),
    "rademacher": Direction("rademacher"),
    "low_rank of rank 1": Direction("low_rank", 1),
    "low_rank of rank 4": Direction("low_rank", 4),
}
OUTPUTS = {  # coefficient, dtype, rounding seed; 0.3, so that elements of +1 and -1 are rounded too
    "float32": (1.0, torch.float32, None),
    "bfloat16, nearest": (0.3, torch.bfloat16, None),
    "bfloat16, stochastic": (0.3, torch.bfloat16, 99),
}
SEEDS = (0, 2**64 - 1, 0xDEADBEEF12345678)


@dataclass(frozen=True)
class Matrix:
    """A parameter as a direction knows it."""

    ordinal: int
    shape: tuple[int, ...] = (2**30, 37)


# Element 2^34 is where the number of a Gaussian block passes 2^32.
LOCATIONS = ((Matrix(0), 0), (Matrix(7), 13), (Matrix(2**31 - 1), 2**34 - 500))


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


def digests_of_directions() -> dict[str, str]:
    """A digest of every case's direction, made by the backend that serves CPU tensors."""
    found = {}
    for (kind, direction), (output, (coefficient, dtype, rounding_seed)) in itertools.product(
        KINDS.items(), OUTPUTS.items()
    ):
        for seed, (parameter, offset) in zip(SEEDS, LOCATIONS, strict=True):
            out = torch.empty(NUMEL, dtype=dtype)
            direction.combine_(
                out,
                parameter,
                offset,
                seeds=[seed],
                coefficients=[coefficient],
                rounding_seed=rounding_seed,
            )
            found[f"{kind}, {output}, seed {seed}"] = digest(out)
    return found


def digest_of_words() -> str:
    """A digest of the Philox words of the reference, for every seed, place and stream."""
    blocks = torch.cat([torch.arange(64), 2**32 - 32 + torch.arange(64), 2**45 + torch.arange(64)])
    words: list[Tensor] = []
    for seed, (parameter, _), stream in itertools.product(
        SEEDS, LOCATIONS, reference.STREAMS.values()
    ):
        words += reference.philox(blocks, parameter.ordinal, stream, seed)
    return digest(torch.stack(words))


# --- runs -----------------------------------------------------------------------------------------

WORDS, WIDTH, INNER = 11, 6, 9
# two steps to an epoch; a refresh of the anchor every three steps
BATCH, STEPS, SAVED_AT = 12, 7, 5
MEZO = {
    "method": "mezo",
    "eps": 1e-2,
    "lr": 2e-2,
    "seed": 7,
    "weight_decay": 0.3,
    "num_directions": 2,
}
SVRG = {
    "method": "mezo_svrg",
    "eps": 1e-2,
    "lr": 0.1,
    "seed": 7,
    "anchor_interval": 3,
    "anchor_lr": 0.2,
}


@dataclass(frozen=True)
class GoldenRun:
    """One run whose log and last weights are kept.

    num_ranks: the number of ranks that made it. arguments: of `configuration`. is_saved: whether
    its checkpoint after SAVED_AT steps is kept, too.
    """

    num_ranks: int
    arguments: dict[str, Any]
    is_saved: bool = False


RUNS = {
    # logs of format 1 and checkpoints of format 2
    "mezo": GoldenRun(
        2, {**MEZO, "bf16": True, "direction": {"distribution": "low_rank", "rank": 2}}
    ),
    "mezo_svrg": GoldenRun(
        2,
        {
            **SVRG,
            "anchor": {"point": "cpu", "gradient": "cpu"},
            "anchor_directions": 2,
            "anchor_split": False,
        },
        is_saved=True,
    ),
    "mezo_svrg_one_rank": GoldenRun(
        1,
        {**SVRG, "anchor": {"point": "terms", "gradient": "cpu"}, "weight_decay": 0.3},
        is_saved=True,
    ),
    "mezo_svrg_terms": GoldenRun(
        2,
        {
            **SVRG,
            "bf16": True,
            "stage": 0,
            "anchor": {"point": "cpu", "gradient": "terms"},
            "direction": "rademacher",
            "share_direction": False,
        },
    ),
    # a log whose header describes all examples, and whose records name the code; a checkpoint of
    # format 3, which names its files
    "mezo_svrg_described": GoldenRun(
        2,
        {
            **SVRG,
            "anchor": {"point": "cpu", "gradient": "cpu"},
            "anchor_directions": 2,
            "anchor_split": False,
        },
        is_saved=True,
    ),
    # each rank had directions of its own, which later are groups of its 6 examples
    "mezo_per_rank": GoldenRun(
        2,
        {
            **MEZO,
            "direction": {"distribution": "low_rank", "rank": 2},
            "examples_per_direction": 6,
        },
    ),
    # bfloat16 coefficients, the size of the estimates and the measured weight of the anchor
    "mezo_svrg_groups": GoldenRun(
        2,
        {
            **SVRG,
            "lr": 0.01,
            "anchor_lr": 0.01,
            "anchor_directions": 4,
            "anchor_weight": "auto",
            "normalize": True,
            "examples_per_direction": 5,
        },
        is_saved=True,
    ),
}


class Small(nn.Module):
    """A classifier of words with a tied head and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.hidden = nn.Linear(WIDTH, INNER)
        self.norm = nn.LayerNorm(INNER)
        self.back = nn.Linear(INNER, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            for ordinal, parameter in enumerate(self.parameters()):
                values = torch.arange(parameter.numel()) * 37 + ordinal * 11
                parameter.copy_((values % 101 / 101 - 0.5).view(parameter.shape))

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = torch.tanh(self.frozen(self.embed(ids).mean(1)))
        logits = self.head(x + self.back(torch.tanh(self.norm(self.hidden(x))))).float()
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def examples() -> list[dict[str, Tensor]]:
    ids = (torch.arange(24 * 4) ** 2 * 5 + torch.arange(24 * 4) * 3).view(24, 4) % WORDS
    return [{"ids": row, "labels": row[0]} for row in ids]


def build(name: str) -> Any:
    """An engine of the run `name`, on the ranks that call it, before its first step."""
    config = configuration(BATCH, **RUNS[name].arguments)
    return zods.initialize(model=Small(), config=config, training_data=examples())[0]
