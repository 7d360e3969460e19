"""Prefix and prompt tuning: virtual tokens before the tokens of a row.

With prompt tuning a model also gives the logits of the virtual tokens.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers as hf

from zods.data.batch import CANDIDATES
from zods.data.evaluation import Candidates, Forwards
from zods.data.generation import Decoding, Prompts, Recomputed, generate
from zods.data.objectives import Objective, scored_losses
from zods.data.scores import SCORES, find_score
from zods.tasks.prompts import measure_answers

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# large weights, so that the tokens of a text differ. OPT and GPT-2 learn positions.
MODELS = {
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32, init_std=0.3)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    ),
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**SHAPE, intermediate_size=64, initializer_range=0.3)
    ),
}
KINDS = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
END, NEW, LENGTHS = 2, 6, (7, 3, 1, 5)


def model_of(name: str, kind: str) -> Any:
    torch.manual_seed(0)
    adapter = KINDS[kind](num_virtual_tokens=3, task_type="CAUSAL_LM")
    return peft.get_peft_model(MODELS[name](), adapter).eval()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask (4, 7)."""
    ids = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(1))
    return ids, (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_texts_after_virtual_tokens_are_those_of_transformers(name: str, kind: str):
    model, prompts = model_of(name, kind), Prompts(*rows())
    found = generate(Recomputed(lambda inputs: model(**inputs), prompts), Decoding(NEW, END, END))
    for ids, length, text in zip(prompts.input_ids, LENGTHS, found.tolist(), strict=True):
        expected = model.generate(
            input_ids=ids[None, :length],
            attention_mask=torch.ones(1, length, dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=END,
        )[0, length:].tolist()
        assert text[: len(expected)] == expected


@torch.no_grad()
def test_answers_after_virtual_tokens_have_the_likelihood_of_the_models_own_loss():
    model, (ids, mask) = model_of("gpt2", "prompt"), rows()
    ends = torch.tensor(LENGTHS)[:, None]
    is_answer = (torch.arange(7) < ends) & (torch.arange(7) >= ends - 2) & (torch.arange(7) > 0)
    labels = ids.where(is_answer, -100)
    forwards = Forwards(lambda inputs: model(**inputs), micro_batch=3)
    scored = Candidates(ids, mask, labels).run(forwards)
    with_answer = [0, 1, 3]
    logits = model(input_ids=ids, attention_mask=mask).logits[with_answer]
    (total, size), _ = measure_answers(logits, labels[with_answer]).values()
    expected = []
    for row in range(4):
        part = slice(row, row + 1), slice(LENGTHS[row])
        own = model(input_ids=ids[part], attention_mask=mask[part], labels=labels[part]).loss
        number = int(is_answer[row].sum())
        expected.append(float(own) if number else 0.0)
        assert float(scored["log_likelihood"][row]) == pytest.approx(-number * expected[-1], 1e-5)
    assert (total, size) == (pytest.approx(sum(expected), 1e-5), 3)


@torch.no_grad()
@pytest.mark.parametrize("name", SCORES)
def test_scores_are_of_the_tokens_after_virtual_ones(name: str):
    model, (ids, mask) = model_of("gpt2", "prompt"), rows()
    outputs = model(input_ids=ids, attention_mask=mask)
    predicted = outputs.logits.argmax(-1)[:, 3:]  # by the row's own tokens
    labels = torch.full_like(ids, -100)
    labels[0, 4], labels[1, 2] = predicted[0, 3], predicted[1, 1]  # right ones
    others = (labels.amax(1, keepdim=True) + torch.arange(3)).clamp(0, 63)
    batch = {"labels": labels, CANDIDATES: others}
    found = scored_losses(outputs, batch, Objective("examples", score=find_score(name)))[1]
    if name == "candidates":
        of_words = outputs.logits[0, 6].gather(0, others[0]).log_softmax(0)
        assert float(found[0]) == pytest.approx(-float(of_words[0]), 1e-5)
    else:
        assert found.tolist() == [-1.0, -1.0, 0.0, 0.0]
