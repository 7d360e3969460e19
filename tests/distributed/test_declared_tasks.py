"""Declared tasks through the command line: data in a folder, three steps, two evaluations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.command_line import MODEL, finetune_in_turn, finetune_on_ranks
from tests.distributed.ranks import options_of
from tests.helpers import asked_for, sampled
from tests.published import CASES, write_files
from zods.cli.run_folder import read_metrics
from zods.cli.summary import table
from zods.tasks import TASKS

CONFIG = {
    "train_batch_size": 2,
    "zero_optimization": {"stage": 3},
    "zeroth_order": {"method": "mezo", "lr": 1e-4},
}


# declarations of a user's own task, by the name of their file
CUSTOM = {
    "tickets.yaml": """
train_files: [train.jsonl]
eval_files: [dev.jsonl]
template: "{text}\\nKind: {label}"
words: [problem, question]
labels: [bug, ask]
""",
    "tickets.py": """
from zods.tasks import PublishedTask


def stripped(row):
    yield {**row, "text": row["text"].strip()}


task = PublishedTask(
    name="tickets",
    train_files=("train.jsonl",),
    eval_files=("dev.jsonl",),
    columns=("text",),
    template="{text}\\nKind: {label}",
    words=("problem", "question"),
    labels=("bug", "ask"),
    rows=stripped,
)
""",
}
TICKETS = "".join(
    json.dumps({"text": f" ticket {i}", "label": ("bug", "ask")[i % 2]}) + "\n" for i in range(4)
)


def options_with(folder: Path, task: str, **others: Any) -> list[str]:
    """Options of a run of a declared task in `folder`, which gets the task's published files.

    task: a name, or a file of `CUSTOM`.
    """
    if task in CUSTOM:
        write_files(folder / "data", {"train.jsonl": TICKETS, "dev.jsonl": TICKETS})
        write_files(folder, {task: CUSTOM[task]})
        others, task = {"task_file": folder / task, **others}, "custom"
    else:
        write_files(folder / "data", CASES[task].files)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return options_of(
        deepspeed_config=folder / "config.json",
        model=MODEL,
        output_dir=folder / "run",
        task=task,
        data_dir=folder / "data",
        **others,
    )


@pytest.mark.parametrize(
    ("task", "others", "metrics"),
    [
        ("sst2", {"shots": 2}, {"loss", "accuracy"}),
        (
            "sst2",
            {"objective": "candidates", "label_words": "a,b", "lr": "auto"},
            {"loss", "accuracy"},
        ),
        ("cola", {"scoring": "calibrated"}, {"loss", "accuracy", "matthews"}),
        ("record", {}, {"loss", "accuracy", "f1"}),
        ("squad", {}, {"loss", "accuracy", "f1"}),
    ],
)
def test_a_name_and_a_folder_are_enough_to_train_and_evaluate(
    tmp_path: Path, task: str, others: dict[str, Any], metrics: set[str]
) -> None:
    """Two ranks share ZeRO-3 forwards, so a rank with fewer of them would hang."""
    options = options_with(tmp_path, task, max_steps=3, max_length=64, **others)
    finetune_on_ranks(2, options)
    check_run(tmp_path / "run", metrics)


def check_run(run: Path, metrics: set[str]) -> None:
    """Three steps whose losses are numbers, and an evaluation before and after with these metrics."""
    records = list(read_metrics(run))
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3]
    evaluations = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in evaluations] == [0, 3]
    assert all(metrics <= r.keys() and not any("@" in key for key in r) for r in evaluations)
    assert all(math.isfinite(r["loss"]) for r in records if "loss" in r)
    assert len({r["loss"] for r in evaluations}) == 2, "the weights move"


# (task, its options) by name; each with two rows or more in a global batch
ALL: dict[str, dict[str, Any]] = {**{name: {} for name in TASKS}, **{name: {} for name in CUSTOM}}
# one published file, which is also the training file here
ALL["mathinstruct"] = {"validation_file": "data/MathInstruct.json"}
# All are slow: the test above has a task of each kind


@pytest.fixture(scope="module")
def runs_of_all(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each task that is asked for, made in one launch of two ranks."""
    folder, runs = tmp_path_factory.mktemp("tasks"), []
    for task in asked_for(request, "name", ALL, ()):
        (folder / task).mkdir()
        given = {
            key: folder / task / value if key.endswith("_file") else value
            for key, value in ALL[task].items()
        }
        runs.append(options_with(folder / task, task, max_steps=3, max_length=128, **given))
    finetune_in_turn(2, runs)
    return folder


@pytest.mark.parametrize("name", sampled(ALL, ()))
def test_every_declared_task_trains_three_steps_and_evaluates_from_its_published_files(
    runs_of_all: Path, name: str
) -> None:
    derived = {TASKS[name].metric} & {"f1", "f1_macro", "matthews"} if name in TASKS else set()
    check_run(runs_of_all / name / "run", {"loss", "accuracy", *derived})


@pytest.mark.parametrize(("task", "steps"), [("sst2", 0), ("squad", 0), ("sst2", 2)])
def test_one_command_evaluates_the_base_model_without_and_with_solved_examples(
    tmp_path: Path, task: str, steps: int
) -> None:
    options = options_with(tmp_path, task, max_steps=steps, icl=2, max_length=256)
    finetune_on_ranks(2, options)
    found = [(r["kind"], r["step"]) for r in read_metrics(tmp_path / "run")]
    assert [at for at in found if at[0] != "train"] == [
        ("eval", 0),
        ("in_context", 0),
        *([("eval", steps)] if steps else []),
        ("summary", steps),
    ]
    plain, solved, *_, summary = read_metrics(tmp_path / "run")
    assert plain.keys() == solved.keys()
    assert plain["loss"] != solved["loss"]
    printed = " ".join(table(summary).split())
    assert f"held-out loss, examples in context {solved['loss']:.3f}" in printed
    assert (f"held-out loss {plain['loss']:.3f} ->" in printed) == (steps > 0)
