"""Greedy generation with and without a cache, and the scores of its texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from tests.unit.tiny_tasks import make_tokenizer
from zods.data.batch import accepted_arguments
from zods.data.generation import (
    Cached,
    Decoding,
    Prompts,
    Recomputed,
    generate,
    largest_difference,
)
from zods.data.text_scores import TextObjective, find_text_score, prompts_of

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SHAPE, "intermediate_size": 64, "initializer_range": 0.3}
SLIDING = {**WIDE, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 6}
# large weights, so that the tokens of a text differ
MODELS = {
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32, init_std=0.3)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=16)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    ),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3)
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SLIDING)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SLIDING)),
}
LENGTHS = (9, 4, 6, 1)
END, NEW = 2, 8


def model_and_prompts(name: str) -> tuple[Any, Prompts]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    ids = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor(LENGTHS)[:, None]).long()
    return model, Prompts(ids, mask)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_texts_with_a_cache_are_those_without_and_those_of_transformers(name):
    model, prompts = model_and_prompts(name)

    def outputs(inputs: dict[str, Any]) -> Any:
        return model(**inputs)

    arguments = accepted_arguments(model)
    decoding = Decoding(NEW, END, pad=END)
    cached = generate(Cached(outputs, prompts, arguments), decoding)
    recomputed = generate(Recomputed(outputs, prompts), decoding)
    assert cached.tolist() == recomputed.tolist()
    error = largest_difference(
        Cached(outputs, prompts, arguments), Recomputed(outputs, prompts), NEW
    )
    assert error < 1e-5  # rounding of float32
    for ids, length, found in zip(prompts.input_ids, LENGTHS, cached.tolist(), strict=True):
        expected = model.generate(
            ids[None, :length],
            attention_mask=torch.ones(1, length, dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=END,
        )[0, length:].tolist()
        assert found[: len(expected)] == expected
        assert set(found[len(expected) :]) <= {END}


@torch.no_grad()
def test_a_cached_forward_after_the_first_has_one_position():
    model, prompts = model_and_prompts("llama")
    widths = []

    def outputs(inputs: dict[str, Any]) -> Any:
        widths.append(inputs["input_ids"].shape[1])
        return model(**inputs)

    generate(Cached(outputs, prompts, accepted_arguments(model)), Decoding(4, -1, 0))
    assert widths == [9, 1, 1, 1]


def test_generation_goes_on_for_the_ranks_that_have_not_ended():
    calls = []

    def ended(tokens: Any) -> torch.Tensor:
        calls.append(tokens)
        return torch.tensor([[0.0, 1.0, 0.0]])

    assert generate(ended, Decoding(5, end=1, pad=2)).tolist() == [[1]]
    found = generate(ended, Decoding(3, end=1, pad=2), largest=lambda number: number + 1)
    assert found.tolist() == [[1, 2, 2]]
    assert len(calls) == 1 + 3


def test_a_prompt_ends_before_the_first_label_wherever_its_padding_is():
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 7], [8, 9, 4, 3, 0]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, -100, -100, 6, 7], [-100, -100, -100, 3, -100]]),
    }
    ids, mask = prompts_of(batch)
    assert [row[of_row == 1].tolist() for row, of_row in zip(ids, mask, strict=True)] == [
        [5],
        [8, 9, 4],
    ]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.ones(1, 2).long(), "labels": torch.ones(1, 2).long()}, "no prompt"),
        ({"input_ids": torch.ones(1, 2).long(), "labels": torch.ones(1).long()}, "found dict with"),
        ((torch.ones(1, 2),), "found tuple"),
    ],
)
def test_a_batch_without_prompts_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        prompts_of(batch)


def text_objective(name: str) -> TextObjective:
    return TextObjective(find_text_score(name), make_tokenizer("gpt2"), 8)


@pytest.mark.parametrize(
    ("name", "expected"), [("exact_match", [1.0, 0.0, 0.0]), ("f1", [1.0, 2 / 3, 0.0])]
)
def test_texts_are_scored_up_to_the_end_of_sequence_or_of_the_first_line(name, expected):
    objective = text_objective(name)
    texts = ["The great fun!</s> plot", " fun\nplot", "plot"]
    rows = [objective.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [objective.decoding.pad] * (width - len(row)) for row in rows])
    references = [["terrible", "great fun"], ["great fun"], ["fun"]]
    assert objective.scores(tokens, references).tolist() == pytest.approx(expected)


def test_references_are_the_text_of_the_first_answer_unless_the_batch_has_them():
    objective = text_objective("f1")
    answer, later = (objective.tokenizer(text)["input_ids"] for text in (" great fun</s>", " plot"))
    batch: dict[str, Any] = {"labels": torch.tensor([[-100, *answer, -100, *later]])}
    assert objective.references(batch) == [["great fun"]]
    given = [["a", "b"]]
    assert objective.references({**batch, "example_references": given}) == given


def no_tensor(texts: list[str], references: list[list[str]]) -> list[float]:
    return [0.0 for _ in texts]


def test_a_function_of_texts_that_returns_no_scores_is_named():
    score = find_text_score("tests.unit.test_generation:no_tensor")
    with pytest.raises(ValueError, match=r"no_tensor\" returned list for 1 examples"):
        score(["a"], [["b"]])
