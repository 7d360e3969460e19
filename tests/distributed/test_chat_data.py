"""Conversations through the command line, with a selector that knows their sources."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed.command_line import MODEL, finetune_on_ranks, write_rows
from tests.distributed.ranks import options_of
from zods.cli.run_folder import read_metrics


def test_conversations_train_and_evaluate_with_a_selector_by_source(tmp_path: Path) -> None:
    def row(i: int) -> dict[str, object]:
        answer = "" if i == 3 else f"return {i}"
        turns = [{"from": "human", "value": f"say {i}"}, {"from": "gpt", "value": answer}]
        return {"conversations": turns, "topic": "ab"[i % 2]}

    write_rows(tmp_path / "train.jsonl", [row(i) for i in range(24)])
    config = {"zero_optimization": {"stage": 3}, "zeroth_order": {"method": "mezo", "lr": 1e-4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = options_of(
        deepspeed_config=tmp_path / "config.json",
        model=MODEL,
        output_dir=tmp_path / "run",
        task="instruction",
        train_file=tmp_path / "train.jsonl",
        held_out=4,
        select="4/8",
        source_column="topic",
        max_steps=3,
        max_length=64,
        save_model=True,
    )
    messages = "\n".join(finetune_on_ranks(1, options)[0])
    assert "data format sharegpt, found by the columns" in messages
    assert "examples are left out: 1 with an empty response" in messages
    records = list(read_metrics(tmp_path / "run"))
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 3]
    saved = tmp_path / "run" / "model"
    templates = [
        file.read_text()
        for file in saved.iterdir()
        if "token" in file.name or file.suffix == ".jinja"
    ]
    assert any("'Assistant:'" in text for text in templates), "the export has the template in use"
