"""Steps in which groups of examples have directions of their own, against the dense reference.

The reference evaluates each group of examples at its own points, by separate forwards in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import zods
from tests.distributed.models import collate, configuration, numpy_of, sha256, whole
from tests.distributed.ranks import run_ranks
from tests.distributed.row_by_row import METHODS, RowByRow, row_data
from tests.distributed.zoo import with_adapters, zoo_batch, zoo_model
from tests.helpers import LogTexts, asked_for, sampled
from tests.reference.dense import DenseReference, loss_of_module, named_parameters_of
from zods.core.directions import derive_seed
from zods.core.example_groups import part_starts
from zods.data.order import anchor_order
from zods.training.resume import LOG_NAME
from zods.trajectory.log import read_log
from zods.trajectory.records import Refresh, Step

BATCH, LENGTH = 8, 6
SECTION = {"method": "mezo", "eps": 1e-2, "lr": 1e-3, "seed": 5}
# Parameters are released after each module, as large ones are.
RELEASED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
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
        f"{name}, low rank, {size}": (name, {**LOW_RANK, "examples_per_direction": size})
        for size in (1, 4, "all")
        for name in MODELS
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
    "opt, stage 0": (
        "opt",
        {**LOW_RANK, "examples_per_direction": 1, "num_directions": 2, "stage": 0},
    ),
    "opt, sequential": ("opt", {"examples_per_direction": 1, "evaluation": "sequential"}),
    # one of two ranks has rows of two groups
    "opt, sequential, uneven": (
        "opt",
        {"examples_per_direction": 5, "evaluation": "sequential", "top": RELEASED},
    ),
    "opt, lockstep, uneven": (
        "opt",
        {"examples_per_direction": 5, "evaluation": "lockstep", "top": RELEASED},
    ),
    "opt, uneven": ("opt", {**LOW_RANK, "examples_per_direction": 5, "top": RELEASED}),
    "opt, lockstep": ("opt", {"examples_per_direction": 1, "evaluation": "lockstep"}),
    "opt, two at a time": (
        "opt",
        {**LOW_RANK, "examples_per_direction": 1, "num_directions": 3, "stream_memory_gb": 1e-4},
    ),
    "opt, svrg": ("opt", {**LOW_RANK, **SVRG, "examples_per_direction": 1}),
    # groups and parts of a refresh that two ranks share
    "opt, svrg, uneven": (
        "opt",
        {**LOW_RANK, **SVRG, "anchor_directions": 3, "examples_per_direction": 3},
    ),
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
# The others are slow: each of their properties is in one of these.
DEFAULT = {
    *(f"{name}, low rank, 1" for name in ("opt", "bert", "t5", "lora", "convolution")),
    *("mamba, gaussian, 3", "opt, two directions", "opt, two at a time", "opt, accumulation"),
    *("opt, lockstep, uneven", "opt, uneven", "opt, svrg, uneven"),
}


def steps_of(name: str) -> int:
    """Twenty steps of one model by default, and of each model and method in the slow cases."""
    many = name == "opt, low rank, 1" or name not in DEFAULT
    return 20 if many and ("low rank" in name or "svrg" in name) else 6


def group_size(name: str) -> int:
    """The number of examples that share a direction in a case."""
    size = CASES[name][1]["examples_per_direction"]
    return BATCH if size == "all" else size


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
        for step in range(steps_of(name)):
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
    for key in ("evaluation", "stream_memory_gb", "accumulation", "stage", "top"):
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

    data = examples_of(model_name)

    def parts_of_refresh(step: int) -> list[tuple[Any, float]]:
        seed = derive_seed(SECTION["seed"], "anchor_examples", step)
        order = anchor_order(len(data), examples=None, shuffled=True, seed=seed).tolist()
        bounds = [*part_starts(len(data), section["anchor_directions"]), len(data)]
        parts = [
            collate([data[i] for i in order[start:stop]])
            for start, stop in itertools.pairwise(bounds)
        ]
        counts = list(map(count_of(model_name), parts))
        return [(part, count / sum(counts)) for part, count in zip(parts, counts, strict=True)]

    dense = DenseReference(
        parts=parts_of_refresh,
        anchor_split=True,
        params=params,
        loss=loss,
        trainable=trainable,
        count=count_of(model_name),
        rounded=rounded,
        **section,
    )
    # a loss of size 4 has an error of a few roundings of 2^-24
    noise = 16 * 4 * 2.0**-24 / (2 * SECTION["eps"])
    return dense, [dense.step(batch_of(model_name, step)) for step in range(steps_of(name))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    names = asked_for(request, "name", CASES, DEFAULT)
    found: list[dict[str, Any]] = [{}, {}]
    for start in range(0, len(names), 6):
        of_ranks = run_ranks(2, rank_of_cases, folder, names[start : start + 6])
        for of_rank, more in zip(found, of_ranks, strict=True):
            of_rank |= more
    return found


@pytest.mark.parametrize("name", sampled(CASES, DEFAULT))
def test_steps_agree_with_the_dense_reference(cases, folder, name):
    """Compare within the rounding of float32 forwards; see `dense_run`."""
    records = [
        r for r in read_log(folder / name / LOG_NAME).records if isinstance(r, (Step, Refresh))
    ]
    keys = CASES[name][1]
    number = -(-BATCH // group_size(name)) * keys.get("num_directions", 1)
    number *= 1 if keys.get("share_direction", True) else 2
    of_steps = [len(r.coefficients) for r in records if isinstance(r, Step)]
    assert of_steps == [number] * steps_of(name)
    dense, losses = dense_run(name, [r.coefficients for r in records])
    for found in (rank[name] for rank in cases):
        np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
        for key, expected in dense.params.items():
            np.testing.assert_allclose(found["after"][key], expected.numpy(), rtol=0, atol=1e-5)
        assert found["head"] == cases[0][name]["head"]


def test_a_rank_sends_8_bytes_for_each_of_its_directions_and_at_most_64_more(cases):
    for name in cases[0]:
        model, keys = CASES[name]
        micro = BATCH // 2 // keys.get("accumulation", 1)
        groups_of_ranks = [
            {row // group_size(name) for row in range(BATCH) if row // micro % 2 == k}
            for k in range(2)
        ]
        groups = max(map(len, groups_of_ranks))  # a group that two ranks share is sent by both
        pairs = keys.get("num_directions", 1) * (2 if keys.get("method") == "mezo_svrg" else 1)
        # without a stack the ranks also exchange how many forwards each of them makes
        more = 72 if model in ("t5", "mamba") or "evaluation" in keys else 64
        assert cases[0][name]["bytes"] <= 8 * pairs * groups + more, name


# --- limit cases ------------------------------------------------------------------------------------


def rank_of_limits() -> dict[str, str]:
    cases: dict[str, dict[str, Any]] = {
        "mezo, all": {"method": "mezo"},
        "mezo, 12": {"method": "mezo", "examples_per_direction": 12},
        "mezo, 1": {"method": "mezo", "examples_per_direction": 1},
        "svrg without weight": {
            **METHODS["svrg"],
            **{"anchor_weight": 0, "anchor_lr": 0.0, "examples_per_direction": 1},
        },
    }
    found = {}
    for name, keys in cases.items():
        section = {**SECTION, "lr": 1e-2, **keys}
        engine = zods.initialize(
            model=RowByRow(), config=configuration(12, **section), training_data=row_data()
        )[0]
        for _ in range(5):
            engine.train_batch()
        after = whole(engine)
        found[name] = sha256(after) if "12" not in name and "all" not in name else numpy_of(after)
        engine.close()
    return found


def test_limit_cases():
    """One group of the whole batch is the shared direction, up to the 2 bytes of a coefficient. An
    anchor of weight 0 leaves MeZO.
    """
    found = run_ranks(2, rank_of_limits)[0]
    for key, value in found["mezo, all"].items():
        np.testing.assert_allclose(found["mezo, 12"][key], value, rtol=0, atol=5e-4)
        assert (
            np.abs(value - dict(RowByRow().named_parameters())[key].detach().numpy()).max() > 0.01
        )
    assert found["svrg without weight"] == found["mezo, 1"]


# --- what has no meaning with groups --------------------------------------------------------------


class ClassWeights(RowByRow):
    """The weighted mean of the losses: an example alone has no weight."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = super().forward(x)["logits"]
        weights = torch.arange(1.0, 6.0, dtype=logits.dtype)
        return {"logits": logits, "loss": functional.cross_entropy(logits, labels, weights)}


class Contrastive(RowByRow):
    """Each example is to be told from the others of its batch."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        features = super().forward(x)["logits"]
        return {"loss": functional.cross_entropy(features @ x[:, :5].T, torch.arange(len(x)))}


class Images(RowByRow):
    """Takes a list of images."""

    def forward(self, x: list[Tensor], labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = super().forward(torch.stack(x).flatten(1))["logits"]
        return {"loss": functional.cross_entropy(logits, labels)}


def row_batch(rows: int) -> dict[str, Any]:
    return collate(row_data()[1 : rows + 1])


def rank_of_refusals() -> list[str]:
    def said(model: nn.Module, batch: Any, **keys: Any) -> str:
        section = {**SECTION, "examples_per_direction": 1, **keys}
        engine = zods.initialize(model=model, config=configuration(12, **section))[0]
        try:
            engine(batch)
        except ValueError as error:
            return str(error)
        finally:
            engine.close()
        return "not refused"

    batch, ranks = row_batch(6), torch.distributed.get_world_size()
    assert ranks == 2
    images = {"x": [row.view(4, 4) for row in batch["x"]], "labels": batch["labels"]}
    positions = {**batch, "example_positions": torch.tensor([0, 1, 2, 3, 4, 12])}
    return [
        said(ClassWeights(), batch),
        said(ClassWeights(), {**batch, "labels": torch.ones_like(batch["labels"])}),
        said(Contrastive(), batch),
        said(RowByRow(), row_batch(7)),
        said(RowByRow(), positions),
        said(Nested(), batch, evaluation="stacked"),
        said(ClassWeights(), batch, examples_per_direction="all"),
        said(RowByRow(), row_batch(7), examples_per_direction="all"),
        said(Nested(), batch, evaluation="stacked", examples_per_direction="all"),
        said(Nested(), batch),
        said(Images(), images),
    ]


class Nested(RowByRow):
    """A module with a parameter of its own calls one with others."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(16, 16)
        self.outer.inner = nn.Linear(16, 16)
        self.outer.forward = self._outer

    def _outer(self, x: Tensor) -> Tensor:
        return functional.linear(self.outer.inner(x), self.outer.weight, self.outer.bias)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return super().forward(torch.tanh(self.outer(x)), labels)


def test_groups_without_a_meaning_are_refused_on_all_ranks():
    of_ranks = run_ranks(2, rank_of_refusals)
    expected = [
        *["from the two halves of the batch. With class weights"] * 3,
        "the batch: it has 7 examples, and train_micro_batch_size_per_gpu is 6",
        "one position from 0 to 11 for each of 6 examples",
        '"stacked" does not fit this model: Linear would be gathered once per point',
        *["not refused"] * 5,
    ]
    for found in of_ranks:
        assert len(found) == len(expected)
        for text, part in zip(found, expected, strict=True):
            assert part in text


def rank_of_terms() -> list[str]:
    said = []
    for size in (1, "all"):
        warnings = LogTexts("zods.training")
        keys = {**METHODS["svrg"], "anchor_interval": 100, "anchor": {"point": "terms"}}
        section = {**SECTION, **keys, "examples_per_direction": size}
        zods.initialize(
            model=RowByRow(), config=configuration(12, **section), training_data=row_data()
        )[0].close()
        said.append(" ".join(warnings.texts))
    return said


def test_a_point_that_takes_back_many_directions_is_told():
    single, shared = run_ranks(1, rank_of_terms)[0]
    assert "up to 1200 directions" in single
    assert "directions here" not in shared
