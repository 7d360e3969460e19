"""Directions keep their bits, and logs of an earlier version replay to the weights of their runs.

The expected results lie in tests/golden. `python -m tests.golden.make` writes them again, which
means to break the format or the definition of a direction.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.golden.cases import (
    AFTER,
    BASE,
    DIRECTIONS,
    RUNS,
    RUNS_FOLDER,
    STEPS,
    digest_of_words,
    digests_of_directions,
)
from zods import kernels
from zods.training.resume import LOG_NAME
from zods.trajectory.log import read_log
from zods.trajectory.replay import replay

GOLDEN = json.loads(DIRECTIONS.read_text())


@pytest.fixture(params=["cpp", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the implementation that computes CPU tensors in a test."""
    if request.param == "reference":
        monkeypatch.setattr(kernels, "cpu_module", lambda: None)
    elif kernels.backend() != "cpp":
        pytest.skip("no C++ compiler")
    assert kernels.backend() == request.param
    return request.param


def test_the_words_of_philox_are_those_of_the_golden_file():
    assert digest_of_words() == GOLDEN["words"]


@pytest.mark.usefixtures("backend")
def test_every_backend_makes_the_directions_of_the_golden_file_to_the_bit():
    assert digests_of_directions() == GOLDEN["directions"]
    assert len(set(GOLDEN["directions"].values())) == len(GOLDEN["directions"]) == 36


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", RUNS)
def test_a_log_of_an_earlier_version_replays_to_the_weights_of_its_run_to_the_bit(
    name: str, tmp_path: Path
):
    replay(BASE, RUNS_FOLDER / name / LOG_NAME, tmp_path)
    found, expected = (
        load_file(tmp_path / "model.safetensors"),
        load_file(RUNS_FOLDER / name / AFTER),
    )
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key].dtype == values.dtype
        assert found[key].equal(values), key


@pytest.mark.parametrize("name", RUNS)
def test_every_record_of_a_log_of_an_earlier_version_is_written_as_it_was_read(name: str):
    log = read_log(RUNS_FOLDER / name / LOG_NAME)
    lines = (RUNS_FOLDER / name / LOG_NAME).read_text().splitlines()
    assert log.num_steps == STEPS
    written = [record.to_json() for record in (log.header, *log.records)]
    read = [json.loads(line.partition(" ")[2]) for line in lines]
    for record in read:
        # a key of earlier versions, with the meaning of the one that has taken its place
        section = record.get("zeroth_order", {})
        if section.pop("directions", "shared") == "per_rank":
            section["examples_per_direction"] = RUNS[name].arguments["examples_per_direction"]
    assert written == read
