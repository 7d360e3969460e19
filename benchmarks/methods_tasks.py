"""The tasks of `methods.py`: prompted classification, its examples and its model."""

from __future__ import annotations

import json
import random
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from methods_prefix import LastBlocks, only_labelled
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from zods.data.batch import CANDIDATES
from zods.data.evaluation import Forwards
from zods.data.objectives import sequence_log_likelihood
from zods.data.scores import candidates
from zods.tasks.build import build_task
from zods.tasks.task import Task

QUICKSTART = Path(__file__).parents[1] / "launch" / "quickstart"
MAX_LENGTH = 96  # tokens of an example
EVAL_BATCH = 32  # examples of a forward without training

Example = dict[str, str]  # text, label
TREC_WORDS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "person",
    "LOC": "location",
    "NUM": "number",
}


@dataclass
class Bench:
    """A task, its examples as the task prepared them, and the model that is trained on it.

    only_labelled: the model computes logits only where a label follows. base: the parameters
    before training, by name.
    """

    name: str
    task: Task
    only_labelled: bool
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    model: torch.nn.Module
    base: dict[str, Tensor]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate rows to a training batch."""
        batch = self.task.collate(rows)
        return only_labelled(batch) if self.only_labelled else batch

    @torch.no_grad()
    def restore(self) -> torch.nn.Module:
        """Write the parameters before training into the model, and return the model."""
        for name, param in self.model.named_parameters():
            param.copy_(self.base[name])
        return self.model

    @torch.no_grad()
    def loss(self, forward: Callable[..., Any], rows: list[dict[str, Any]]) -> float:
        """Mean over examples of the negative log-likelihood per token of the right word; over the
        label words alone, where the task has them in its batches.
        """
        return sum(self._losses(forward, rows)) / len(rows)

    def _losses(self, forward: Callable[..., Any], rows: list[dict[str, Any]]) -> list[float]:
        found: list[float] = []
        for batch in _batches(rows):
            inputs = self.collate(batch)
            labels, words = inputs.pop("labels"), inputs.pop(CANDIDATES, None)
            logits = forward(**inputs)["logits"]
            if words is not None:
                found += (-candidates(logits, {"labels": labels, CANDIDATES: words}, True)).tolist()
                continue
            log_likelihood, counts = sequence_log_likelihood(logits, labels)
            found += (-log_likelihood / counts).tolist()
        return found

    @torch.no_grad()
    def accuracy(self, forward: Callable[..., Any], rows: list[dict[str, Any]]) -> float:
        """Share of the examples whose right word has the highest log-probability per token."""
        correct = 0.0
        for batch in _batches(rows):
            inputs, targets = self.task.collate_eval(batch)
            outputs = inputs.run(Forwards(lambda part: forward(**part), len(inputs.input_ids)))
            correct += self.task.measure(outputs, inputs, targets)["accuracy"][0]
        return correct / len(rows)


def _batches(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    by_length = sorted(rows, key=lambda row: len(row["prompt"]))
    return [by_length[i : i + EVAL_BATCH] for i in range(0, len(rows), EVAL_BATCH)]


def quickstart(_: Path | None, num_train: int, num_held_out: int) -> list[list[Example]]:
    make_data = runpy.run_path(str(QUICKSTART / "make_data.py"))
    parts = make_data["split"](list(make_data["standard_library"]()))
    return [
        make_data["examples"](pieces, count)
        for pieces, count in zip(parts, (num_train, num_held_out), strict=True)
    ]


def sst2(folder: Path, num_train: int, num_held_out: int) -> list[list[Example]]:
    def read(name: str) -> list[Example]:
        pairs = [line.split("\t") for line in (folder / name).read_text().split("\n") if line]
        return [{"text": text, "label": ("terrible", "great")[int(y)]} for text, y in pairs]

    return [_drawn(read("train.tsv"), num_train), _drawn(read("dev.tsv"), num_held_out)]


def trec(folder: Path, num_train: int, num_held_out: int) -> list[list[Example]]:
    def read(name: str) -> list[Example]:
        return [
            {"text": row["question"], "label": TREC_WORDS[row["label"]]}
            for row in _json_lines(folder / name)
        ]

    return [_drawn(read("train.jsonl"), num_train), _drawn(read("test.jsonl"), num_held_out)]


def ag_news(folder: Path, num_train: int, num_held_out: int) -> list[list[Example]]:
    def read(name: str) -> list[Example]:
        return [
            {"text": f"{row['title']}. {row['text']}", "label": row["label"].replace("/", " ")}
            for row in _json_lines(folder / name)
        ]

    return [_drawn(read("train.jsonl"), num_train), _drawn(read("test.jsonl"), num_held_out)]


def _json_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def _drawn(examples: list[Example], count: int) -> list[Example]:
    return random.Random(0).sample(examples, min(count, len(examples)))


def permute_labels(examples: list[Example], share: float) -> None:
    """Permute the labels of a random share of the examples, in place."""
    rng = random.Random(0)
    chosen = rng.sample(examples, round(share * len(examples)))
    labels = [example["label"] for example in chosen]
    rng.shuffle(labels)
    for example, label in zip(chosen, labels, strict=True):
        example["label"] = label


Reader = Callable[[Any, int, int], list[list[Example]]]
TASKS: dict[str, tuple[str, Reader]] = {
    "quickstart": ("{text}\nKind: {label}", quickstart),
    "sst2": ("{text} It was {label}", sst2),
    "trec": ("{text}\nType: {label}", trec),
    "ag_news": ("{text}\nTopic: {label}", ag_news),
}


def load_bench(
    name: str,
    model_folder: Path | None,
    data: Path | None,
    *,
    num_train: int,
    num_held_out: int,
    blocks: int | None,
    dtype: torch.dtype,
    label_noise: float = 0.0,
) -> Bench:
    """Load a task. "quickstart" has a model and data of its own; the others take
    `data`/name and the model in `model_folder`.

    blocks: train only the matrices of the last `blocks` blocks; None: all parameters. label_noise:
    the share of the training examples whose labels are permuted.
    """
    template, read = TASKS[name]
    folder = QUICKSTART / "model" if name == "quickstart" else model_folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_cache=False).eval()
    if blocks is not None:
        model.requires_grad_(False)
        for block in model.model.layers[-blocks:]:
            for param in block.parameters():
                param.requires_grad_(param.ndim == 2)
    examples = read(data and data / name, num_train, num_held_out)
    permute_labels(examples[0], label_noise)
    parts = [datasets.Dataset.from_list(of_part) for of_part in examples]
    task = build_task(
        "prompted",
        tokenizer,
        parts[0],
        template=template,
        max_length=MAX_LENGTH,
        num_embeddings=model.config.vocab_size,
        has_token_types=False,
        class_names=None,
    )
    train, held_out = (list(task.prepare(part)) for part in parts)
    has_prefix = blocks is not None and blocks < model.config.num_hidden_layers
    if has_prefix:
        model = LastBlocks(model, blocks).eval()
    base = {key: param.detach().clone() for key, param in model.named_parameters()}
    return Bench(name, task, has_prefix, train, held_out, model, base)
