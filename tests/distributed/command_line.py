"""Runs of `zods.finetune` for the tests: their data, their options, and runs on forked ranks.

A start of the `deepspeed` launcher takes a minute of processor time, mostly for imports. Tests that
do not depend on the launcher run the command line on ranks of `run_ranks`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zods.finetune
from tests.distributed.ranks import REPOSITORY, options_of, run_ranks
from tests.helpers import LogTexts
from zods.cli.arguments import parse_arguments
from zods.trajectory.log import read_log

MODEL = REPOSITORY / "launch" / "quickstart" / "model"
# The job that each launcher of launch/ starts, see `launched_options`
LAUNCHED: dict[str, Any] = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 3},
    "zeroth_order": {"lr": 1e-3, "evaluation": "stacked"},
}
LAUNCHED_STEPS = 20


class Outcome(NamedTuple):
    """What a run ended with: its steps, the head of its log, the SHA-256 of its exported weights."""

    steps: int
    head: str
    weights: str


def outcome(run: Path) -> Outcome:
    log = read_log(run / "trajectory.log")
    weights = (run / "model" / "model.safetensors").read_bytes()
    return Outcome(log.num_steps, log.heads[-1], hashlib.sha256(weights).hexdigest())


def labelled_rows() -> list[dict[str, Any]]:
    """24 examples with a text and one of two labels."""
    return [
        {"text": f"return the value of {i}", "label": ("code", "text")[i % 2]} for i in range(24)
    ]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_inputs(folder: Path, config: dict[str, Any]) -> None:
    """Write train.jsonl, with `labelled_rows`, and config.json."""
    write_rows(folder / "train.jsonl", labelled_rows())
    (folder / "config.json").write_text(json.dumps(config))


def prompted_options(folder: Path, output: Path, **others: Any) -> list[str]:
    """Options of a run in `output` that learns the labels of `folder`, see `write_inputs`."""
    options = {
        "deepspeed_config": folder / "config.json",
        "model": MODEL,
        "output_dir": output,
        "task": "prompted",
        "template": r"{text}\nKind: {label}",
        "train_file": folder / "train.jsonl",
        "max_length": 48,
    }
    return options_of(**{**options, **others})


def launched_options(folder: Path, output: str, **others: Any) -> list[str]:
    """Options of the job that each launcher starts; `folder` has the inputs for LAUNCHED."""
    options = {"max_steps": LAUNCHED_STEPS, "held_out": 4, "save_model": True, **others}
    return prompted_options(folder, folder / output, **options)


def finetune_on_ranks(world_size: int, options: Sequence[Any]) -> list[list[str]]:
    """Run the command line with these options on forked ranks: the messages of each rank."""
    return run_ranks(world_size, _rank_of_command_line, list(map(str, options)))


def refusals_on_ranks(world_size: int, options: Sequence[Any]) -> list[str]:
    """Start the command line, which has to refuse its input: the error of each rank."""
    return run_ranks(world_size, _rank_of_refused_command_line, list(map(str, options)))


def _rank_of_command_line(options: list[str]) -> list[str]:
    messages = LogTexts()
    logging.getLogger("zods").setLevel(logging.INFO)
    arguments = parse_arguments(options)
    run = zods.finetune.start(arguments)
    zods.finetune.finetune(arguments, *run)
    run[0].close()
    return messages.texts


def _rank_of_refused_command_line(options: list[str]) -> str:
    arguments = parse_arguments(options)
    try:
        zods.finetune.start(arguments)
    except (ValueError, OSError) as error:
        return str(error)
    return "nothing"
