"""Small models, data and configurations for the tests on several ranks.

Also functions that read the state of an engine.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import OPTConfig, OPTForCausalLM

from zods.kernels import combine_
from zods.training.engine import ZerothOrderEngine

VOCABULARY = 11
# with this width each of two ranks has more than 1 MiB per weight, which DeepSpeed needs for NVMe
WIDE = 1030
# a scheduler and a section "zeroth_order" whose state changes often
WARMUP = {
    "type": "WarmupLR",
    "params": {"warmup_max_lr": 2e-2, "warmup_num_steps": 12, "warmup_type": "linear"},
}
ANNEALED_SVRG = {
    "method": "mezo_svrg",
    "eps": 1e-2,
    "lr": 2e-2,
    "anchor_interval": 5,
    # The threshold is so low that annealing acts at the end of every epoch but the first.
    "anneal": {"alpha": 3.0, "threshold": 1e-3},
}


class Awkward(nn.Module):
    """Parameters of 1, 3, 5 and 7 elements, a tied, a frozen and a large one.

    The large one has more than 1 MiB on each of 4 ranks. DeepSpeed keeps only such parameters on
    NVMe.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.one = nn.Parameter(torch.randn(1))
        self.three = nn.Parameter(torch.randn(3))
        self.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.five = nn.Parameter(torch.randn(5))
        self.seven = nn.Parameter(torch.randn(7))
        self.big = nn.Parameter(torch.randn(1024, 1030 * 4 // dtype.itemsize))
        self.first = nn.Linear(5, 5, bias=False)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return (
            (y * self.five).square().mean()
            + self.one.sum() * self.three.sum() * self.seven.sum()
            + self.big.mean()
        )


class Tiny(nn.Module):
    """A classifier of five words with a tied head and a frozen layer. Most sizes are odd."""

    def __init__(self, seed: int = 0, inner: int = 13) -> None:
        super().__init__()
        torch.manual_seed(seed)
        width = 7
        self.embed = nn.Embedding(VOCABULARY, width)
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.hidden = nn.Linear(width, inner)
        self.norm = nn.LayerNorm(inner)
        self.back = nn.Linear(inner, width)
        self.head = nn.Linear(width, VOCABULARY)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = torch.tanh(self.frozen(self.embed(ids).mean(1)))
        logits = self.head(x + self.back(torch.tanh(self.norm(self.hidden(x)))))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def tiny_of_file(path: Path, comment: str) -> nn.Module:
    """A Tiny whose class is of the file `path`: this file with a comment at its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Path(__file__).read_text() + comment)
    spec = importlib.util.spec_from_file_location("my_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["my_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Tiny()


def tiny_data(size: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (size, 5), generator=generator)
    return [{"ids": row, "labels": row[0]} for row in ids]


class Wide(nn.Module):
    """A model whose weights go to NVMe, and whose biases do not.

    has_unused: whether it has a weight that no forward uses.
    """

    def __init__(self, num_layers: int = 3, has_unused: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(num_layers))
        if has_unused:
            self.unused = nn.Linear(WIDE, WIDE, bias=False)
        self.head = nn.Linear(WIDE, 5)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = x.to(self.head.bias.dtype)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        logits = self.head(x).float()
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def wide_data(size: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(WIDE, generator=generator), "labels": torch.tensor(i % 5)}
        for i in range(size)
    ]


def tiny_opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 20, "word_embed_proj_dim": 20, "num_hidden_layers": 2, "ffn_dim": 36}
    return OPTForCausalLM(
        OPTConfig(vocab_size=37, num_attention_heads=2, max_position_embeddings=16, **shape)
    ).eval()


def opt_data(size: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 37, (size, 8), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids
    ]


# MeZO-SVRG as its paper has it, unless a test says otherwise
OF_THE_PAPER: dict[str, Any] = {
    "method": "mezo_svrg",
    "direction": "gaussian",
    "examples_per_direction": "all",
    "normalize": False,
    "lr": 1e-6,
}


def configuration(
    batch: int,
    *,
    stage: int = 3,
    offload: str = "none",
    nvme_path: Path | None = None,
    bf16: bool = False,
    accumulation: int = 1,
    top: dict[str, Any] | None = None,
    **zeroth_order: Any,
) -> dict[str, Any]:
    """A DeepSpeed configuration with a section "zeroth_order". `top` is merged in last."""
    zero: dict[str, Any] = {"stage": stage}
    if offload != "none":
        zero["offload_param"] = {"device": offload}
    if offload == "nvme":
        zero["offload_param"] |= {"nvme_path": str(nvme_path), "buffer_size": 3_000_000}
    if "nvme" in zeroth_order.get("anchor", {}).values():
        zeroth_order["anchor"] = {"nvme_path": str(nvme_path), **zeroth_order["anchor"]}
    return {
        "train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        "steps_per_print": 1_000_000,
        "zeroth_order": {**OF_THE_PAPER, **zeroth_order},
        **(top or {}),
    }


def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def global_batch(data: Sequence[Any], step: int, size: int) -> list[Any]:
    """The next `size` examples, which are those of one step. After the last comes the first."""
    return [data[i % len(data)] for i in range(step * size, (step + 1) * size)]


def train(engine: ZerothOrderEngine, data: Sequence[Any], steps: Iterable[int]) -> list[float]:
    """Train by the three-line loop, and return the losses.

    Each step uses this rank's part of its `global_batch`.
    """
    losses = []
    micro = engine.train_micro_batch_size_per_gpu()
    for step in steps:
        examples = global_batch(data, step, engine.train_batch_size())
        for k in range(engine.gradient_accumulation_steps()):
            start = (k * engine.world_size + engine.global_rank) * micro
            mine = examples[start : start + micro]
            loss = engine(collate(mine))
            engine.backward(loss)
            engine.step()
        losses.append(engine.last_step.loss)
    return losses


def whole(engine: ZerothOrderEngine) -> dict[str, Tensor]:
    """Copies of all parameters, frozen ones too, gathered one by one.

    All ranks call it together.
    """
    copies = {}
    engine.flush()
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_tensor")):
            copies[name] = param.detach().clone()
    return copies


def anchor_point(engine: ZerothOrderEngine) -> dict[str, Tensor]:
    """The anchor point of every trainable parameter, whole and as evaluations see it."""
    copies = {}
    engine.flush()
    for shard in engine.sharded_parameters:
        with deepspeed.zero.GatheredParameters(
            [shard.param], enabled=hasattr(shard.param, "ds_tensor")
        ):
            live = shard.param.data
            weight, scale, seeds, coefficients = engine.anchor.center(shard, live)
            copies[shard.name] = combine_(
                torch.empty_like(live),
                weight=weight,
                scale=scale,
                seeds=seeds,
                coefficients=coefficients,
                parameter=shard.ordinal,
                offset=0,
            )
    return copies


def local_shards(engine: ZerothOrderEngine) -> dict[str, Tensor]:
    """Copies of this rank's shards, from their storage."""
    engine.flush()
    return {
        shard.name: local.clone()
        for shard, local in engine.sharded_parameters.iterate_with_read_ahead(write=False)
    }


def stored_digest(engine: Any) -> str:
    """A digest of all bytes of the parameters that this rank stores, padding included."""
    return sha256(
        {name: getattr(p, "ds_tensor", p).detach() for name, p in engine.module.named_parameters()}
    )


def sha256(tensors: dict[str, Tensor]) -> str:
    """A digest of the tensors' names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def state(engine: Any) -> dict[str, Any]:
    """The whole state from which a run continues, to the bit.

    All ranks call it together.
    """
    anchor, loader = engine.anchor, engine.training_dataloader
    selected = {} if engine.selection is None else {"selection": engine.selection.state_dict()}
    return {
        "weights": sha256(whole(engine)),
        "step": engine.global_steps,
        "counters": (
            engine.global_samples,
            engine.skipped_steps,
            engine.run.state.nonfinite_in_a_row,
        ),
        "digest": engine.trajectory.head,
        "point": None if engine.anchor_step is None else sha256(anchor_point(engine)),
        "gradient": anchor and anchor.gradient_terms,
        "drift": anchor and anchor.state_dict(),
        "anchor step": engine.anchor_step,
        "loader": loader.state_dict(),
        "lr": engine.get_lr(),
        "scheduler": engine.lr_scheduler and engine.lr_scheduler.state_dict(),
        "annealing": engine.annealing,
        "anchor weight": engine.run.state.anchor_weight,
        **selected,
    }


def batches_ahead(engine: Any) -> list[Any]:
    """The examples of the next five steps, over all ranks."""
    seen = []
    for _, batch in zip(
        range(5 * engine.gradient_accumulation_steps()),
        engine.training_dataloader.forever(),
        strict=False,
    ):
        gathered: list[Any] = [None] * engine.world_size
        torch.distributed.all_gather_object(gathered, next(iter(batch.values())).tolist())
        seen.append(sorted(row for rank in gathered for row in rank))
    return seen


def numpy_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The tensors as arrays, which can be sent to another process."""
    return {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}
