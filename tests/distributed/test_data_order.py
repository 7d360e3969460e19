"""Runs of the command line whose batches follow lengths and a mixture, loaded by workers."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import zods.finetune
from tests.distributed.command_line import (
    MODEL,
    finetune_on_ranks,
    prompted_options,
    refusals_on_ranks,
    write_rows,
)
from tests.distributed.ranks import options_of, run_ranks
from zods.cli.arguments import parse_arguments
from zods.cli.run_folder import read_metrics
from zods.cli.summary import table

STEPS, HALF, BATCH = 9, 4, 4
WEIGHTS = {"code": 3, "text": 1}


def options(folder: Path, output: str, accumulation: int, **others: Any) -> list[str]:
    """Options of a run by MeZO-SVRG on 20 examples of two sources: 5 steps are an epoch."""
    rows = [
        {"text": "return " * (i % 7) + str(i), "label": ("code", "text")[i % 5 == 0]}
        for i in range(24)
    ]
    write_rows(folder / "train.jsonl", [{**row, "kind": row["label"]} for row in rows])
    section = {"method": "mezo_svrg", "lr": 1e-4, "anchor_interval": 3, "anchor_directions": 2}
    config = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": 3},
        "zeroth_order": section,
    }
    path = folder / f"config{accumulation}.json"
    path.write_text(json.dumps(config))
    given = {
        "deepspeed_config": path,
        "held_out": 4,
        "source_column": "kind",
        "mixture_weights": ",".join(f"{name}={weight}" for name, weight in WEIGHTS.items()),
        "dataloader_num_workers": 1,
        "resume": "auto",
        **others,
    }
    return [*prompted_options(folder, folder / output, **given), "--group_by_length", "true"]


def rank_of_examples(words: list[str], until: int) -> list[tuple[list[str], float]]:
    """The texts and the loss of each step up to step `until`."""
    engine = zods.finetune.start(parse_arguments(words))[0]
    seen = []
    for _ in range(engine.global_steps, until):
        loss = engine.train_batch()
        loader = engine.training_dataloader
        seen.append(([str(loader.dataset[i]["prompt"]) for i in loader.last_examples()], loss))
    assert len(multiprocessing.active_children()) == 1, "the batches come from a worker"
    engine.close()
    assert not multiprocessing.active_children(), "workers end with the engine"
    return seen


def test_a_run_sees_the_same_examples_on_other_ranks_and_when_it_is_resumed(tmp_path: Path):
    words = options(tmp_path, "whole", 2, max_steps=STEPS)
    (whole,) = run_ranks(1, rank_of_examples, words, STEPS)
    first = run_ranks(2, rank_of_examples, options(tmp_path, "cut", 1, max_steps=STEPS), HALF)
    rest = run_ranks(1, rank_of_examples, options(tmp_path, "cut", 1, max_steps=STEPS), STEPS)
    assert first[0] == first[1]
    found = first[0] + rest[0]
    assert [texts for texts, _ in found] == [texts for texts, _ in whole]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in whole], rel=1e-4)

    other = options(tmp_path, "cut", 1, mixture_weights="code=1,text=1")
    (message,) = refusals_on_ranks(1, other)
    assert "trajectory.log: made with zeroth_order.mixture" in message


# a published row of code becomes two rows of the task, another becomes one
TASK_OF_ROWS = """
from zods.tasks import PublishedTask

def rows(published):
    for part in range(2 if published["kind"] == "code" else 1):
        yield {"part": f"{published['text']} {part}", "label": published["label"]}

task = PublishedTask(
    name="parts", template="{part}\\nKind: {label}", columns=("text",), words=("code", "text"),
    labels=("code", "text"), rows=rows,
)
"""


def rank_of_drawn_sources(words: list[str]) -> tuple[list[str], dict[str, int]]:
    """The sources of the examples of an epoch, and the number of examples of each source."""
    engine = zods.finetune.start(parse_arguments(words))[0]
    loader = engine.training_dataloader
    drawn: list[str] = []
    for _ in range(loader.steps_per_epoch):
        engine.train_batch()
        drawn += [loader.dataset[i]["kind"] for i in loader.last_examples()]
    engine.close()
    return drawn, dict(Counter(loader.dataset["kind"]))


def test_a_mixture_draws_from_the_rows_that_a_custom_task_makes(tmp_path: Path):
    (tmp_path / "task.py").write_text(TASK_OF_ROWS)
    words = options(tmp_path, "run", 1, method="mezo", max_steps=20, held_out=6)
    for name in ("--task", "--template"):
        at = words.index(name)
        del words[at : at + 2]
    words += ["--task", "custom", "--task_file", str(tmp_path / "task.py")]
    drawn, sizes = run_ranks(1, rank_of_drawn_sources, words)[0]
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    published = Counter(row["kind"] for row in rows)
    assert sum(sizes.values()) == 2 * published["code"] + published["text"] - 6
    assert sizes["code"] > published["code"]
    assert Counter(drawn) == {"code": 3 * len(drawn) // 4, "text": len(drawn) // 4}


@pytest.mark.parametrize("others", [{}, {"optimizer": "adamw", "lr": "1e-3"}])
def test_the_summary_has_the_passes_over_each_source(tmp_path: Path, others: dict[str, str]):
    finetune_on_ranks(1, options(tmp_path, "run", 1, max_steps=5, **others))
    (summary,) = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "summary"]
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    sizes = Counter(row["kind"] for row in rows)
    passes = summary["mixture_passes"]
    assert set(passes) == set(sizes)
    assert passes["text"] > 5 / sizes["text"]
    assert f"code {passes['code']:.2f}, text {passes['text']:.2f}" in table(summary)


def test_weights_that_do_not_fit_the_sources_are_refused_before_the_model_is_loaded(tmp_path: Path):
    words = options(tmp_path, "run", 1, mixture_weights="code=1,prose=1")
    (message,) = refusals_on_ranks(1, words)
    assert "mixture.weights: found weights of code, prose" in message
    assert not (tmp_path / "run").exists()


def test_packed_texts_train_and_are_refused_with_sources(tmp_path: Path):
    write_rows(tmp_path / "train.jsonl", [{"text": f"return {i}", "kind": "a"} for i in range(40)])
    config = {"train_batch_size": 4, "zeroth_order": {"lr": 1e-4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = {
        "deepspeed_config": tmp_path / "config.json",
        "model": MODEL,
        "task": "instruction",
        "train_file": tmp_path / "train.jsonl",
        "held_out": 4,
        "max_length": 16,
        "max_steps": 3,
    }
    words = [*options_of(**given), "--packing"]
    finetune_on_ranks(2, [*words, "--output_dir", tmp_path / "run"])
    losses = [r["loss"] for r in read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert len(losses) == 3
    sources = ["--source_column", "kind", "--mixture_weights", "a=1"]
    (message,) = refusals_on_ranks(1, [*words, "--output_dir", tmp_path / "other", *sources])
    assert "--packing: an example would have texts of several sources" in message
