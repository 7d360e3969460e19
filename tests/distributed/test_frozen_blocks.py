"""Blocks before the first trained parameter run once for each row, in a stack of all points."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import zods
from tests.distributed.forms import POINTS, compare, engine_of
from tests.distributed.models import configuration
from tests.distributed.ranks import run_ranks
from tests.distributed.zoo import zoo_batch, zoo_model

MODELS = ("opt", "llama", "gpt2", "bert", "phi", "mixtral", "mamba")
ROWS = 4  # of a batch of `zoo_batch`


def with_adapters_on_the_last_block(name: str) -> torch.nn.Module:
    """A model of two blocks. The first has no adapter."""
    lora = peft.LoraConfig(
        r=2, lora_alpha=128, init_lora_weights=False, layers_to_transform=[1],
        target_modules={"gpt2": ["c_attn"], "mamba": ["in_proj"], "bert": ["query"]}.get(name, ["q_proj"]),
    )  # fmt: skip
    return peft.get_peft_model(zoo_model(name), lora)


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2]
    return list(lists[0])


@torch.no_grad()
def rank_of_models() -> dict[str, dict[str, Any]]:
    """For each model: the comparison with separate forwards, and the rows that each block sees."""
    found = {}
    for name in MODELS:
        model = with_adapters_on_the_last_block(name)
        engine = engine_of(model)
        rows: list[list[int]] = [[], []]
        compared = [
            compare(engine._evaluator, POINTS["two pairs"], batch)
            for batch in (zoo_batch(name), zoo_batch(name, size=3, length=23, padded=True, seed=2))
        ]
        handles = [
            # an inner module, because a block's own hooks see the whole stack
            next(block.children()).register_forward_pre_hook(
                lambda _, args, kwargs, seen=seen: seen.append(
                    len(next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)))
                ),
                with_kwargs=True,
            )
            for block, seen in zip(blocks_of(model), rows, strict=True)
        ]
        engine._evaluator.losses(POINTS["two pairs"], zoo_batch(name))
        for handle in handles:
            handle.remove()
        found[name] = {"compared": compared, "rows": rows}
        engine.close()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_frozen_first_block_runs_once_for_each_row_with_the_same_losses(ranks):
    for of_rank in run_ranks(ranks, rank_of_models):
        for name, found in of_rank.items():
            for of_batch in found["compared"]:
                assert of_batch.error < 1e-5, name
                assert of_batch.apart > 50 * of_batch.error, name
                stacked = of_batch.form == "stacked"
            # DeepSpeed gathers the experts of a mixture together, so a stack is split there
            if stacked and name != "mixtral":
                first, second = found["rows"]
                assert set(first) == {ROWS}, name
                assert min(second) >= 2 * ROWS, name
        assert of_rank["llama"]["compared"][0].form == "stacked"


def rank_of_steps(groups: Any) -> list[float]:
    model = with_adapters_on_the_last_block("llama")
    batch = zoo_batch("llama", size=8)
    data = [{key: value[row] for key, value in batch.items()} for row in range(8)]
    section = {"direction": "low_rank", "examples_per_direction": groups, "lr": 1e-3}
    found = []
    for form in ("stacked", "sequential"):
        config = configuration(8, stage=3, evaluation=form, **section)
        engine = zods.initialize(model=model, config=config, training_data=data)[0]
        found.append(engine.train_batch())
        engine.close()
        model = with_adapters_on_the_last_block("llama")
    return found


@pytest.mark.parametrize("groups", [1, 3, "all"])
def test_steps_with_rows_in_groups_have_the_losses_of_separate_forwards(groups):
    for stacked, separate in run_ranks(2, rank_of_steps, groups):
        assert stacked == pytest.approx(separate, rel=1e-5)
