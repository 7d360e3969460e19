"""Weights do not depend on how the examples of a batch are divided, or where tensors are kept.

The examples' losses have the same bits in any batch here, so the weights have them, too.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zods
from tests.distributed.models import configuration, sha256, whole
from tests.distributed.ranks import at_once, free_port, run_ranks
from tests.distributed.row_by_row import METHODS, SECTION, RowByRow, row_data

DIVISIONS = [(1, {}), (1, {"accumulation": 3}), (1, {"stage": 0}), (2, {}), (2, {"offload": "cpu"}),
             (2, {"accumulation": 2}), (3, {}), (4, {})]  # fmt: skip
STEPS = 7
Cell = tuple[str, Any]  # a name of METHODS and the examples per direction
CELLS: list[Cell] = list(itertools.product(METHODS, (1, 4, "all")))


def with_default(*default: Cell) -> pytest.MarkDecorator:
    """The test runs with these cells by default. With the others it is slow."""
    others = [cell for cell in CELLS if cell not in default]
    sets = [pytest.param(list(default)), pytest.param(others, marks=pytest.mark.slow)]
    return pytest.mark.parametrize("cells", sets, ids=["default", "others"])


def divided(cell: Cell, model: nn.Module, **options: Any) -> Any:
    name, size = cell
    section = {**SECTION, **METHODS[name], "examples_per_direction": size, **options}
    config = configuration(12, **section)
    return zods.initialize(model=model, config=config, training_data=row_data())[0]


def rank_of_division(cells: list[Cell], options: dict[str, Any]) -> dict[Cell, str]:
    found = {}
    for cell in cells:
        engine = divided(cell, RowByRow(), **options)
        for _ in range(STEPS):
            engine.train_batch()
        found[cell] = sha256(whole(engine))
        engine.close()
    return found


@with_default(("mezo", "all"), ("mezo, low rank", 1), ("svrg", 4))
def test_weights_do_not_depend_on_the_ranks_micro_batches_and_offload(cells: list[Cell]):
    """They have the same bits where the losses of single examples have."""
    results = [run_ranks(ranks, rank_of_division, cells, options) for ranks, options in DIVISIONS]
    expected = results[0][0]
    assert len(set(expected.values())) == len(expected) == len(cells)
    for (ranks, options), found in zip(DIVISIONS, results, strict=True):
        assert all(of_rank == expected for of_rank in found), (ranks, options)


def rank_of_replica(
    cells: list[Cell], stores: list[str], folder: Path, index: int
) -> dict[Cell, str]:
    """The first step of each run is made by replica 0 alone, the later ones by both."""
    found = {}
    for cell, store in zip(cells, stores, strict=True):
        engine = divided(cell, RowByRow(), replicas={"store": store, "index": index})
        engine.resume(folder / f"{index} {cell}")
        while engine.global_steps < STEPS:
            if engine.global_steps == 1 and index == 0:
                leader = engine.replicas._leader  # on rank 0; the others wait for it in the step
                while leader and not (
                    leader._taking_part or any(p.wants_to_join for p in leader._peers)
                ):
                    time.sleep(0.01)
            engine.train_batch()
        assert len(engine.replicas.members) == 2
        found[cell] = sha256(whole(engine))
        engine.close()
    return found


@with_default(("mezo, low rank", 1))
def test_weights_do_not_depend_on_whether_replicas_divide_the_batch(
    cells: list[Cell], tmp_path: Path
):
    """One replica has one rank, the other two."""
    stores = [f"127.0.0.1:{free_port()}" for _ in cells]
    undivided, *replicas = at_once(
        [
            (1, rank_of_division, (cells, {})),
            *((k + 1, rank_of_replica, (cells, stores, tmp_path, k)) for k in range(2)),
        ]
    )
    assert all(of_rank == undivided[0] for of_ranks in replicas for of_rank in of_ranks)


@pytest.mark.slow
def test_two_replicas_of_two_ranks_end_with_the_weights_of_one_world_of_four(tmp_path: Path):
    """All ranks of both replicas have the bits of the world that takes the same global batches."""
    cells: list[Cell] = [("mezo", 1), ("mezo, low rank", 4)]
    stores = [f"127.0.0.1:{free_port()}" for _ in cells]
    world, *replicas = at_once(
        [
            (4, rank_of_division, (cells, {})),
            *((2, rank_of_replica, (cells, stores, tmp_path, k)) for k in range(2)),
        ]
    )
    start = sha256(dict(RowByRow().named_parameters()))
    assert len({start, *world[0].values()}) == 1 + len(cells)
    assert all(of_rank == world[0] for of_world in [world, *replicas] for of_rank in of_world)


class RowByRowOnDrive(RowByRow):
    """The same with a table of which each of two ranks has 2 MiB, enough for NVMe offload."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2**20, 1))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        rows = (x[:, 0].abs() * 2**18).long()
        return {"logits": super().forward(x)["logits"] * self.table[rows % 2**20]}


def rank_on_drive(cells: list[Cell], folder: Path) -> list[dict[str, str]]:
    """Each cell in memory, and with the parameters and the anchor on a drive."""
    found = []
    for cell in cells:
        path = folder / str(cell)
        path.mkdir(exist_ok=True)
        on_drive: dict[str, Any] = {"offload": "nvme", "nvme_path": path}
        if cell[0] == "svrg":
            on_drive["anchor"] = {"point": "nvme", "gradient": "nvme"}
        of_cell = {}
        for place, options in (("memory", {}), ("drive", on_drive)):
            engine = divided(cell, RowByRowOnDrive(), **options)
            for _ in range(STEPS):
                engine.train_batch()
            of_cell[place] = sha256(whole(engine))
            assert any(path.rglob("*.swp")) == (place == "drive")
            engine.close()
        found.append(of_cell)
    return found


@with_default(("svrg", 1))
def test_weights_do_not_depend_on_whether_parameters_and_anchor_are_on_a_drive(
    cells: list[Cell], tmp_path: Path
):
    for of_cell in itertools.chain(*run_ranks(2, rank_on_drive, cells, tmp_path)):
        assert of_cell["drive"] == of_cell["memory"]


def rank_of_resumed(folder: Path, steps: int) -> dict[str, Any]:
    found = {}
    for name in METHODS:
        engine = divided((name, 5), RowByRow())
        engine.resume(folder / name)
        while engine.global_steps < steps:
            engine.train_batch()
        found[name] = sha256(whole(engine))
        engine.close()
    return found


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path):
    """Groups that two ranks share have the same directions after a change of the ranks."""
    expected = run_ranks(2, rank_of_resumed, tmp_path / "undisturbed", 7)[0]
    for ranks, steps in ((2, 2), (3, 5), (1, 7)):
        found = run_ranks(ranks, rank_of_resumed, tmp_path / "resumed", steps)[0]
    assert found == expected
