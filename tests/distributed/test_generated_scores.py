"""Steps on scores of generated texts, against the dense reference.

The reference generates the text of each example at each point by itself, by transformers'
`generate` with the perturbed weights, in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import zods
from tests.distributed.models import configuration, numpy_of, whole
from tests.distributed.ranks import run_ranks
from tests.distributed.zoo import VOCABULARY, with_adapters, zoo_model
from tests.helpers import LogTexts
from tests.reference.dense import DenseReference, named_parameters_of
from zods.data.text_scores import find_text_score
from zods.training.resume import LOG_NAME
from zods.trajectory.log import read_log
from zods.trajectory.records import Refresh, Step

BATCH, LENGTH, NEW, STEPS = 8, 7, 4, 3
WORD = "tests.distributed.test_generated_scores:mean_word"
SECTION = {
    "method": "mezo",
    "eps": 5e-2,
    "lr": 1e-3,
    "seed": 5,
    "objective": WORD,
    "generate": {"max_new_tokens": NEW},
}
# Parameters are released after each module, as large ones are.
RELEASED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
LOW_RANK = {"direction": {"distribution": "low_rank", "rank": 2}}
ONE = {**LOW_RANK, "examples_per_direction": 1}
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


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The text of token i is "wi"; token 2 ends a text."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w1")


def mean_word(texts: list[str], references: list[list[str]]) -> Tensor:
    """A score that another token changes: of each text, and of its references."""
    numbers = [
        [int(word[1:]) for text in (text, *of_text) for word in text.split()]
        for text, of_text in zip(texts, references, strict=True)
    ]
    return torch.tensor([sum(of_text) / VOCABULARY for of_text in numbers], dtype=torch.float64)


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


def batch_of(step: int, has_references: bool = False) -> dict[str, Any]:
    """The global batch of a step. Prompts have different numbers of tokens."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH, (BATCH, 1), generator=generator)
    labels = ids.masked_fill(torch.arange(LENGTH) < lengths, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if has_references:
        words = [" ".join(f"w{i}" for i in range(k, 50, 3)) for k in range(3)]
        return {**batch, "example_references": [words[: 1 + i % 3] for i in range(BATCH)]}
    return batch


def rows_of(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    return {key: value[start:stop] for key, value in batch.items()}


def examples() -> list[dict[str, Tensor]]:
    batch = batch_of(1000)
    return [{key: value[i] for key, value in batch.items()} for i in range(BATCH)]


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


def loss_of_texts(model: Any, objective: str) -> Callable[[dict[str, Tensor], Any], float]:
    """Minus the mean score of texts that transformers generates, one example at a time."""
    score, tokenizer = find_text_score(objective), word_tokenizer()

    @torch.no_grad()
    def loss(params: dict[str, Tensor], batch: dict[str, Any]) -> float:
        for name, param in model.named_parameters():
            param.data = params[name]
        texts = []
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            prompt = ids[labels == -100][None]
            found = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=1,
            )
            texts.append(tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True))
        answers = [[tokenizer.decode(row[row > 2])] for row in batch["labels"]]
        return -float(score(texts, batch.get("example_references", answers)).mean())

    return loss


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


@pytest.mark.parametrize(("ranks", "name"), [(2, name) for name in CASES] + [(1, "opt, 1")])
def test_steps_on_generated_texts_agree_with_the_dense_reference(tmp_path, ranks, name):
    found = run_ranks(ranks, rank_of_steps, tmp_path, name)
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
