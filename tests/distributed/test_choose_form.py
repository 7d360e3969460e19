"""The choice of the form of evaluation.

The form is chosen on a few examples and compared again on later batches. A form that does not fit
is left.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import signal
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

import zods
from tests.distributed import awkward
from tests.distributed.forms import dense_losses, engine_of
from tests.distributed.models import collate, configuration, opt_data, tiny_opt
from tests.distributed.ranks import run_ranks
from tests.helpers import LogTexts
from zods.comm.communicator import is_lost_connection
from zods.core.directions import Direction
from zods.core.points import Point
from zods.forward import choose_form
from zods.forward.choose_form import first_examples
from zods.forward.forms import Stacked
from zods.forward.model_forwards import ModelForwards

POINTS = [Point(5, 0.01), Point(5, -0.01)]


class PenaltyForAWord(awkward.Classifier):
    """A model whose loss has a further term for batches with a certain word."""

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = super().forward(ids, labels)
        if labels is not None:
            outputs["loss"] = (
                outputs["loss"] + (ids == 39).float().mean() * outputs["logits"].square().mean()
            )
        return outputs


class ClassWeights(awkward.Classifier):
    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.body(self.embed(ids)).mean(1))
        weights = torch.arange(1.0, awkward.CLASSES + 1)
        return {"logits": logits} | (
            {} if labels is None else {"loss": functional.cross_entropy(logits, labels, weights)}
        )


class Experts(awkward.Classifier):
    """A model that sends each example to one expert. Experts without examples are not called."""

    def build(self) -> None:
        self.router = nn.Linear(awkward.WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(awkward.WIDTH, awkward.WIDTH) for _ in range(4))

    def body(self, x: Tensor) -> Tensor:
        chosen, routed = self.router(x.mean(1)).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                routed[rows] = expert(x[rows])
        return torch.tanh(routed)


class AsOftenAsNeeded(awkward.Classifier):
    """A model that repeats a layer until the state of the whole batch is large enough."""

    def body(self, x: Tensor) -> Tensor:
        for _ in range(8):
            x = torch.tanh(self.block(x)) + x
            if x.abs().mean() > 1.5:
                break
        return x


class Noisy(awkward.Classifier):
    """A model that draws random numbers in eval mode."""

    def body(self, x: Tensor) -> Tensor:
        return super().body(x + 0.1 * torch.randn_like(x))


def chaotic() -> nn.Module:
    """A Gemma whose norms have large weights, so that rounding errors grow with each layer."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "num_hidden_layers": 9,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    }
    config = hf.Gemma3TextConfig(
        vocab_size=512,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=8,
        initializer_range=0.1,
        **shape,
    )
    model = hf.Gemma3ForCausalLM(config)
    for name, param in model.named_parameters():
        if "norm" in name:
            param.data.add_(20 * torch.rand_like(param))
    return model


class Dropped(awkward.Classifier):
    def build(self) -> None:
        self.dropout = nn.Dropout(0.5)

    def body(self, x: Tensor) -> Tensor:
        return super().body(self.dropout(x))


def batch_of_class(kind: int) -> dict[str, Tensor]:
    return {**awkward.words(4, 6), "labels": torch.full((4,), kind)}


def without_word(batch: dict[str, Tensor], word: int = 39) -> dict[str, Tensor]:
    return {**batch, "ids": batch["ids"].where(batch["ids"] != word, 0)}


def said_by(engine: Any, batches: list[Any]) -> dict[str, Any]:
    """Evaluate batches, in the form chosen and in separate forwards.

    Returns the largest relative error of the losses, the forms of evaluation, and the messages.
    """
    said, logger = LogTexts(), logging.getLogger("zods")
    logger.setLevel(logging.INFO)
    plain = copy.deepcopy(engine.module)
    errors, forms = [], []
    with torch.no_grad():
        for number, batch in enumerate(batches):
            found = engine._evaluator.losses(POINTS, batch, rechecks=number > 0).means
            forms.append(engine.evaluation)
            truth = dense_losses(plain, POINTS, batch, Direction())
            errors.append(((found - truth) / truth).abs().max().item())
    logger.removeHandler(said)
    return {"errors": errors, "forms": forms, "said": said.texts}


def forms_of_groups(model: nn.Module, batches: list[Any]) -> list[str | None]:
    """The forms of batches whose halves have points of their own."""
    engine = engine_of(model, examples_per_direction=2)
    points = [
        Point(seed, sign * 0.01, rows=rows)
        for seed, rows in ((5, (0, 1)), (6, (2, 3)))
        for sign in (1, -1)
    ]
    forms = []
    for number, batch in enumerate(batches):
        with torch.no_grad():
            engine._evaluator.losses(points, batch, rechecks=number > 0)
        forms.append(engine.evaluation)
    return forms


def rank_of_later_batches() -> dict[str, Any]:
    later = [awkward.words(4, 6, seed=k) for k in range(1, 9)]
    one_word = {**awkward.words(4, 6), "ids": torch.full((4, 6), 39)}
    plain = without_word(awkward.words(4, 6))
    in_last_row = {**plain, "ids": torch.cat([plain["ids"][:3], one_word["ids"][3:]])}
    return {
        "penalty": said_by(
            engine_of(PenaltyForAWord()), [without_word(awkward.words(4, 6)), one_word, *later]
        ),
        "penalty, one by one": said_by(
            engine_of(PenaltyForAWord(), evaluation="sequential"),
            [without_word(awkward.words(4, 6)), one_word, *later],
        ),
        "weights": said_by(engine_of(ClassWeights()), [batch_of_class(0), *later]),
        "experts": said_by(engine_of(Experts()), later),
        "adaptive": said_by(engine_of(AsOftenAsNeeded()), later),
        "noisy": said_by(engine_of(Noisy()), later[:1]),
        "groups": forms_of_groups(PenaltyForAWord(), [plain, plain, in_last_row]),
    }


@pytest.fixture(scope="module")
def later() -> dict[str, Any]:
    return run_ranks(1, rank_of_later_batches)[0]


def test_a_term_of_the_loss_that_only_a_later_batch_has_is_reported_once(later):
    found = later["penalty"]
    assert found["forms"][:2] == ["stacked", "lockstep"]
    assert max(found["errors"]) < 1e-5
    (warning,) = [text for text in found["said"] if "from now on" in text]
    assert "on this batch the model's loss is" in warning


def test_separate_forwards_have_a_term_of_the_loss_that_only_a_later_batch_has(later):
    found = later["penalty, one by one"]
    assert max(found["errors"]) < 1e-5
    (warning,) = [text for text in found["said"] if "from now on" in text]
    assert "with the model's own loss from now on: on this batch it is" in warning


def test_a_term_of_the_loss_is_noticed_in_any_group_of_rows(later):
    assert later["groups"] == ["stacked", "stacked", "lockstep"]


def test_class_weights_are_noticed_though_the_first_batch_holds_one_class(later):
    found = later["weights"]
    assert set(found["forms"]) == {"lockstep"}
    assert max(found["errors"]) < 1e-5


def test_routed_experts_give_each_point_its_own_loss(later):
    found = later["experts"]
    assert found["forms"][-1] == "sequential"
    assert max(found["errors"]) < 1e-5
    assert sum("sequential" in text for text in found["said"]) == 1


def test_a_model_that_branches_on_its_activations_is_not_stacked(later):
    """In a stack the model would decide once for all points together."""
    assert "stacked" not in later["adaptive"]["forms"]
    assert max(later["adaptive"]["errors"]) < 1e-5


def test_a_model_that_is_random_in_eval_mode_is_reported(later):
    (text,) = [text for text in later["noisy"]["said"] if "random" in text]
    assert "random in eval mode" in text
    assert later["noisy"]["forms"] == ["sequential"]


def rank_of_a_diverged_model() -> tuple[bool, str | None]:
    """Whether the losses at a recheck are NaN, and the form after it."""
    engine = engine_of(tiny_opt())
    batch = collate(opt_data(4))
    with torch.no_grad():
        engine._evaluator.losses(POINTS, batch)
        engine.module.model.decoder.layers[0].fc1.weight.fill_(math.nan)
        found = engine._evaluator.losses(POINTS, batch, rechecks=True).means
    return bool(found.isnan().all()), engine.evaluation


def test_losses_that_are_not_numbers_pass_the_comparison_of_a_later_batch():
    assert run_ranks(1, rank_of_a_diverged_model) == [(True, "stacked")]


@pytest.mark.parametrize(
    ("dtype", "count", "allowed"),
    [(torch.bfloat16, 1, 0.3125), (torch.bfloat16, 16, 0.078125), (torch.float32, 1, 4.8e-6)],
)
def test_the_rounding_of_a_loss_follows_from_the_largest_logit_and_the_labels(
    dtype, count, allowed
):
    logits = torch.tensor([[-1e9, 20.0], [3.0, 4.0], [-math.inf, math.nan]])
    forwards = types.SimpleNamespace(dtype=dtype)
    found = ModelForwards.rounding_of_loss(forwards, {"logits": logits}, count)
    assert found == pytest.approx(allowed, rel=0.01)


def rank_of_chaos() -> dict[str, str]:
    ids = torch.randint(5, 512, (4, 24), generator=torch.Generator().manual_seed(1))
    gemma = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    cases = [
        ("chaotic", chaotic, gemma, choose_form.MOST_ROUNDINGS),
        ("chaotic, rounding not allowed for", chaotic, gemma, 0),
        ("mixes examples", awkward.MixesExamples, awkward.words(4, 6), choose_form.MOST_ROUNDINGS),
    ]
    found: dict[str, str] = {}
    for name, make, batch, choose_form.MOST_ROUNDINGS in cases:
        engine = engine_of(make(), direction="low_rank", eps=1e-3)
        engine(batch)
        found[name] = engine.evaluation
    return found


def test_a_chaotic_model_is_stacked_where_only_rounding_errors_tell_it_from_separate_forwards():
    """A model that mixes examples is refused even for points that are far apart.

    Rounding errors do not explain its difference.
    """
    (found,) = run_ranks(1, rank_of_chaos)
    refused = "chaotic, rounding not allowed for"
    assert found == {"chaotic": "stacked", refused: "lockstep", "mixes examples": "lockstep"}


def rank_of_modes() -> dict[str, list[float]]:
    found = {}
    for who in ("nobody", "user", "user, in a part"):
        model = Dropped()
        engine = engine_of(model, lr=0.0)
        losses = []
        for k in range(3):
            {"nobody": list, "user": model.train, "user, in a part": model.dropout.train}[who]()
            loss = engine(awkward.words(4, 6, seed=k))
            engine.backward(loss)
            engine.step()
            losses.append((engine.last_step.loss, engine.last_step.projected_grad))
        found[who] = losses
    return found


def test_dropout_is_off_in_a_step_in_either_mode_of_the_model():
    (found,) = run_ranks(1, rank_of_modes)
    assert found["nobody"] == found["user"] == found["user, in a part"]


def rank_of_two_engines() -> tuple[list[float], bool]:
    model, losses = awkward.Classifier(), []
    for _ in range(2):
        engine = engine_of(model, lr=0.0)
        losses.append(float(engine(awkward.words(4, 6))))
        engine.close()
    return losses, any("forward" in vars(module) for module in model.modules())


def test_a_model_can_be_given_to_another_engine_when_the_first_is_closed():
    ((first, second), wrapped) = run_ranks(1, rank_of_two_engines)[0]
    assert first == second
    assert not wrapped


def test_the_first_examples_are_taken_from_a_dict_of_tensors_with_a_row_per_example():
    rows = {"ids": torch.arange(12).view(6, 2), "labels": torch.arange(6), "use_cache": False}
    cut = first_examples(rows, 4)
    assert torch.equal(cut["ids"], rows["ids"][:4])
    assert torch.equal(cut["labels"], rows["labels"][:4])
    assert cut["use_cache"] is False
    for whole in (
        {**rows, "edges": torch.zeros(2, 9)},
        {**rows, "texts": ["a"] * 6},
        (rows["ids"], rows["labels"]),
    ):
        assert first_examples(whole, 4) is whole


def rank_of_zero_gradients() -> list[str]:
    """Steps on a parameter that the loss does not depend on."""
    said = LogTexts()
    model = Experts()
    model.unused = nn.Linear(3, 3)
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith("unused"))
    engine = engine_of(model)
    for _ in range(3):
        engine.backward(engine(awkward.words(4, 6)))
        engine.step()
    return [text for text in said.texts if "exactly 0" in text]


def test_a_projected_gradient_of_exactly_0_is_reported_once():
    assert [len(said) for said in run_ranks(2, rank_of_zero_gradients)] == [1, 0]


def rank_of_a_rank_that_leaves_the_form() -> dict[str, Any]:
    """Steps with experts that stop fitting the stacked form on one rank.

    At different points the router may send this rank's examples to different experts. It keeps the
    other rank's examples together.
    """
    engine = engine_of(Experts(), stage=0, agreement_interval=1, eps=0.1)
    rank, forms = torch.distributed.get_rank(), []
    for step in range(12):
        batch = awkward.words(4, 6, seed=100 * rank + step) if rank else awkward.words(4, 6)
        loss = engine(batch)
        forms.append(engine.evaluation)
        engine.backward(loss)
        engine.step()
    return {"forms": forms, "head": engine.trajectory.head}


def test_all_ranks_leave_a_form_together_that_does_not_fit_a_later_batch_of_one_rank():
    first, second = run_ranks(2, rank_of_a_rank_that_leaves_the_form)
    assert first == second
    assert first["forms"][0] != first["forms"][-1] == "sequential"


def rank_of_later_hooks() -> list[float]:
    """The steps before and after a hook is registered that uses a parameter of its module."""
    model = awkward.Classifier()
    model.block.extra = nn.Parameter(torch.randn(awkward.WIDTH))
    for name, param in model.named_parameters():
        param.requires_grad_(name == "block.extra")
    engine, slopes = engine_of(model), []
    for step in range(3):
        if step == 1:
            model.block.register_forward_hook(lambda m, args, output: output * m.extra)
        engine.backward(engine(awkward.words(4, 6)))
        engine.step()
        slopes.append(engine.last_step.projected_grad)
    return slopes


def test_a_hook_that_is_registered_between_steps_sees_perturbed_parameters():
    (slopes,) = run_ranks(1, rank_of_later_hooks)
    assert slopes[0] == 0.0
    assert all(slopes[1:])


def rank_of_a_closed_engine() -> str:
    engine = engine_of(awkward.Classifier())
    engine.close()
    try:
        engine(awkward.words(4, 6))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_closed_engine_makes_no_steps():
    assert "the engine is closed" in run_ranks(1, rank_of_a_closed_engine)[0]


def rank_of_lost_connection(found: Path) -> None:
    # parameters are released after each module, as large ones are
    released = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    config = configuration(4, method="mezo", top=released)
    engine = zods.initialize(model=tiny_opt(), config=config)[0]
    record = Stacked.record

    def last(form: Stacked, *arguments: Any) -> Any:
        outputs = record(form, *arguments)
        if torch.distributed.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return outputs

    Stacked.record = last
    try:
        engine(collate(opt_data(2)))
    except Exception as error:
        found.write_text(f"{is_lost_connection(error)}: {error!r}")


def test_a_rank_that_is_killed_during_the_choice_is_a_lost_connection_and_no_misfit(tmp_path):
    with pytest.raises(pytest.fail.Exception):
        run_ranks(2, rank_of_lost_connection, tmp_path / "found")
    assert (tmp_path / "found").read_text().startswith("True: ")
