"""Causal language models of many architectures of transformers: losses at points, and steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.architectures import ARCHITECTURES, small_model
from tests.distributed.forms import POINTS, Found, compare, engine_of
from tests.distributed.ranks import run_ranks
from tests.helpers import sampled

# The others are slow. These have norms, attention, experts and states of different kinds.
DEFAULT = ("gemma3_text", "gpt_oss", "mamba2")
LENGTH, ENDS = 12, (12, 9, 10, 12)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3 + torch.distributed.get_rank())
    ids = torch.randint(3, 120, (4, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor(ENDS)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}


@torch.no_grad()
def rank_of_steps(name: str) -> dict[str, tuple[Found, list[float]]]:
    """For each kind of direction, a comparison with separate forwards, and the losses of steps."""
    found = {}
    for direction, examples in (("low_rank", 1), ("gaussian", "all")):
        engine = engine_of(
            small_model(name), direction=direction, examples_per_direction=examples, lr=1e-4
        )
        compared = compare(engine._evaluator, POINTS["two pairs"], batch())
        losses: list[Any] = []
        for _ in range(3):
            losses.append(engine(batch()))
            engine.backward(losses[-1])
            engine.step()
        found[direction] = (compared, [float(loss) for loss in losses])
        engine.close()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", sampled(ARCHITECTURES, DEFAULT))
def test_a_model_of_transformers_runs_unchanged(name, ranks):
    """Losses of all points together equal those of separate forwards within float32's rounding,
    1e-6 relative, and differ from each other by much more.
    """
    for rank in run_ranks(ranks, rank_of_steps, name):
        for compared, losses in rank.values():
            assert compared.form in ("stacked", "lockstep")
            assert compared.error < 1e-6
            assert compared.apart > 1e-4
            # the first one is near that of a uniform guess
            assert losses[0] == pytest.approx(losses[-1], rel=0.2)
            assert 3.0 < losses[0] < 9.0
