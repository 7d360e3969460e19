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

CONFIG = {
    "train_batch_size": 2,
    "zero_optimization": {"stage": 3},
    "zeroth_order": {"method": "mezo", "lr": 1e-4},
}


@pytest.mark.parametrize(
    ("task", "others", "metrics"),
    [
        ("sst2", {"shots": 2}, {"loss", "accuracy"}),
        ("cola", {"scoring": "calibrated"}, {"loss", "accuracy", "matthews"}),
        ("record", {}, {"loss", "accuracy", "f1"}),
        ("squad", {}, {"loss", "accuracy", "f1"}),
    ],
)
def test_a_name_and_a_folder_are_enough_to_train_and_evaluate(
    tmp_path: Path, task: str, others: dict[str, Any], metrics: set[str]
) -> None:
    """Two ranks share ZeRO-3 forwards, so a rank with fewer of them would hang."""
    write_files(tmp_path / "data", CASES[task].files)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    options = options_of(
        deepspeed_config=tmp_path / "config.json",
        model=MODEL,
        output_dir=tmp_path / "run",
        task=task,
        data_dir=tmp_path / "data",
        max_steps=3,
        max_length=64,
        **others,
    )
    finetune_on_ranks(2, options)
    records = list(read_metrics(tmp_path / "run"))
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3]
    evaluations = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in evaluations] == [0, 3]
    assert all(metrics <= r.keys() and not any("@" in key for key in r) for r in evaluations)
