"""The fault matrix (`tests/distributed/matrix.py`).

By default two cells run: a kill and a signal.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.distributed.matrix import CELLS, Cell, run_cell

DEFAULT = {
    "kill -9, in the middle of application, rank 1",
    "SIGTERM, in a step, launch.py",
}


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
    if cell.disk_kib is not None and os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    assert run_cell(cell, folder).identical


def test_the_default_cells_are_in_the_matrix():
    assert {cell.name for cell in CELLS} >= DEFAULT
    assert len({cell.name for cell in CELLS}) == len(CELLS)
