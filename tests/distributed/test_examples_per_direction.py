"""Steps in which groups of examples have directions of their own, against the dense reference.

The reference evaluates each group of examples at its own points, by separate forwards in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import zods
from tests.distributed.models import configuration, numpy_of, whole
from tests.distributed.ranks import run_ranks
from tests.distributed.zoo import with_adapters, zoo_batch, zoo_model
from tests.reference.dense import DenseReference, loss_of_module, named_parameters_of
from zods.training.resume import LOG_NAME
from zods.trajectory.log import read_log
from zods.trajectory.records import Step

STEPS, BATCH, LENGTH = 20, 8, 6
SECTION = {"method": "mezo", "eps": 1e-2, "lr": 1e-3, "seed": 5}
LOW_RANK = {"direction": {"distribution": "low_rank", "rank": 2}}
SVRG = {"method": "mezo_svrg", "anchor_interval": 8, "anchor_directions": 4}


class Convolution(nn.Module):
    """A classifier of rows of numbers by a convolution, with a norm over channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(3, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = x.to(self.head.bias.dtype)
        logits = self.head(torch.tanh(self.norm(self.conv(x))).mean(-1))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def convolution_batch(name: str, size: int, length: int, *, padded: bool, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, length, generator=generator)
    return {"x": x, "labels": torch.randint(0, 4, (size,), generator=generator)}


# name -> (model, function that makes a batch)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict[str, Tensor]]]] = {
    **{
        name: (lambda name=name: zoo_model(name), zoo_batch)
        for name in ("opt", "llama", "gpt2", "bert", "t5", "mixtral", "mamba")
    },
    "lora": (lambda: with_adapters("llama"), zoo_batch),
    "convolution": (Convolution, convolution_batch),
}
# (model, keys of the section) by name
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{name}, low rank, 1": (name, {**LOW_RANK, "examples_per_direction": 1}) for name in MODELS
    },
    **{
        f"{name}, gaussian, 3": (name, {"examples_per_direction": 3})
        for name in ("opt", "bert", "mamba", "convolution")
    },
    "opt, rademacher, 4": ("opt", {"direction": "rademacher", "examples_per_direction": 4}),
    "opt, two directions": (
        "opt",
        {**LOW_RANK, "examples_per_direction": 2, "num_directions": 2, "normalize": True},
    ),
    "opt, sequential": ("opt", {"examples_per_direction": 1, "evaluation": "sequential"}),
    "opt, lockstep": ("opt", {"examples_per_direction": 1, "evaluation": "lockstep"}),
    "opt, two at a time": (
        "opt",
        {**LOW_RANK, "examples_per_direction": 1, "num_directions": 3, "stream_memory_gb": 1e-4},
    ),
    "opt, svrg": ("opt", {**LOW_RANK, **SVRG, "examples_per_direction": 1}),
    "bert, svrg": ("bert", {**SVRG, "examples_per_direction": 4, "share_direction": False}),
    "opt, svrg, auto": (
        "opt",
        {**LOW_RANK, **SVRG, "examples_per_direction": 1, "anchor_weight": "auto"},
    ),
    "opt, accumulation": (
        "opt",
        {**LOW_RANK, "examples_per_direction": 3, "accumulation": 2},
    ),
}


def batch_of(model: str, step: int) -> dict[str, Tensor]:
    """The global batch of a step. Rows have different numbers of tokens."""
    return MODELS[model][1](model, BATCH, LENGTH, padded=True, seed=step)


def rows_of(batch: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {key: value[start:stop] for key, value in batch.items()}


def examples_of(model: str) -> list[dict[str, Tensor]]:
    batch = batch_of(model, 1000)
    return [{key: value[i] for key, value in batch.items()} for i in range(BATCH)]


def rank_of_cases(folder: Path, names: list[str]) -> dict[str, Any]:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {}
    for name in names:
        model, keys = CASES[name]
        print(name, flush=True)
        data = examples_of(model) if keys.get("method") == "mezo_svrg" else None
        engine = zods.initialize(
            model=MODELS[model][0](),
            config=configuration(BATCH, **{**SECTION, **keys}),
            training_data=data,
        )[0]
        engine.resume(folder / name)
        accumulation = keys.get("accumulation", 1)
        size = BATCH // (ranks * accumulation)
        losses = []
        for step in range(STEPS):
            batch = batch_of(model, step)
            for micro in range(accumulation):
                start = (micro * ranks + rank) * size
                engine.backward(engine(rows_of(batch, start, start + size)))
                engine.step()
            losses.append(engine.last_step.loss)
        found[name] = {
            "losses": losses,
            "after": numpy_of(whole(engine)),
            "head": engine.trajectory.head,
            "bytes": engine.last_step.scalar_bytes,
        }
        engine.close()
    return found


def count_of(model: str) -> Callable[[dict[str, Tensor]], float]:
    def count(batch: dict[str, Tensor]) -> float:
        labels = batch["labels"]
        if labels.ndim == 1:
            return float(len(labels))
        return float((labels[:, 0 if model == "t5" else 1 :] != -100).sum())

    return count


def dense_run(
    name: str, coefficients: list[tuple[float, ...]]
) -> tuple[DenseReference, list[float]]:
    """The steps of the reference, with the logged coefficients where its own round to them.

    A coefficient is logged in bfloat16. The float32 noise of the losses may round one to the
    neighbouring number, which the reference takes over, so that the noise does not add up.
    """
    model_name, keys = CASES[name]
    model = MODELS[model_name][0]()
    section = {**SECTION, **keys}
    for key in ("evaluation", "stream_memory_gb", "accumulation"):
        section.pop(key, None)
    if isinstance(section.get("direction"), dict):
        section |= {"direction": "low_rank", "rank": 2}
    dtype = torch.float32 if model_name == "mixtral" else torch.float64  # its kernel takes no more
    params = named_parameters_of(model, dtype)
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    loss = loss_of_module(model.to(dtype), lambda outputs, _: outputs["loss"])
    logged = iter(coefficients)
    noise = 0.0

    def rounded(own: list[float]) -> list[float]:
        np.testing.assert_allclose(next_logged := next(logged), own, rtol=2.0**-8, atol=noise)
        return list(next_logged)

    dense = DenseReference(
        params=params,
        loss=loss,
        trainable=trainable,
        count=count_of(model_name),
        rounded=rounded,
        **section,
    )
    # a loss of size 4 has an error of a few roundings of 2^-24
    noise = 16 * 4 * 2.0**-24 / (2 * SECTION["eps"])
    return dense, [dense.step(batch_of(model_name, step)) for step in range(STEPS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, rank_of_cases, folder, list(CASES))


@pytest.mark.parametrize("name", [name for name in CASES if "svrg" not in name])
def test_twenty_steps_agree_with_the_dense_reference(cases, folder, name):
    records = [r for r in read_log(folder / name / LOG_NAME).records if isinstance(r, Step)]
    assert len(records) == STEPS
    keys = CASES[name][1]
    groups = -(-BATCH // keys["examples_per_direction"])
    assert {len(r.coefficients) for r in records} == {groups * keys.get("num_directions", 1)}
    dense, losses = dense_run(name, [r.coefficients for r in records])
    for found in (rank[name] for rank in cases):
        np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
        for key, expected in dense.params.items():
            np.testing.assert_allclose(found["after"][key], expected.numpy(), rtol=0, atol=1e-5)
        assert found["head"] == cases[0][name]["head"]
