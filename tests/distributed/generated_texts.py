"""Prompts, their tokenizer, a score of texts, and what transformers generates.

Shared by the tests of training on generated texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.distributed.zoo import VOCABULARY
from zods.data.text_scores import find_text_score

BATCH, LENGTH, NEW = 8, 7, 4
WORD = "tests.distributed.generated_texts:mean_word"
SECTION = {
    "method": "mezo",
    "eps": 5e-2,
    "lr": 1e-3,
    "seed": 5,
    "objective": WORD,
    "generate": {"max_new_tokens": NEW},
}
LOW_RANK = {"direction": {"distribution": "low_rank", "rank": 2}}
ONE = {**LOW_RANK, "examples_per_direction": 1}
# an objective over candidates, for `data_of`
WORDS = {
    "method": "mezo",
    "eps": 1e-2,
    "lr": 1e-3,
    "seed": 5,
    "objective": "candidates",
    **ONE,
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


def examples(seed: int = 1000) -> list[dict[str, Tensor]]:
    batch = batch_of(seed)
    return [{key: value[i] for key, value in batch.items()} for i in range(BATCH)]


def data_of(objective: str) -> list[dict[str, Any]]:
    """24 examples of two sources; for candidates each has one labelled token of four."""
    rows = [row for seed in range(1000, 1003) for row in examples(seed)]
    generator = torch.Generator().manual_seed(3)
    data = []
    for k, row in enumerate(rows):
        number = int(row["labels"].eq(-100).sum())
        more = {"source": "ab"[k % 2], "length": LENGTH - k % 3}
        if objective == "candidates":
            words = torch.randperm(VOCABULARY - 3, generator=generator)[:4] + 3
            ids = row["input_ids"].clone()
            ids[number] = words[k % 4]
            labels = torch.full_like(ids, -100)
            labels[number] = ids[number]
            data.append({**row, **more, "input_ids": ids, "labels": labels, "words": words})
        else:
            data.append({**row, **more})
    return data


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    names = {"words": "candidate_tokens"}
    keys = [key for key in rows[0] if key not in ("source", "length")]
    return {names.get(key, key): torch.stack([row[key] for row in rows]) for key in keys}


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


def opens_with_reference(texts: list[str], references: list[list[str]]) -> Tensor:
    """1 where a text begins with one of its references, 0 elsewhere."""
    found = [
        text.startswith(tuple(of_text)) for text, of_text in zip(texts, references, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)
