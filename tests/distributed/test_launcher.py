"""The real `deepspeed` launcher with two ranks.

The three-line loop, the bytes that it sends, and the end of a run with a mistake.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import launch, run_ranks
from tests.distributed.scripts.mistakes import rank_of_mistakes

SCRIPTS = Path(__file__).parent / "scripts"


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("loop")
    code, output = launch(SCRIPTS / "three_lines.py", folder)
    assert code == 0, output[-4000:]
    return read(folder)


def test_the_three_line_loop_runs_svrg_on_zero_3_through_the_launcher(loop):
    for rank in loop:
        for name in ("terms", "stored"):
            assert rank[name]["global_steps"] == 4
            assert rank[name]["loss"] == loop[0][name]["loss"]


def test_a_step_sends_less_than_one_kibibyte_counted_at_the_communication_layer(loop):
    """A step has 2 directions (8 losses), and a refresh 4, in accumulated micro-batches.

    Every second step checks the agreement of the ranks.
    """
    for rank in loop:
        for step, (zods, _, scalars, shards, reported) in enumerate(rank["terms"]["steps"]):
            assert 0 < zods < 1024
            assert zods == scalars == reported, (
                f"step {step}: the engine's own counter says otherwise"
            )
            assert shards == 0


def test_shards_of_a_stored_anchor_point_are_counted_apart_from_the_scalars(loop):
    """Each module's shard is gathered once per micro-batch.

    The number of points that need the shard does not matter.
    """
    for rank in loop:
        for zods, _, scalars, shards, reported in rank["stored"]["steps"]:
            assert 0 < scalars < 1024
            assert zods == scalars + shards
            assert reported == scalars
            assert shards == 2 * 4 * rank["anchor_numel"], "two micro-batches"


def test_everything_that_is_sent_was_asked_for_by_zods_or_deepspeed(loop):
    for rank in loop:
        assert set(rank["sent"]["zods"]) == {"all_gather"}, "the only collective that zods uses"
        assert sum(size for _, size in rank["sent"]["deepspeed"].values()) > 0, "ZeRO-3 gathers"


# --- mistakes -------------------------------------------------------------------------------------

EXPECTED = {
    "unknown key": (
        "ValueError",
        ["zeroth_order.epss", "unknown key", "Did you mean 'eps'", "anchor_interval"],
    ),
    "unknown anchor key": ("ValueError", ["zeroth_order.anchor.points", "Did you mean 'point'"]),
    "stage 2": ("ValueError", ["zero_optimization.stage", "found 2", "0", "3"]),
    "stage 1": ("ValueError", ["zero_optimization.stage", "found 1"]),
    "optimizer": ("ValueError", ["optimizer", "zeroth_order"]),
    "batch sizes": ("ValueError", ["train_batch_size", "found 8", "multiply out"]),
    "nvme_path": ("ValueError", ["zeroth_order.anchor.nvme_path", "nowhere"]),
    "no nvme_path": ("ValueError", ["zeroth_order.anchor.nvme_path", "missing"]),
    "offload nvme_path": ("ValueError", ["zero_optimization.offload_param.nvme_path", "nowhere"]),
    "no loss": ("ValueError", ["neither a loss nor logits", "hidden"]),
    "empty dataset": ("ValueError", ["training_data", "empty"]),
    "too few examples": ("ValueError", ["training_data", "5 examples", "8"]),
    "no dataset": ("ValueError", ["training_data", "missing"]),
    "no package": ("ValueError", ["comet.enabled", "needs the package no_such_monitor"]),
    "no such file": ("FileNotFoundError", ["no.json", "not found"]),
    "another model": ("ValueError", ["checkpoint", "another model"]),
    "truncated checkpoint": ("ValueError", ["checkpoint", "damaged or truncated"]),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, rank_of_mistakes, tmp_path_factory.mktemp("mistakes"))


@pytest.mark.parametrize("mistake", EXPECTED)
def test_a_mistake_is_the_same_clear_error_on_all_ranks(errors, mistake):
    kind, parts = EXPECTED[mistake]
    (kind_0, text_0), (kind_1, text_1) = (rank[mistake] for rank in errors)
    assert kind_0 == kind_1 == kind, f"{text_0} / {text_1}"
    assert text_1 == text_0
    for part in parts:
        assert part in text_0, text_0


def test_every_mistake_of_the_script_is_expected(errors):
    assert set(errors[0]) == set(EXPECTED)


# By default the texts are checked above, and the exit code of a run with a mistake in
# test_failed_start.py.
@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["unknown key", "no loss"])
def test_a_run_with_a_mistake_ends_soon_with_its_text_and_an_exit_code(tmp_path, mistake):
    code, output = launch(SCRIPTS / "mistakes.py", tmp_path, mistake)
    assert code != 0
    said = {
        line.split("ValueError: ", 1)[1] for line in output.splitlines() if "ValueError: " in line
    }
    assert len(said) == 1, "all ranks write the same message"
    for part in EXPECTED[mistake][1]:
        assert part in said.copy().pop()
