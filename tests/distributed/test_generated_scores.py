"""Steps on scores of generated texts, against the dense reference.

The reference generates the text of each example at each point by itself, by transformers'
`generate` with the perturbed weights, in float64.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import zods
from tests.distributed.generated_texts import (
    BATCH,
    LENGTH,
    LOW_RANK,
    NEW,
    ONE,
    SECTION,
    batch_of,
    examples,
    loss_of_texts,
    rows_of,
    word_tokenizer,
)
from tests.distributed.models import configuration, numpy_of, whole
from tests.distributed.ranks import run_ranks
from tests.distributed.zoo import with_adapters, zoo_model
from tests.helpers import LogTexts, sampled
from tests.reference.dense import DenseReference, named_parameters_of
from zods.training.resume import LOG_NAME
from zods.trajectory.log import read_log
from zods.trajectory.records import Refresh, Step

STEPS = 3
# Parameters are released after each module, as large ones are.
RELEASED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
SVRG = {"method": "mezo_svrg", "anchor_interval": 2, "anchor_directions": 2, "anchor_split": False}
# (model, keys of the section) by name
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}, 1": (name, ONE) for name in ("opt", "llama", "gpt2", "qwen3", "mistral")},
    "adapters, 1": ("adapters", ONE),
    "mamba, no cache": ("mamba", ONE),
    "without a cache, uneven": (
        "without a cache",
        {**LOW_RANK, "examples_per_direction": 5, "top": RELEASED},
    ),
    "gpt2, gaussian": ("gpt2", {"num_directions": 2}),
    "llama, rademacher, 4": ("llama", {"direction": "rademacher", "examples_per_direction": 4}),
    "opt, svrg": ("opt", {**ONE, **SVRG}),
    "opt, accumulation": ("opt", {**LOW_RANK, "examples_per_direction": 3, "accumulation": 2}),
    "opt, offload": ("opt", {**ONE, "offload": "cpu"}),
    "opt, stage 0, uneven": ("opt", {**LOW_RANK, "examples_per_direction": 5, "stage": 0}),
    "opt, uneven": ("opt", {**LOW_RANK, "examples_per_direction": 5, "top": RELEASED}),
    "opt, two at a time": ("opt", {**ONE, "num_directions": 3, "stream_memory_gb": 1.5e-4}),
    **{
        f"opt, {form}, uneven": (
            "opt",
            {"examples_per_direction": 5, "evaluation": form, "top": RELEASED},
        )
        for form in ("sequential", "lockstep")
    },
    "llama, f1": ("llama", {**ONE, "objective": "f1"}),
}
RANKS = {"llama, f1": 1}  # the others have 2
# each form, with and without a cache, by both kinds of direction, and what ranks share unevenly
DEFAULT = (
    *("opt, 1", "adapters, 1", "mamba, no cache", "without a cache, uneven", "gpt2, gaussian"),
    *("opt, svrg", "opt, lockstep, uneven", "llama, f1"),
)


class WithoutCache(nn.Module):
    """A model that can be stacked, and takes no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo_model("llama")
        self.generate = self.inner.generate

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Any:
        return self.inner(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False
        )


def model_of(name: str) -> Any:
    if name == "without a cache":
        return WithoutCache().eval()
    return with_adapters("llama") if name == "adapters" else zoo_model(name)


def engine_of(model: str, **keys: Any) -> Any:
    data = examples() if keys.get("method") == "mezo_svrg" else None
    return zods.initialize(
        model=model_of(model),
        config=configuration(BATCH, **{**SECTION, **keys}),
        training_data=data,
        tokenizer=word_tokenizer(),
    )[0]


def rank_of_steps(folder: Path, name: str) -> dict[str, Any]:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model, keys = CASES[name]
    logging.getLogger("zods").setLevel(logging.INFO)
    texts = LogTexts("zods.forward")
    engine = engine_of(model, **keys)
    engine.resume(folder)
    accumulation = keys.get("accumulation", 1)
    size = BATCH // (ranks * accumulation)
    losses = []
    for step in range(STEPS):
        batch = batch_of(step, "objective" in keys)
        for micro in range(accumulation):
            start = (micro * ranks + rank) * size
            engine.backward(engine(rows_of(batch, start, start + size)))
            engine.step()
        losses.append(engine.last_step.loss)
    return {"losses": losses, "after": numpy_of(whole(engine)), "said": texts.texts}


def dense_run(name: str, coefficients: list[tuple[float, ...]]) -> tuple[DenseReference, Any]:
    """The steps of the reference, with the logged coefficients where its own round to them."""
    model_name, keys = CASES[name]
    model = model_of(model_name).double()
    section = {**SECTION, **keys}
    objective = section.pop("objective")
    for key in ("evaluation", "stream_memory_gb", "accumulation", "stage", "top", "offload"):
        section.pop(key, None)
    del section["generate"]
    if isinstance(section.get("direction"), dict):
        section |= {"direction": "low_rank", "rank": 2}
    logged = iter(coefficients)

    def rounded(own: list[float]) -> list[float]:
        np.testing.assert_allclose(next_logged := next(logged), own, rtol=2.0**-8, atol=1e-9)
        return list(next_logged)

    data = batch_of(1000)
    dense = DenseReference(
        params=named_parameters_of(model),
        trainable={key for key, p in model.named_parameters() if p.requires_grad},
        loss=loss_of_texts(model, objective),
        whole_set=data,
        rounded=rounded,
        **section,
    )
    return dense, [dense.step(batch_of(step, "objective" in keys)) for step in range(STEPS)]


@pytest.mark.parametrize("name", sampled(CASES, DEFAULT))
def test_steps_on_generated_texts_agree_with_the_dense_reference(tmp_path, name):
    found = run_ranks(RANKS.get(name, 2), rank_of_steps, tmp_path, name)
    records = [r for r in read_log(tmp_path / LOG_NAME).records if isinstance(r, (Step, Refresh))]
    dense, losses = dense_run(name, [r.coefficients for r in records])
    assert any(c for r in records for c in r.coefficients), "the scores tell points apart"
    for of_rank in found:
        np.testing.assert_allclose(of_rank["losses"], losses, rtol=1e-6)
        for key, expected in dense.params.items():
            np.testing.assert_allclose(of_rank["after"][key], expected.numpy(), rtol=0, atol=1e-5)
    said = "; ".join(found[0]["said"])
    if "cache" in name:
        assert "generation: without" in said
        assert name != "without a cache, uneven" or "one point at a time" in said
    elif "lockstep" not in name and "sequential" not in name:
        assert "generation in a step: for all points together" in said
    else:
        assert "generation: with a cache of keys and values" in said


# --- virtual tokens -------------------------------------------------------------------------------

# a model for each way to count positions: learned, by the mask and by the cache; and rotary
VIRTUAL = [(name, peft.PrefixTuningConfig) for name in ("opt", "gpt2", "llama")]
VIRTUAL += [(name, peft.PromptTuningConfig) for name in ("gpt2", "llama")]


def rank_of_virtual_tokens() -> list[tuple[float, float, str]]:
    """Of each model: minus the mean score at the parameters, by a step and by transformers, and what
    a step says.
    """
    logging.getLogger("zods").setLevel(logging.INFO)
    found = []
    for name, kind in VIRTUAL:
        torch.manual_seed(1)
        # of OPT and GPT-2 so many positions are learned
        model = peft.get_peft_model(
            zoo_model(name), kind(num_virtual_tokens=64 - LENGTH - NEW, task_type="CAUSAL_LM")
        )
        texts, score = LogTexts("zods.forward"), loss_of_texts(model.eval(), SECTION["objective"])
        params = {key: p.detach().clone() for key, p in model.named_parameters()}
        expected = score(params, batch_of(0))
        section = {**SECTION, "eps": 1e-7, "lr": 0.0}
        arguments = {"model": model, "tokenizer": word_tokenizer()}
        engine = zods.initialize(config=configuration(BATCH, **section), **arguments)[0]
        found.append((float(engine(batch_of(0))), expected, "; ".join(texts.texts)))
        engine.close()
        section["generate"] = {"max_new_tokens": NEW + 3}
        engine = zods.initialize(config=configuration(BATCH, **section), **arguments)[0]
        with pytest.raises(
            ValueError, match=r"tokens after 53 virtual tokens and the model 64 pos"
        ):
            engine(batch_of(0))
        engine.close()
    return found


def test_texts_after_virtual_tokens_are_those_of_transformers():
    """peft passes its own virtual tokens in place of a cache, so that whole forwards are made."""
    (found,) = run_ranks(1, rank_of_virtual_tokens)
    for loss, expected, said in found:
        assert loss == pytest.approx(expected)
        assert "generation: without" in said


# --- memory ---------------------------------------------------------------------------------------


def rank_of_budgets() -> tuple[dict[int, float], dict[int, tuple[list[int], float]]]:
    """The bytes that a pair of points takes, by the most new tokens; and by the number of pairs for
    which there is memory, the rows of each forward of a step, and its loss.
    """
    needed = {}
    for new in (2, NEW, 40):
        engine = engine_of("opt", **ONE, stream_memory_gb=1e-9, generate={"max_new_tokens": new})
        with pytest.raises(ValueError, match=r"stream_memory_gb: found 1e-09") as caught:
            engine(batch_of(0))
        needed[new] = float(str(caught.value).split("takes ")[1].split(" GiB")[0]) * 2**30
        engine.close()
    steps = {}
    for pairs in (1, 2):
        budget = 1.01 * pairs * needed[NEW] / 2**30
        engine = engine_of("opt", **ONE, num_directions=2, stream_memory_gb=budget)
        engine.backward(engine(batch_of(0)))
        rows: list[int] = []
        hook = engine.module.register_forward_pre_hook(
            lambda _m, _a, kw, rows=rows: rows.append(len(kw["input_ids"])), with_kwargs=True
        )
        loss = float(engine(batch_of(0)))
        hook.remove()
        engine.close()
        steps[pairs] = rows, loss
    return needed, steps


def test_the_cache_of_all_new_tokens_counts_in_the_memory_of_a_point():
    ((needed, steps),) = run_ranks(1, rank_of_budgets)
    # keys and values of two layers, for a token of each row of a pair
    cached = 2 * 2 * 32 * 4 * BATCH * 2
    assert needed[40] - needed[2] == pytest.approx(38 * cached, rel=0.1)
    assert needed[40] > 45 * cached
    assert set(steps[1][0]) == {2 * BATCH}
    assert set(steps[2][0]) == {4 * BATCH}
    assert steps[1][1] == pytest.approx(steps[2][1])


# --- what such steps do, and what is refused ------------------------------------------------------


def rank_of_seeds(seeds: range) -> list[tuple[float, float]]:
    """The mean F1 of the first and of the last steps, of training to say three words."""
    found = []
    for seed in seeds:
        data = examples() * 2
        engine = zods.initialize(
            model=model_of("opt"),
            config=configuration(
                BATCH,
                **{**SECTION, **LOW_RANK, "seed": seed, "objective": "f1", "lr": 1e-2},
                num_directions=4,
            ),
            training_data=data,
            collate_fn=says_three_words,
            tokenizer=word_tokenizer(),
        )[0]
        scores = [-engine.train_batch() for _ in range(60)]
        found.append((sum(scores[:5]) / 5, sum(scores[-5:]) / 5))
        engine.close()
    return found


def says_three_words(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return {**batch, "example_references": [["w9 w8 w7"]] * len(rows)}


@pytest.mark.slow  # three runs
def test_steps_on_the_f1_of_generated_texts_raise_it():
    (found,) = run_ranks(1, rank_of_seeds, range(3))
    for first, last in found:
        assert last > first + 0.2


def rank_of_mistakes() -> list[str]:
    said = []
    for model, keys in (
        (model_of("opt"), {}),
        (model_of("opt"), {"tokenizer": PreTrainedTokenizerFast(tokenizer_object=no_end())}),
        (zoo_model("t5"), {"tokenizer": word_tokenizer()}),
        (zoo_model("bert"), {"tokenizer": word_tokenizer()}),
    ):
        with pytest.raises(ValueError, match=r".") as caught:
            zods.initialize(model=model, config=configuration(BATCH, **SECTION), **keys)
        said.append(str(caught.value))
    engine = engine_of("opt", generate={"max_new_tokens": 100})
    with pytest.raises(ValueError, match=r".") as caught:
        engine(batch_of(0))
    return [*said, str(caught.value)]


def rank_of_asked_stacks() -> tuple[list[str], list[float]]:
    """The refusals of a model without a cache, and the losses of a model that fits a stack."""
    engine, said = engine_of("without a cache", **ONE, evaluation="stacked"), []
    for _ in range(2):  # also when the caller tries again
        with pytest.raises(ValueError, match=r".") as caught:
            engine(batch_of(0))
        said.append(str(caught.value))
    engine.close()
    losses = []
    for form in ("stacked", "sequential"):
        engine = engine_of("opt", **ONE, evaluation=form)
        losses.append(float(engine(batch_of(0))))
        assert engine.evaluation == form
        engine.close()
    return said, losses


def test_a_stack_that_is_asked_for_generates_the_texts_of_separate_forwards_or_is_refused():
    ((said, losses),) = run_ranks(1, rank_of_asked_stacks)
    for message in said:
        assert message.startswith('zeroth_order.evaluation: "stacked" does not fit the generation')
        assert message.endswith('Use "auto".')
    assert losses[0] == pytest.approx(losses[1])


def no_end() -> Tokenizer:
    return Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))


def test_what_cannot_generate_text_is_refused_at_the_start():
    (said,) = run_ranks(1, rank_of_mistakes)
    missing, without_end, pairs, classifier, too_long = said
    assert "tokenizer: missing; zeroth_order.generate" in missing
    assert "without eos_token" in without_end
    assert "found T5ForConditionalGeneration" in pairs
    assert "found BertForSequenceClassification" in classifier
    assert "generate.max_new_tokens: found 100, but a prompt has 6 tokens" in too_long
