"""The share of a step's time that is spent in the loader. Caller: `step_time.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from common import opt_125m, single_rank_engine, tiny_opt
from transformers import AutoModelForCausalLM

from zods.tasks.task import pad_inputs, pad_right

QUICKSTART = Path(__file__).parents[1] / "launch" / "quickstart" / "model"
BATCH_SIZE = 16
VOCABULARY = 1000  # of the tokens drawn; all models have more


def text_table(num_examples: int, length: int) -> datasets.Dataset:
    """Tokenised examples of up to `length` tokens, as the tasks prepare them."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(length // 2, length + 1, (num_examples,), generator=generator)
    rows = [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    inputs = pad_inputs([row["input_ids"] for row in rows], pad_id=0)
    return {**inputs, "labels": pad_right([row["labels"] for row in rows], -100)}


def measure(name: str, num_examples: int, length: int, steps: int, **section: Any) -> dict:
    """Median seconds of the loader and of a whole step by MeZO with its defaults.

    name: "quickstart", "opt-125m" or "tiny". section: keys of the loader.
    """
    model = {
        "quickstart": lambda: AutoModelForCausalLM.from_pretrained(QUICKSTART).eval(),
        "opt-125m": opt_125m,
        "tiny": tiny_opt,
    }[name]()
    engine = single_rank_engine(
        model,
        {"direction": "low_rank", "examples_per_direction": 1, **section},
        text_table(num_examples, length),
        collate,
        train_batch_size=BATCH_SIZE,
    )
    batches = engine.training_dataloader.forever()
    engine.train_batch(batches)  # builds the kernels, chooses the form of evaluation
    loading, stepping = [], []
    for _ in range(steps):
        began = time.perf_counter()
        batch = next(batches)
        loaded = time.perf_counter()
        engine.backward(engine(batch))
        engine.step()
        loading.append(loaded - began)
        stepping.append(time.perf_counter() - began)
    engine.close()
    return {
        "model": name,
        "examples": num_examples,
        **section,
        "loader_s": round(statistics.median(loading), 6),
        "step_s": round(statistics.median(stepping), 4),
        "share": round(sum(loading) / sum(stepping), 5),
    }


def rows_of(*, smoke: bool, quick: bool) -> list[dict[str, Any]]:
    """The rows of `step_time.py`. quick: without the larger model."""
    if smoke:
        return [measure("tiny", 64, 16, 2, dataloader_num_workers=1)]
    rows = [
        measure("quickstart", 20_000, 64, 40, **loader)
        for loader in ({}, {"group_by_length": True}, {"dataloader_num_workers": 1})
    ]
    return rows if quick else [*rows, measure("opt-125m", 20_000, 64, 7)]
