"""The attack script (`benchmarks/attack.py`): its list, its verdicts and its mutations.

`test_benchmarks.py` runs it at its smallest size.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from tests.distributed.attack_damage import ATTACKS
from tests.distributed.attack_files import FILES
from tests.distributed.attack_kills import trials
from tests.distributed.attack_mutations import (
    MUTATIONS,
    is_no_csv,
    is_no_json_lines,
    is_no_safetensors,
    is_no_text,
)
from tests.distributed.attack_runs import KINDS
from tests.distributed.attack_verdicts import Ended, first_difference, judged
from tests.distributed.command_line import MODEL


def metrics(losses: list[float]) -> str:
    steps = [
        {"kind": "train", "step": k, "loss": loss, "lr": 1.0, "skipped": False, "seconds": k}
        for k, loss in enumerate(losses, 1)
    ]
    return "".join(json.dumps(row) + "\n" for row in [*steps, {"kind": "summary", "step": 2}])


@pytest.fixture
def expected(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path / "expected"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    (folder / "trajectory.log").write_bytes(b"log")
    (folder / "metrics.jsonl").write_text(metrics([1.0, 2.0]))
    return folder


def ended(*codes: int, output: str = "", hung: bool = False) -> Ended:
    return Ended(codes, output, 1.0, hung)


def test_a_run_with_the_same_bits_passes_and_one_with_other_bits_is_silent(expected, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(expected, run)
    assert judged(ended(0, 0), run, expected).row()["passed"]
    for name, content in (
        ("model/model.safetensors", "other"),
        ("trajectory.log", "other"),
        ("metrics.jsonl", metrics([1.0, 2.5])),
        ("metrics.jsonl", metrics([1.0, 2.0]) + metrics([2.0])),
    ):
        shutil.copytree(expected, run, dirs_exist_ok=True)
        (run / name).write_text(content)
        verdict = judged(ended(0, 0), run, expected)
        assert (verdict.silent, verdict.row()["passed"]) == (1, False), name
        said = judged(ended(0, output="lr is now 2"), run, expected, told="lr is now")
        assert said.row()["passed"], "the change was announced"
    assert "2.0" in first_difference(run, expected)


def test_a_change_that_is_ignored_is_silent(expected):
    assert judged(ended(0), expected, expected, must_differ=True).silent == 1


def test_a_refusal_needs_a_message_and_a_run_has_to_end(expected, tmp_path):
    said = "zods.finetune: error: x.json: not found."
    assert judged(ended(2, output=said), tmp_path, expected).row()["passed"]
    assert not judged(ended(1), tmp_path, expected).row()["passed"]
    assert not judged(ended(-9, hung=True), tmp_path, expected).row()["passed"]
    traced = judged(
        ended(2, output=f"Traceback (most recent call last)\n{said}"), tmp_path, expected
    )
    assert (traced.traceback, traced.row()["passed"]) == (1, False)


def test_a_run_that_ends_well_without_its_folder_is_silent(expected, tmp_path):
    assert judged(ended(0), tmp_path / "gone", expected).silent == 1


def test_the_trials_strike_every_kind_of_run_every_process_and_both_replicas():
    names = [trial.name.partition(": ")[2] for trial in trials(100, quick=False)]
    assert len(names) == 100
    launcher = {
        f"launcher, {sent} to {target}"
        for sent in ("SIGTERM", "SIGKILL")
        for target in ("runner", "launch.py", "ranks")
    }
    assert {*KINDS, *launcher, "replicas, the leader", "replicas, the follower"} == set(names)


def test_the_quick_list_has_thirty_rows_and_no_name_is_there_twice():
    names = [attack.name for attack in ATTACKS]
    assert len(names) == len(set(names))
    assert sum(attack.quick for attack in ATTACKS) + len(FILES) >= 30


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_follows_from_its_seed_and_changes_the_file(mutation):
    data = b'{"text": "a", "n": 1, "x": [1, 2.5]}\n' * 40
    changed = [MUTATIONS[mutation](random.Random(5), data) for _ in range(2)]
    assert changed[0] == changed[1]
    assert changed[0] != data


def test_the_formats_rules_accept_good_files_and_refuse_damaged_ones():
    lines = b'{"a": 1}\n\n{"a": "\xc3\xa9"}\n'
    assert not is_no_json_lines(lines)
    assert is_no_json_lines(lines[:-3])
    assert not is_no_csv(b'a,b\n1,"x\ny"\n')
    assert is_no_csv(b"a,b\n1\n")
    assert is_no_text(b"\xe9")
    weights = (MODEL / "model.safetensors").read_bytes()
    assert not is_no_safetensors(weights)
    assert is_no_safetensors(weights[:-1])
