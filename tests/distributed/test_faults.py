"""A part of the fault matrix (`tests/distributed/matrix.py`; all of it: benchmarks/faults.py), one cell of each kind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.distributed.matrix import CELLS, Cell, run_cell

CHOSEN = {
    "kill -9, in the middle of application, rank 1",
    "kill -9, in the middle of a record, rank 0",
    "kill -9, in a step, the runner",
    "SIGTERM, in a step, launch.py",
    "full disk, checkpoint, rank 0",
    "corrupted NVMe anchor, gradient, rank 1",
    "other record, a step, rank 1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.name in CHOSEN], ids=lambda cell: cell.name)
def test_a_run_that_a_fault_strikes_ends_as_the_undisturbed_one(cell: Cell, folder: Path):
    if cell.disk_kib is not None and os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    assert run_cell(cell, folder).identical


def test_the_chosen_cells_are_in_the_matrix():
    assert {cell.name for cell in CELLS} >= CHOSEN
    assert len({cell.name for cell in CELLS}) == len(CELLS)
