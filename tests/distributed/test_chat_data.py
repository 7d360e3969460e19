"""Instruction and chat data through the command line: each format, and a selector by source."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.distributed.command_line import MODEL, finetune_in_turn, finetune_on_ranks, write_rows
from tests.distributed.ranks import options_of
from tests.helpers import asked_for, sampled
from zods.cli.run_folder import read_metrics
from zods.tasks.formats import FORMATS


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


# --- every format ---------------------------------------------------------------------------------

TURNS = [("system", "Answer."), ("user", "say 1"), ("assistant", "1"), ("user", "say 2")]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def messages(answer: str) -> list[dict[str, Any]]:
    return [
        *({"role": role, "content": text} for role, text in TURNS),
        {"role": "assistant", "content": answer},
    ]


def sharegpt(answer: str) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages(answer)]


def parts(answer: str) -> list[dict[str, Any]]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages(answer)]


# (its format, or None where columns are named, the file, a row, options) by the name of a case
CASES: dict[str, tuple[str | None, str, Any, dict[str, Any]]] = {
    "messages": ("messages", "a.jsonl", lambda i: {"messages": messages(f"{i}")}, {}),
    "messages in parts, a template": (
        "messages",
        "a.parquet",
        lambda i: {"messages": parts(f"{i}")},
        {"chat_template": TEMPLATE},
    ),
    "sharegpt": ("sharegpt", "a.json", lambda i: {"conversations": sharegpt(f"{i}")}, {}),
    "alpaca": (
        "alpaca",
        "a.json",
        lambda i: {"instruction": "say", "input": ("", "it")[i % 2], "output": f"{i}"},
        {},
    ),
    "alpaca without input": (
        "alpaca",
        "a.tsv",
        lambda i: {"instruction": f"say {i}", "output": f"it {i}"},
        {},
    ),
    "prompt and completion": (
        "prompt_completion",
        "a.csv",
        lambda i: {"prompt": f"say {i}:", "completion": f" it {i}"},
        {},
    ),
    "plain text": ("text", "a.jsonl", lambda i: {"text": f"return the value of {i}"}, {}),
    "plain text, packed": (
        "text",
        "a.jsonl",
        lambda i: {"text": f"return the value of {i}"},
        {"packing": True, "max_length": 16},
    ),
    "named columns": (
        None,
        "a.jsonl",
        lambda i: {"asked": f"say {i}", "said": f"it {i}"},
        {"prompt_column": "asked", "response_column": "said"},
    ),
    "a template of columns": (
        None,
        "a.jsonl",
        lambda i: {"asked": f"say {i}", "said": f"it {i}"},
        {"template": "Q: {asked} A: {said}"},
    ),
}


def write_file(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix in (".csv", ".tsv"):
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        path.write_text(
            "".join(("," if path.suffix == ".csv" else "\t").join(line) + "\n" for line in lines)
        )
    else:
        write_rows(path, rows)


@pytest.fixture(scope="module")
def runs_of_formats(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """The folder of the runs of the cases asked for, made in one launch, and what they said."""
    folder, runs = tmp_path_factory.mktemp("formats"), {}
    config = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": 3},
        "zeroth_order": {"lr": 1e-4},
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in asked_for(request, "name", CASES, ()):
        _, file, row, others = CASES[name]
        (folder / name).mkdir()
        write_file(folder / name / file, [row(i) for i in range(16)])
        given = {
            "deepspeed_config": folder / "config.json",
            "model": MODEL,
            "output_dir": folder / name / "run",
            "task": "instruction",
            "train_file": folder / name / file,
            "held_out": 4,
            "max_steps": 3,
            "max_length": 96,
        }
        runs[name] = options_of(**{**given, **others})
    said = finetune_in_turn(2, list(runs.values()))[0]
    return folder, dict(zip(runs, map("\n".join, said), strict=True))


@pytest.mark.parametrize("name", sampled(CASES, ()))
def test_every_format_trains_three_steps_and_evaluates(
    runs_of_formats: tuple[Path, dict[str, str]], name: str
) -> None:
    folder, said = runs_of_formats
    found = CASES[name][0]
    assert ("data format " in said[name]) == (found is not None)
    assert found is None or f"data format {found}, found by the columns" in said[name]
    records = list(read_metrics(folder / name / "run"))
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3]
    evaluations = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in evaluations] == [0, 3]
    assert all(math.isfinite(r["loss"]) for r in records if "loss" in r)
    assert all(0.0 <= r["accuracy"] <= 1.0 for r in evaluations)
    assert len({r["loss"] for r in evaluations}) == 2, "the weights move"


def test_the_cases_have_every_format() -> None:
    assert {found for found, *_ in CASES.values() if found} == set(FORMATS)
