"""Objectives without gradients: scores of examples, and the losses made of them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from zods.data.batch import CANDIDATES, WEIGHTS
from zods.data.objectives import Objective, batch_loss, loss_count, scored_losses
from zods.data.scores import find_score

VOCABULARY = 7
# by row: all three labels right, two of three, none of one, no label
LABELS = torch.tensor([[-100, 1, 2, 3], [-100, 1, 2, 3], [-100, -100, 5, -100], [-100] * 4])
PREDICTED = torch.tensor([[1, 2, 3, 0], [1, 2, 4, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
SCORES = {"accuracy": [1.0, 0.0, 0.0], "token_accuracy": [1.0, 2 / 3, 0.0]}


def logits_of(predicted: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(*predicted.shape, VOCABULARY, generator=generator)
    return logits.scatter(-1, predicted[..., None], 2.0)


def first_logit(outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
    return outputs["logits"][:, 0, 0]


def mean_logit(outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
    return outputs["logits"].mean()


def number(outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> float:
    return 1.0


@pytest.mark.parametrize("name", SCORES)
def test_a_loss_is_minus_the_mean_score_of_the_examples_with_labels(name):
    objective, batch = Objective("examples", score=find_score(name)), {"labels": LABELS}
    mean, rows = scored_losses({"logits": logits_of(PREDICTED)}, batch, objective)
    assert rows.tolist() == pytest.approx([-score for score in SCORES[name]] + [0.0])
    assert float(mean) == pytest.approx(-sum(SCORES[name]) / 3)
    assert float(mean * loss_count(batch, objective)) == pytest.approx(float(rows.sum()))


@pytest.mark.parametrize("name", SCORES)
def test_labels_of_classes_and_of_positions_that_are_not_shifted_are_scored_where_they_stand(name):
    classes = torch.tensor([3, 0, 4])
    logits = logits_of(torch.tensor([3, 1, 4]))
    score = find_score(name)
    assert score(logits, {"labels": classes}, True).tolist() == [1.0, 0.0, 1.0]
    logits = logits_of(torch.tensor([[1, 2], [0, 2]]))
    labels = torch.tensor([[1, 2], [1, -100]])
    assert score(logits, {"labels": labels}, False).tolist() == [1.0, 0.0]


def test_weights_of_examples_weigh_their_scores():
    objective = Objective("examples", score=find_score("accuracy"))
    batch = {"labels": LABELS, WEIGHTS: torch.tensor([3.0, 1.0, 0.0, 5.0])}
    loss = batch_loss({"logits": logits_of(PREDICTED)}, batch, objective)
    assert float(loss) == -3.0 / 4.0


def test_a_batch_without_labels_has_no_loss():
    objective = Objective("examples", score=find_score("accuracy"))
    batch = {"labels": LABELS[3:]}
    assert batch_loss({"logits": logits_of(PREDICTED[3:])}, batch, objective).isnan()


def test_a_function_of_the_user_scores_each_example():
    objective = Objective("examples", score=find_score(f"{__name__}:first_logit"))
    logits = logits_of(PREDICTED)
    loss = batch_loss({"logits": logits}, {"labels": LABELS[[0, 0, 0, 0]]}, objective)
    assert float(loss) == pytest.approx(-float(logits[:, 0, 0].mean()))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:score", "cannot be imported (No module named 'no_such_module')"),
        (f"{__name__}:no_such_function", "has no attribute 'no_such_function'"),
        (f"{__name__}:VOCABULARY", "is int, expected a function"),
    ],
)
def test_a_name_that_is_no_function_is_refused(name, said):
    with pytest.raises(ValueError, match=r"zeroth_order.objective: ") as caught:
        find_score(name)
    assert said in str(caught.value)


@pytest.mark.parametrize(("name", "said"), [("mean_logit", "returned ()"), ("number", "float")])
def test_a_function_that_gives_no_score_of_each_example_is_refused(name, said):
    score = find_score(f"{__name__}:{name}")
    with pytest.raises(ValueError, match=r"of shape \(4,\): the score of each example") as caught:
        score(logits_of(PREDICTED), {"labels": LABELS}, True)
    assert said in str(caught.value)


def test_candidates_are_the_cross_entropy_over_the_logits_of_the_candidates_alone():
    logits = logits_of(PREDICTED)[:2]
    batch = {
        "labels": torch.tensor([[-100, -100, 2, -100], [-100, 4, -100, -100]]),
        CANDIDATES: torch.tensor([[1, 2, 5], [4, 0, 3]]),
    }
    expected = [
        functional.cross_entropy(logits[0, 1, [1, 2, 5]], torch.tensor(1)).item(),
        functional.cross_entropy(logits[1, 0, [4, 0, 3]], torch.tensor(0)).item(),
    ]
    objective = Objective("examples", score=find_score("candidates"))
    assert scored_losses({"logits": logits}, batch, objective)[1].tolist() == pytest.approx(
        expected
    )
    moved = {**batch, "labels": torch.tensor([[-100, 2, -100, -100], [4, -100, -100, -100]])}
    unshifted = replace(objective, shifted=False)
    assert scored_losses({"logits": logits}, moved, unshifted)[1].tolist() == pytest.approx(
        expected
    )


def test_a_batch_without_candidates_is_refused_with_the_entry_that_is_missing():
    with pytest.raises(ValueError, match="needs the entry 'candidate_tokens' of a batch"):
        find_score("candidates")(logits_of(PREDICTED), {"labels": LABELS}, True)


@pytest.mark.parametrize("tokens", [[1, 3, 5], [2, 2, 5]])
def test_a_label_that_is_not_once_among_its_candidates_is_refused_with_the_row(tokens):
    batch = {
        "labels": torch.tensor([[-100, -100, -100, -100], [-100, 2, -100, -100]]),
        CANDIDATES: torch.tensor([[1, 2, 5], tokens]),
    }
    with pytest.raises(ValueError, match=r"row 1 of a batch has the label token 2, and the cand"):
        find_score("candidates")(logits_of(PREDICTED)[:2], batch, True)
