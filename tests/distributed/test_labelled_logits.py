"""Evaluations of candidates compute logits only where a label follows, with the same scores."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.distributed.answer_models import (
    CAUSAL,
    LENGTH,
    NUM_POSITIONS,
    IgnoresPositions,
    RefusesAtTheEnd,
    TakesANumber,
    TakesTheFirst,
    prompted_batch,
)
from tests.distributed.forms import engine_of
from tests.distributed.models import collate, opt_data
from tests.distributed.ranks import run_ranks
from tests.distributed.zoo import with_adapters, zoo_model
from tests.helpers import asked_for, sampled
from zods.config.deepspeed_json import read_first_order_config
from zods.data.evaluation import Candidates, Forwards
from zods.training.first_order import FirstOrderEngine

ROWS = 7  # not a multiple of the ranks' micro-batches


def with_virtual_tokens() -> nn.Module:
    adapter = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    return peft.get_peft_model(zoo_model("gpt2"), adapter)


# Models, and the number of positions of their logits in an evaluation.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: (lambda name=name: zoo_model(name), NUM_POSITIONS) for name in CAUSAL},  # type: ignore[misc]
    "LoRA": (lambda: with_adapters("llama"), NUM_POSITIONS),
    "virtual tokens": (with_virtual_tokens, LENGTH + 3),
    "ignores positions": (IgnoresPositions, LENGTH),
    "takes the first": (TakesTheFirst, LENGTH),
    "takes a number": (TakesANumber, LENGTH),
    "refuses at the end": (RefusesAtTheEnd, LENGTH),
}

# The others are slow.
DEFAULT = ("llama", "LoRA", "virtual tokens", "takes the first", "takes a number")


def collated(rows: list[int]) -> tuple[Candidates, Tensor]:
    """Two candidates per example, of which the last two tokens are scored."""
    batch = prompted_batch("llama")
    of_rows = torch.tensor([k for row in rows for k in (row % 4, (row + 1) % 4)])
    ids, mask, labels = (batch[k][of_rows] for k in ("input_ids", "attention_mask", "labels"))
    return Candidates(ids, mask, labels), torch.tensor(rows)


def summed(outputs: Any, inputs: Any, targets: Tensor) -> dict[str, tuple[float, float]]:
    weights = 1.0 + targets.repeat_interleave(2).double()  # so that each row counts differently
    total = float((outputs["log_likelihood"] * weights).sum())
    tokens = float(outputs["num_tokens"].sum())
    return {"sum": (total, len(targets)), "tokens": (tokens, len(targets))}


def first_order_engine(model: nn.Module) -> FirstOrderEngine:
    config = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    return FirstOrderEngine(model, read_first_order_config(config, 1), opt_data(), collate)


@torch.no_grad()
def evaluated(model: nn.Module, first_order: bool = False) -> dict[str, Any]:
    """The metrics of an engine's evaluation, those of the model alone, and the widths of logits."""
    alone = copy.deepcopy(model).eval()
    inputs, targets = collated(list(range(ROWS)))
    outputs = inputs.run(Forwards(lambda given: alone(**given), 4))
    expected = {name: a / b for name, (a, b) in summed(outputs, inputs, targets).items()}
    engine = first_order_engine(model) if first_order else engine_of(model)
    widths: list[int] = []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        widths.append(output["logits"].shape[1])

    engine.module.register_forward_hook(note, with_kwargs=True)
    found = [engine.evaluate(range(ROWS), collated, summed) for _ in range(2)]
    return {"found": found, "expected": expected, "widths": widths}


def rank_of_models(names: list[str]) -> dict[str, Any]:
    return {name: evaluated(MODELS[name][0]()) for name in names}


def rank_of_first_order() -> dict[str, Any]:
    return evaluated(zoo_model("opt"), first_order=True)


def check(found: dict[str, Any], width: int) -> None:
    for metrics in found["found"]:
        assert metrics == pytest.approx(found["expected"], rel=1e-5)
    compared = 2  # forwards before the first one
    assert found["widths"][0] >= LENGTH
    assert max(found["widths"][compared:]) == width


@pytest.fixture(scope="module")
def one_rank(request: pytest.FixtureRequest) -> dict[str, Any]:
    return run_ranks(1, rank_of_models, asked_for(request, "name", MODELS, DEFAULT))[0]


@pytest.mark.parametrize("name", sampled(MODELS, DEFAULT))
def test_candidates_have_the_scores_of_whole_logits(one_rank, name):
    check(one_rank[name], MODELS[name][1])


def test_first_order_training_evaluates_alike():
    check(run_ranks(1, rank_of_first_order)[0], NUM_POSITIONS)


def test_sharded_parameters_give_the_same():
    for rank in run_ranks(
        2, rank_of_models, ["opt", "LoRA", "ignores positions", "refuses at the end"]
    ):
        for name, found in rank.items():
            check(found, MODELS[name][1])
