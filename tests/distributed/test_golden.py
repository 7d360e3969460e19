"""Runs of an earlier version, in tests/golden, are resumed on one and on two ranks.

The expected results are in tests/golden, too. `python -m tests.golden.make` writes them again,
which breaks the compatibility with an earlier version. The weights that a log or a checkpoint gives
have the same bits on every machine. The losses of further steps do not: another CPU adds in another
order.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.distributed.models import numpy_of, sha256, whole
from tests.distributed.ranks import run_ranks
from tests.golden.cases import AFTER, BASE, RUNS, RUNS_FOLDER, SAVED_AT, STEPS, build
from zods.training.resume import CHECKPOINTS, LOG_NAME
from zods.trajectory.log import read_log
from zods.trajectory.records import Refresh, Step
from zods.trajectory.replay import replay

SAVED = [name for name, run in RUNS.items() if run.is_saved]
# The tolerance of weights: a loss has a rounding error of 3e-7. Over 2 eps = 0.02, times lr 0.2,
# times z below 5, it moves a weight by 2e-5 in a step. The next step starts from the moved weight.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-3


def rank_of_resumed(folder: Path) -> dict[str, Any]:
    found = {}
    for name in RUNS:
        for checkpoints in ("no checkpoints", CHECKPOINTS):
            engine = build(name)
            engine.resume(folder / name, checkpoints=folder / name / checkpoints)
            found[name, checkpoints] = (
                engine.global_steps,
                engine.trajectory.head,
                sha256(whole(engine)),
            )
            engine.close()
    return found


def rank_of_loaded(folder: Path) -> dict[str, Any]:
    found = {}
    for name in SAVED:
        engine = build(name)
        _, client_state = engine.load_checkpoint(folder / name / CHECKPOINTS)
        found[name] = {
            "state": (
                engine.global_steps,
                engine.trajectory.head,
                engine.anchor_step,
                client_state,
            ),
            "weights": sha256(whole(engine)),
            "losses": [engine.train_batch() for _ in range(SAVED_AT, STEPS)],
            "after": numpy_of(whole(engine)),
        }
        engine.close()
    return found


@pytest.fixture(params=[1, 2], ids=lambda n: f"on-{n}-ranks")
def world_size(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A copy of the golden runs, because a resumed run appends to its log."""
    return shutil.copytree(RUNS_FOLDER, tmp_path / "runs")


def in_order(weights: dict[str, Any], name: str) -> dict[str, Any]:
    """The weights of a file, in the order of the model's parameters."""
    header = read_log(RUNS_FOLDER / name / LOG_NAME).header
    return {parameter.name: weights[parameter.name] for parameter in header.parameters}


def test_a_run_of_an_earlier_version_resumes_after_its_last_step_with_its_weights(
    runs: Path, world_size: int
):
    for found in run_ranks(world_size, rank_of_resumed, runs):
        for (name, _), (step, head, weights) in found.items():
            log = read_log(RUNS_FOLDER / name / LOG_NAME)
            assert (step, head) == (STEPS, log.heads[-1])
            assert weights == sha256(in_order(load_file(RUNS_FOLDER / name / AFTER), name))


def test_a_checkpoint_of_an_earlier_version_loads_and_continues_as_the_run_did(
    runs: Path, tmp_path: Path, world_size: int
):
    ranks = run_ranks(world_size, rank_of_loaded, runs)
    for name in SAVED:
        log = read_log(RUNS_FOLDER / name / LOG_NAME)
        last = max(
            k
            for k, record in enumerate(log.records)
            if isinstance(record, Step) and record.step < SAVED_AT
        )
        refreshes = [record.step for record in log.records[:last] if isinstance(record, Refresh)]
        losses = [
            record.loss
            for record in log.records
            if isinstance(record, Step) and record.step >= SAVED_AT
        ]
        replay(BASE, RUNS_FOLDER / name / LOG_NAME, tmp_path / name, until=SAVED_AT)
        weights = in_order(load_file(tmp_path / name / "model.safetensors"), name)
        after = load_file(RUNS_FOLDER / name / AFTER)
        moved = max((after[key] - value).abs().max() for key, value in weights.items())
        assert moved > 20 * WEIGHT_TOLERANCE, "the tolerance must detect a step that is left out"
        for rank in ranks:
            found = rank[name]
            assert found["state"] == (SAVED_AT, log.heads[last + 1], refreshes[-1], {"note": name})
            assert found["weights"] == sha256(weights)
            np.testing.assert_allclose(found["losses"], losses, rtol=LOSS_TOLERANCE)
            for key, value in numpy_of(after).items():
                np.testing.assert_allclose(
                    found["after"][key], value, atol=WEIGHT_TOLERANCE, err_msg=key
                )


def rank_of_groups(folder: Path) -> list[float]:
    engine = build("mezo_per_rank")
    engine.resume(folder)
    losses = [engine.train_batch() for _ in range(STEPS)]
    engine.close()
    return losses


def test_groups_of_a_ranks_examples_have_the_directions_that_each_rank_had(
    tmp_path: Path, world_size: int
):
    """The coefficients are those of the earlier version, rounded to bfloat16."""
    losses = run_ranks(world_size, rank_of_groups, tmp_path)[0]
    earlier, now = (
        [record for record in read_log(path / LOG_NAME).records if isinstance(record, Step)]
        for path in (RUNS_FOLDER / "mezo_per_rank", tmp_path)
    )
    assert len(now) == len(earlier) == STEPS
    np.testing.assert_allclose(losses, [step.loss for step in earlier], rtol=1e-3)
    np.testing.assert_allclose(now[0].coefficients, earlier[0].coefficients, rtol=2.0**-8)
    for step, before in zip(now, earlier, strict=True):
        np.testing.assert_allclose(step.coefficients, before.coefficients, rtol=0.02, atol=0.02)
