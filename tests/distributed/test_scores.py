"""Training on scores of examples, which have no gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import zods
from tests.distributed.models import configuration, opt_data, tiny_opt
from tests.distributed.ranks import run_ranks
from tests.helpers import LogTexts
from zods.data.scores import token_accuracy

NAMED = {"method": "mezo", "objective": "token_accuracy", "lr": 1e-2, "eps": 0.05}


def engine_of(data: list[dict[str, torch.Tensor]], **section: Any) -> Any:
    config = configuration(8, **{**NAMED, **section})
    return zods.initialize(model=tiny_opt(), config=config, training_data=data)[0]


def rank_of_forms(groups: Any) -> dict[str, list[float]]:
    """Three steps of each form: the losses, and the projected gradients."""
    found = {}
    for form in ("stacked", "lockstep", "sequential"):
        engine = engine_of(opt_data(), evaluation=form, examples_per_direction=groups)
        losses = []
        for _ in range(3):
            losses += [engine.train_batch(), engine.last_step.projected_grad]
        found[form] = losses
        engine.close()
    return found


@pytest.mark.parametrize("groups", [1, 4, "all"])
def test_all_forms_of_evaluation_and_any_ranks_give_the_same_scores(groups):
    alone = run_ranks(1, rank_of_forms, groups)[0]
    for found in run_ranks(2, rank_of_forms, groups):
        for form, losses in found.items():
            assert losses == pytest.approx(alone["sequential"]), form
    assert any(value != 0.0 for value in alone["sequential"][1::2])


def rank_of_first_loss() -> tuple[float, float]:
    """The loss of a first step very near the parameters, and minus the mean of the scores there."""
    data, model = opt_data(8), tiny_opt()
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    with torch.no_grad():
        expected = token_accuracy(copy.deepcopy(model)(**batch).logits, batch, True).mean()
    engine = engine_of(data, eps=1e-6)
    return engine.train_batch(), -float(expected)


def test_the_loss_of_a_step_is_minus_the_mean_score():
    ((found, expected),) = run_ranks(1, rank_of_first_loss)
    assert found == pytest.approx(expected)


def rank_of_seeds(seeds: range) -> list[tuple[float, float]]:
    """The scores of the first and of the last steps, of training to repeat one token."""
    found = []
    for seed in seeds:
        data = [{**row, "labels": torch.full_like(row["labels"], 9)} for row in opt_data(64)]
        engine = engine_of(data, seed=seed, num_directions=4)
        scores = [-engine.train_batch() for _ in range(80)]
        found.append((sum(scores[:5]) / 5, sum(scores[-5:]) / 5))
        engine.close()
    return found


def test_steps_on_an_accuracy_raise_it():
    (found,) = run_ranks(1, rank_of_seeds, range(3))
    for first, last in found:
        assert first < 0.5
        assert last > 0.9


def rank_of_ties() -> list[str]:
    engine = engine_of(opt_data(), eps=1e-6)
    texts = LogTexts("zods.training.step_reporter")
    for _ in range(100):
        engine.train_batch()
    return texts.texts


def test_steps_that_tell_nothing_are_reported():
    ((said,),) = run_ranks(1, rank_of_ties)
    assert "in 100 of the last 100 steps all pairs of points had the same score" in said


def rank_of_unknown() -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        engine_of(opt_data(), objective="no_such_module:score")
    return str(caught.value)


def test_an_objective_that_cannot_be_imported_is_one_error_on_all_ranks():
    first, second = run_ranks(2, rank_of_unknown)
    assert first == second
    assert 'zeroth_order.objective: "no_such_module:score" cannot be imported' in first
