"""Helpers of the selector's benchmarks: data, a small decoder, and its first-order training."""

from __future__ import annotations

import os
import pydoc_data.topics
from pathlib import Path
from typing import Any

import datasets
import deepspeed
import torch
import transformers
from common import free_port

from zods.config.deepspeed_json import read_first_order_config
from zods.tasks import build_task, load_examples, split_held_out
from zods.training.first_order import FirstOrderEngine

TOKENIZER = Path(__file__).parents[1] / "launch" / "quickstart" / "model"
CANDIDATES, BUDGET = 128, 64
Row = dict[str, Any]


def manual() -> list[Row]:
    """Passages of Python's manual: an example gives the beginning and asks for the rest.

    The sources have very different numbers of passages.
    """
    rows = []
    for name, text in pydoc_data.topics.topics.items():
        source = (
            "types"
            if "types" in name or "typ" in name
            else "operators"
            if name.startswith(("b", "o"))
            else "other"
        )
        for start in range(0, len(text) - 100, 400):
            passage = text[start : start + 400]
            cut = 100 + start % 190
            rows.append(
                {"source": source, "instruction": passage[:cut], "output": passage[cut:] or passage}
            )
    return [row for row in rows if row["instruction"].strip() and row["output"].strip()]


def prepared(data: Path | None, max_length: int) -> tuple[Any, Any, Any]:
    """Prepare the data: (task, training rows with their source, held-out rows).

    data: a file of examples; None: prose of Python's own manual.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    examples = (
        datasets.Dataset.from_list(manual()) if data is None else load_examples(file=data, seed=0)
    )
    raw, held_out = split_held_out(examples, 200, seed=0)
    columns = {"prompt_column": "instruction", "response_column": "output"}
    of_model = {"num_embeddings": 2048, "has_token_types": False, "class_names": None}
    task = build_task("instruction", tokenizer, raw, max_length=max_length, **of_model, **columns)
    return task, task.prepare(raw).add_column("source", raw["source"]), task.prepare(held_out)


def decoder(hidden: int, layers: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=hidden // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def single_process() -> None:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    deepspeed.init_distributed("gloo", verbose=False)


def first_order(
    model: torch.nn.Module,
    task: Any,
    rows: Any,
    *,
    batch: int,
    micro: int,
    lr: float,
    seed: int,
    selector: Row | None,
    target: Any = None,
    stage: int = 0,
) -> FirstOrderEngine:
    config = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "torch_adam": True}},
        "steps_per_print": 10**9,
        "zeroth_order": {"seed": seed, "selector": selector},
    }
    run = read_first_order_config(config, torch.distributed.get_world_size())
    return FirstOrderEngine(model, run, rows, task.collate, target)


def chosen_by(strategy: str, **options: Any) -> Row:
    return {"candidates": CANDIDATES, "source_column": "source", "strategy": strategy, **options}
