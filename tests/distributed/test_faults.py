"""The fault matrix (`tests/distributed/matrix.py`).

By default one cell runs. Signals are also in test_stop_requests.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.distributed.fault_runs import run_cell
from tests.distributed.matrix import CELLS, Cell, End

DEFAULT = {"kill -9, in the middle of application, rank 1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=cell.name, marks=[] if cell.name in DEFAULT else pytest.mark.slow)
        for cell in CELLS
    ],
)
def test_a_run_that_a_fault_strikes_ends_as_the_undisturbed_one(cell: Cell, folder: Path):
    if cell.disk is not None and os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    result = run_cell(cell, folder)
    assert not result.failure, result.failure
    assert result.struck
    assert result.identical


def test_the_default_cells_are_in_the_matrix():
    assert {cell.name for cell in CELLS} >= DEFAULT
    assert len({cell.name for cell in CELLS}) == len(CELLS) == 42


def test_only_the_last_start_of_a_cell_finishes_the_run():
    for cell in CELLS:
        ends = [start.end for start in cell.starts]
        assert ends.index(End.FINISHED) == len(ends) - 1
        assert cell.marks, f"nothing shows that the fault of {cell.name} struck"


def test_two_faults_are_survived_without_a_restart():
    assert [cell.name for cell in CELLS if len(cell.starts) == 1] == [
        "full disk, checkpoint, rank 0",
        "corrupted NVMe anchor, gradient, rank 1",
    ]
