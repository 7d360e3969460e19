"""Forwards compute logits only where a label follows, with the losses of whole forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.answer_models import (
    CAUSAL,
    LENGTH,
    NUM_POSITIONS,
    IgnoresPositions,
    TakesANumber,
    TakesTheFirst,
    prompted_batch,
)
from tests.distributed.forms import POINTS, compare, engine_of
from tests.distributed.ranks import run_ranks
from tests.distributed.zoo import with_adapters, zoo_batch, zoo_model
from zods.data.batch import CANDIDATES
from zods.data.scores import accuracy


@torch.no_grad()
def judged(model: nn.Module, batches: list[dict[str, Tensor]], **arguments: Any) -> Any:
    """Compare losses at two pairs of points with separate forwards, on each batch.

    Returns the comparisons, and the numbers of positions of the logits of which losses were made: at
    the points together, and at the parameters.
    """
    engine = engine_of(model, **arguments)
    evaluator = engine._evaluator
    compared = [compare(evaluator, POINTS["two pairs"], batch) for batch in batches]
    losses_of_logits = evaluator._forwards.losses_of_logits
    widths: set[int] = set()

    def recorded(logits: Tensor, batch: Any) -> Any:
        widths.add(logits.shape[1])
        return losses_of_logits(logits, batch)

    evaluator._forwards.losses_of_logits = recorded
    evaluator.losses(POINTS["two pairs"], batches[-1])
    evaluator.mean_loss(iter(batches[-1:]))
    return compared, widths


def rank_of_models(names: list[str], direction: str) -> dict[str, Any]:
    arguments = {"direction": direction}
    found = {name: judged(zoo_model(name), [prompted_batch(name)], **arguments) for name in names}
    batches = [zoo_batch("llama"), prompted_batch("llama"), prompted_batch("llama", weighted=True)]
    found["LoRA"] = judged(with_adapters("llama"), [prompted_batch("llama")], **arguments)
    found["later, weighted"] = judged(zoo_model("llama"), batches, **arguments)
    for form in ("lockstep", "sequential"):
        found[form] = judged(zoo_model("llama"), batches, evaluation=form, **arguments)
    # one of the candidates is the first labelled token
    candidates = {CANDIDATES: batches[1]["input_ids"][:, 7:11]}
    found["candidates"] = judged(
        zoo_model("llama"), [{**batches[1], **candidates}], objective="candidates", **arguments
    )
    found["examples"] = judged(zoo_model("llama"), batches[1:2], loss_mean="examples", **arguments)
    return found


def check(found: tuple[list[Any], set[int]], positions: int, form: str = "stacked") -> None:
    """Compare within float32's rounding: 1e-5 is 80 units in the last digit of a loss."""
    for comparison in found[0]:
        assert comparison.form == form
        assert comparison.error < 1e-5
        assert comparison.apart > 1e-4
    assert found[1] == {positions}


FORMS = ["lockstep", "sequential"]
OTHERS = ["LoRA", "later, weighted", "candidates", "examples", *FORMS]


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return run_ranks(1, rank_of_models, CAUSAL, "low_rank")[0]


@pytest.mark.parametrize("name", [*CAUSAL, *OTHERS])
def test_logits_are_only_where_a_label_follows_and_give_the_losses_of_whole_forwards(
    one_rank: dict[str, Any], name: str
):
    check(one_rank[name], NUM_POSITIONS, name if name in FORMS else "stacked")


def test_sharded_parameters_and_gaussian_directions_give_the_same():
    for rank in run_ranks(2, rank_of_models, ["opt"], "gaussian"):
        for name in ("opt", *OTHERS):
            check(rank[name], NUM_POSITIONS, name if name in FORMS else "stacked")


def rank_of_models_without_positions() -> dict[str, list[Any]]:
    batch = [prompted_batch("llama")]
    return {
        form: [
            judged(model(), batch, evaluation=form)
            for model in (IgnoresPositions, TakesTheFirst, TakesANumber)
        ]
        for form in ("stacked", *FORMS)
    }


def test_a_model_that_gives_other_logits_at_positions_computes_all_of_them():
    (found,) = run_ranks(1, rank_of_models_without_positions)
    for form, of_models in found.items():
        for of_model in of_models:
            check(of_model, LENGTH, form)


class LogitsOfLabels(IgnoresPositions):
    """A model whose logits depend on labels that it is given."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        logits_to_keep: Any = 0,
    ) -> Any:
        if labels is None:
            input_ids = input_ids.flip(1)
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


class Counted(IgnoresPositions):
    """A model that notes the rows of which it computes its own loss."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        logits_to_keep: Any = 0,
    ) -> Any:
        self.own = [*getattr(self, "own", []), 0 if labels is None else len(labels)]
        return super().forward(input_ids, attention_mask, labels, logits_to_keep)


@torch.no_grad()
def rank_of_own_losses() -> dict[str, Any]:
    found: dict[str, Any] = {"of labels": [], "adopted": []}
    batch = prompted_batch("llama")
    for form in FORMS:
        compared = judged(LogitsOfLabels(), [batch], evaluation=form)
        found["of labels"].append(compared)
        # a log of an earlier version goes on with the model's own loss
        for from_logits in (False, True):
            engine = engine_of(Counted(), evaluation=form)
            engine._evaluator.adopt((form, 2, from_logits))
            engine._evaluator.losses(POINTS["two pairs"], batch)
            assert engine._evaluator.from_logits == from_logits
            engine.module.own = []
            engine._evaluator.losses(POINTS["two pairs"], batch)
            found["adopted"].append(engine.module.own)
    large = {key: torch.cat([value] * 4) for key, value in batch.items()}
    engine = engine_of(Counted(), evaluation="sequential")
    engine._evaluator.losses(POINTS["two pairs"], large)
    engine.module.own = []
    engine._evaluator.losses(POINTS["two pairs"], large, rechecks=True)
    return {**found, "rechecked": engine.module.own}


def test_a_model_computes_its_own_loss_where_its_logits_need_labels_or_a_log_says_so():
    (found,) = run_ranks(1, rank_of_own_losses)
    for (comparison,), widths in found["of labels"]:
        assert comparison.error < 1e-5
        assert widths == set()
    assert found["adopted"] == [[4] * 4, [0] * 4] * 2


def test_a_recheck_has_the_model_compute_its_own_loss_of_a_few_rows_alone():
    (found,) = run_ranks(1, rank_of_own_losses)
    assert found["rechecked"] == [0, 0, 0, 0, 4]


def rank_with_score() -> list[int]:
    engine = engine_of(zoo_model("llama"), objective="accuracy")
    seen: list[int] = []

    def score(logits: Tensor, given: Any, shifted: bool) -> Tensor:
        seen.append(logits.shape[1])
        return accuracy(logits, given, shifted)

    engine._evaluator._score = score
    engine._evaluator.losses(POINTS["two pairs"], prompted_batch("llama"))
    return seen


def test_a_score_sees_all_logits():
    (seen,) = run_ranks(1, rank_with_score)
    assert set(seen) == {LENGTH}
