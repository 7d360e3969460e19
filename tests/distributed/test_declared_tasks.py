"""Declared tasks through the command line: data in a folder, three steps, two evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.command_line import MODEL, finetune_on_ranks
from tests.distributed.ranks import options_of
from tests.published import CASES, write_files
from zods.cli.run_folder import read_metrics
from zods.cli.summary import table

CONFIG = {
    "train_batch_size": 2,
    "zero_optimization": {"stage": 3},
    "zeroth_order": {"method": "mezo", "lr": 1e-4},
}


def options_with(folder: Path, task: str, **others: Any) -> list[str]:
    """Options of a run of a declared task in `folder`, which gets the task's published files."""
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
    records = list(read_metrics(tmp_path / "run"))
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3]
    evaluations = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in evaluations] == [0, 3]
    assert all(metrics <= r.keys() and not any("@" in key for key in r) for r in evaluations)


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
