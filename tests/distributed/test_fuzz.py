"""Mutated configurations, logs and checkpoint folders: accepted, or refused with one clear error.

There are 10,000 mutations in all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import zods
from tests.distributed.models import Tiny, configuration, tiny_data
from tests.distributed.ranks import run_ranks
from tests.mutation import mutated, with_a_record_mutated
from zods.config.deepspeed_json import read_config, read_first_order_config
from zods.trajectory.log import parse_log

CONFIG = {
    **configuration(
        8,
        offload="cpu",
        method="mezo_svrg",
        anchor={"point": "terms", "gradient": "cpu"},
        anneal={"alpha": 2},
    ),
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": "auto"}},
    "aio": {"block_size": 4096},
}
CONFIG["zeroth_order"] |= {
    "selector": {"candidates": 16, "quotas": {"a": 8}, "source_column": "s"},
    "direction": "low_rank",
}


def refusal(function: Callable[..., Any], *args: Any) -> str | None:
    """The text of a ValueError or OSError that `function` raises, or None if it raises nothing.

    Another exception makes the test fail.
    """
    try:
        function(*args)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def cases(few: int, many: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.slow)])


@cases(800, 4000)
def test_configurations_are_accepted_or_refused_with_one_clear_error(tmp_path, number):
    rng = random.Random(1)
    text = json.dumps(CONFIG)
    refused = 0
    for k in range(number):
        config: Any = copy.deepcopy(CONFIG)
        for _ in range(rng.randint(1, 3)):
            config = mutated(rng, config)
        source: Any = config if isinstance(config, dict) else {"zeroth_order": config}
        if k % 4 == 0:  # change the text of a file
            at = rng.randrange(len(text))
            changed = (
                text[:at]
                + rng.choice(["", '"', "{", "]", ",", "\x00", "é", "1", text[at:][:30] * 2])
                + text[at + rng.randint(0, 3) :]
            )
            source = tmp_path / "config.json"
            source.write_text(changed)
        said = refusal(read_config if k % 3 else read_first_order_config, source, rng.randint(1, 4))
        assert said != "", "an error without a message"
        refused += said is not None
    assert number / 4 < refused < number


def run_of_three_steps(folder: Path) -> None:
    config = configuration(
        12, method="mezo_svrg", lr=1e-2, anchor_interval=2, top={"scheduler": CONFIG["scheduler"]}
    )
    engine = zods.initialize(model=Tiny(), config=config, training_data=tiny_data(40))[0]
    engine.resume(folder)
    for _ in range(3):
        engine.train_batch()
    engine.save_checkpoint(folder / "checkpoints")
    engine.train_batch()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_ranks(1, run_of_three_steps, folder)
    return folder


@cases(600, 3000)
def test_logs_are_read_up_to_a_torn_end_or_refused_with_the_line(run, number):
    rng = random.Random(2)
    data = (run / "trajectory.log").read_bytes()
    whole = parse_log(data, "log")
    refused = 0
    for _ in range(number):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at, length = rng.randrange(len(changed) + 1), rng.choice([0, 1, 1, 2, 40, 400])
            other = rng.randrange(len(data))
            changed[at : at + length] = rng.choice(
                [b"", bytes([rng.randrange(256)]), b"\n", data[other : other + length]]
            )
        said = refusal(parse_log, bytes(changed), "log")
        if said is not None:
            refused += 1
            assert said.startswith("log")
            continue
        found = parse_log(bytes(changed), "log")
        assert found.heads == whole.heads[: len(found.heads)], (
            "a changed log was accepted as this one"
        )
    assert refused > number / 3


def rechecked(state: Any) -> str:
    """A state.json whose checksum is that of its changed content."""
    if not isinstance(state, dict):
        return json.dumps(state)
    state = {key: value for key, value in state.items() if key != "checksum"}
    checksum = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return json.dumps({**state, "checksum": checksum})


def rank_of_folders(run: Path, work: Path, number: int) -> tuple[int, int]:
    """Change a folder and resume from it, `number` times. Returns (resumed, refused)."""
    rng = random.Random(3)
    config = configuration(
        12, method="mezo_svrg", lr=1e-2, anchor_interval=2, top={"scheduler": CONFIG["scheduler"]}
    )
    checkpoint = Path("checkpoints") / "global_step3"
    files = sorted((run / checkpoint).iterdir())
    state = json.loads((run / checkpoint / "state.json").read_text())
    engine = zods.initialize(model=Tiny(), config=config, training_data=tiny_data(40))[0]
    fresh = (
        engine.recorder.state_dict(),
        engine.training_dataloader.state_dict(),
        engine.lr_scheduler.state_dict(),
    )
    resumed = refused = 0
    for k in range(number):
        folder = work / str(k)
        shutil.copytree(run, folder)
        kind = rng.randrange(3)
        if kind == 0:  # change bytes of a file
            path = folder / checkpoint / rng.choice(files).name
            changed = bytearray(path.read_bytes())
            at = rng.randrange(len(changed))
            changed[at : at + rng.choice([1, 1, 8, 10**6])] = bytes(
                [rng.randrange(256)]
            ) * rng.choice([0, 1, 8])
            path.write_bytes(changed)
        elif kind == 1:  # change the content of state.json
            (folder / checkpoint / "state.json").write_text(rechecked(mutated(rng, state)))
        else:  # change the content of the log
            log = folder / "trajectory.log"
            log.write_bytes(with_a_record_mutated(rng, log.read_bytes()))
        engine.run.state.global_steps = 0
        engine.recorder.load_state_dict(fresh[0], ())
        engine.training_dataloader.load_state_dict(fresh[1])
        engine.lr_scheduler.load_state_dict(fresh[2])
        said = (
            refusal(engine.resume, folder)
            if kind == 2
            else refusal(engine.load_checkpoint, folder / "checkpoints")
        )
        assert said != "", "an error without a message"
        resumed, refused = resumed + (said is None), refused + (said is not None)
        if engine.trajectory.file is not None:
            engine.trajectory.file.close()
            engine.trajectory.file = None
        shutil.rmtree(folder)
    return resumed, refused


@cases(300, 3000)
def test_folders_of_a_run_are_resumed_or_refused_with_one_clear_error(run, tmp_path, number):
    ((resumed, refused),) = run_ranks(1, rank_of_folders, run, tmp_path, number)
    assert resumed + refused == number
    assert refused > number / 3
