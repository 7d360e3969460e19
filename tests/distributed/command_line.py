"""Runs of `zods.finetune` for the tests: their data, their options, and runs on forked ranks.

A start of the `deepspeed` launcher takes a minute of processor time, mostly for imports. Tests that
do not depend on the launcher run the command line on ranks of `run_ranks`.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zods.finetune
from tests.distributed.ranks import REPOSITORY, options_of, run_ranks
from tests.helpers import LogTexts
from zods.cli.arguments import parse_arguments
from zods.trajectory.log import read_log

QUICKSTART_MODEL = REPOSITORY / "launch" / "quickstart" / "model"


def _small_decoder() -> Path:
    """A folder with a decoder of two blocks, random weights, and the quickstart's tokenizer.

    With it a run takes a half to a third of the processor time that it takes with the quickstart's
    model. It is made by the first process that needs it, and stays beside pytest's own folders.
    """
    config = LlamaConfig.from_pretrained(QUICKSTART_MODEL)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 32, 48, 2
    config.num_attention_heads = config.num_key_value_heads = 2
    config.head_dim = 16
    digest = hashlib.sha256((QUICKSTART_MODEL / "tokenizer.json").read_bytes())
    digest.update(config.to_json_string().encode())
    beside = Path(tempfile.gettempdir()) / f"pytest-of-{getpass.getuser()}"
    folder = beside / f"zods-decoder-{digest.hexdigest()[:16]}"
    if not folder.exists():
        beside.mkdir(mode=0o700, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=beside))
        shutil.copytree(QUICKSTART_MODEL, made, dirs_exist_ok=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(made)
        try:
            os.rename(made, folder)
        except OSError:  # another process was faster
            shutil.rmtree(made)
    return folder


MODEL = _small_decoder()
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


def finetune_in_turn(world_size: int, runs: Sequence[Sequence[Any]]) -> list[list[list[str]]]:
    """Run the command line with each of these options in turn, in one launch of forked ranks.

    Returns the messages of each run, by rank.
    """
    return run_ranks(
        world_size, _rank_of_runs_in_turn, [list(map(str, options)) for options in runs]
    )


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


def _rank_of_runs_in_turn(runs: list[list[str]]) -> list[list[str]]:
    return [_rank_of_command_line(options) for options in runs]


def _rank_of_refused_command_line(options: list[str]) -> str:
    arguments = parse_arguments(options)
    try:
        zods.finetune.start(arguments)
    except (ValueError, OSError) as error:
        return str(error)
    return "nothing"
