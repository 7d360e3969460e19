"""A rank that is killed is named by another rank of its machine, under the real launcher."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import launch, run_command

SCRIPT = Path(__file__).parent / "scripts" / "killed.py"


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGKILL, "for lack of host memory"),
        pytest.param(signal.SIGSEGV, "", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_a_signal_ended_is_named_in_one_line_by_the_lowest_that_lives(
    tmp_path: Path, number: signal.Signals, cause: str
):
    code, output = launch(SCRIPT, tmp_path, int(number), num_gpus=3)
    assert code == 256 - number
    said = [line for line in output.splitlines() if line.startswith("zods:")]
    assert len(said) == 1, output[-4000:]
    assert f" was killed by {number.name}." in said[0]
    assert said[0].startswith("zods: rank 1 (process ")
    assert cause in said[0]


def test_ranks_without_a_launcher_have_no_siblings():
    program = (
        "from zods.comm.siblings import Siblings\n"
        "siblings = Siblings()\n"
        "siblings.watch()\n"
        "siblings.wait_for_report(1000)\n"
    )
    assert run_command([sys.executable, "-c", program], SCRIPT.parent) == (0, "")
