"""Offloaded parameters: the reads and writes of a step, and deferred updates.

A deferred update must never be missed by a reader of the parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor

import zods
from tests.distributed.models import Wide, collate, configuration, sha256, train, whole, wide_data
from tests.distributed.ranks import run_ranks
from tests.helpers import asked_for, sampled

OFFLOADS = ("cpu", "nvme")
# Not on NVMe: DeepSpeed 0.19.8 fails in the forward, with parameters of another dtype.
KEPT = "kept gathered"
RUNS: dict[str, dict[str, Any]] = {
    "mezo": {},
    "rademacher, decay, bfloat16": {"direction": "rademacher", "weight_decay": 0.1, "bf16": True},
    "low rank": {"direction": "low_rank"},
    "in lockstep": {"evaluation": "lockstep"},
    "one by one": {"evaluation": "sequential"},
    "micro-batches": {"accumulation": 2},
    KEPT: {"zero": {"stage3_param_persistence_threshold": 10**8}},
    "svrg": {
        "method": "mezo_svrg",
        "anchor_interval": 3,
        "anchor": {"point": "cpu", "gradient": "terms"},
    },
    "svrg, terms": {
        "method": "mezo_svrg",
        "anchor_interval": 3,
        "anchor": {"point": "terms", "gradient": "terms"},
    },
    "svrg, stored gradient": {
        "method": "mezo_svrg",
        "anchor_interval": 3,
        "anchor": {"point": "terms", "gradient": "cpu"},
    },
}
# The others are slow: a reader does not depend on how the points are evaluated.
DEFAULT = {"rademacher, decay, bfloat16", KEPT, "svrg, terms"}


def build(offload: str, folder: Path, zero: dict[str, Any] | None = None, **arguments: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    section = {"method": "mezo", "lr": 1e-3, "eps": 1e-2, **arguments}
    config = configuration(4, offload=offload, nvme_path=folder, **section)
    config["zero_optimization"] |= zero or {}
    return zods.initialize(model=Wide(), config=config, training_data=wide_data())[0]


class Counting:
    """An async_io handle that counts its reads and writes by file."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.reads: dict[str, int] = {}
        self.writes: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def async_pread(self, buffer: Tensor, path: str, *rest: Any) -> Any:
        self.reads[path] = self.reads.get(path, 0) + 1
        return self._handle.async_pread(buffer, path, *rest)

    def async_pwrite(self, buffer: Tensor, path: str, *rest: Any) -> Any:
        self.writes[path] = self.writes.get(path, 0) + 1
        return self._handle.async_pwrite(buffer, path, *rest)


def rank_of_counts(folder: Path) -> dict[str, list[tuple[list[int], list[int]]]]:
    """The reads and writes of the weights' files in each of three steps."""
    found = {}
    for name in ("mezo", "rademacher, decay, bfloat16", "low rank", "in lockstep", "svrg, terms"):
        arguments = {**RUNS[name], "anchor_interval": 100} if "svrg" in name else RUNS[name]
        engine = build("nvme", folder / name, **arguments)
        train(engine, wide_data(), range(5))  # steps 1, 2 and 4 check the form once more
        weights = [layer.weight for layer in engine.module.layers]
        swapper = weights[0].nvme_swapper
        paths = [swapper.get_path(weight) for weight in weights]
        found[name] = []
        for step in range(5, 8):
            reads, writes = Counting(swapper.aio_read_handle), Counting(swapper.aio_write_handle)
            swapper.aio_read_handle, swapper.aio_write_handle = reads, writes
            train(engine, wide_data(), [step])
            swapper.aio_read_handle, swapper.aio_write_handle = reads._handle, writes._handle
            found[name].append(
                (
                    [reads.reads.get(path, 0) for path in paths],
                    [writes.writes.get(p, 0) for p in paths],
                )
            )
    return found


@pytest.mark.parametrize("world_size", sampled([1, 2], [2]))
def test_a_parameter_on_nvme_is_read_once_and_written_once_per_step(tmp_path, world_size):
    for rank in run_ranks(world_size, rank_of_counts, tmp_path):
        for name, steps in rank.items():
            assert steps == [([1, 1, 1], [1, 1, 1])] * 3, name


# --- nothing is missed ----------------------------------------------------------------------------


def seen_by_readers(engine: Any, folder: Path) -> dict[str, Any]:
    """The results of each reader of the parameters, right after a step."""
    data, found = wide_data(), {}

    def step() -> None:
        train(engine, data, [engine.global_steps])

    step()
    found["eval_batch"] = engine.eval_batch(iter([collate(data)] * 4))
    step()
    engine.eval()
    found["outputs"] = sha256({"logits": engine(**collate(data))["logits"]})
    engine.train()
    step()
    engine.save_checkpoint(folder / "saved")
    found["saved"] = sha256(whole(engine))
    step()
    engine.save_pretrained(folder / "exported")
    torch.distributed.barrier()
    found["exported"] = (folder / "exported" / "model.safetensors").read_bytes()
    step()
    engine.load_checkpoint(folder / "saved")
    found["loaded"] = sha256(whole(engine))
    step()
    engine.flush()
    with deepspeed.zero.GatheredParameters([engine.module.unused.weight]):
        found["unused"] = sha256({"unused": engine.module.unused.weight.data})
    return found


def rank_of_runs(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        arguments, found[name] = RUNS[name], {}
        for offload in ("none", *OFFLOADS) if name != KEPT else ("none", "cpu"):
            engine = build(offload, folder / name / offload, **arguments)
            losses = train(engine, wide_data(), range(5))
            end = sha256(whole(engine))
            found[name][offload] = (
                losses,
                end,
                engine.trajectory.head,
                seen_by_readers(engine, folder / name / offload),
            )
    return found


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, Any]]]:
    names = asked_for(request, "name", RUNS, DEFAULT)
    return run_ranks(2, rank_of_runs, tmp_path_factory.mktemp("deferral"), names)


@pytest.mark.parametrize("name", sampled(RUNS, DEFAULT))
def test_offloaded_parameters_have_the_same_bits_for_every_reader(runs, name):
    for rank in runs:
        plain = rank[name]["none"]
        assert plain[3]["loaded"] == plain[3]["saved"] != plain[1]
        assert all(found == plain for found in rank[name].values()), name


def test_an_update_is_deferred_where_parameters_are_offloaded(tmp_path):
    (waiting,) = run_ranks(1, rank_of_deferred_update, tmp_path)
    assert waiting == {"none": False, "cpu": True, "nvme": True}


def rank_of_deferred_update(folder: Path) -> dict[str, bool]:
    """Whether the stored bytes are still those of before the step."""
    found = {}
    for offload in ("none", "cpu", "nvme"):
        engine = build(offload, folder / offload)

        def stored(engine: Any = engine) -> dict[str, Tensor]:
            return {
                shard.name: local.clone()
                for shard, local in engine.sharded_parameters.iterate_with_read_ahead(write=False)
            }

        zods.params.zero3_adapter.release_gathered(engine.deepspeed)
        before = sha256(stored())
        train(engine, wide_data(), range(1))
        found[offload] = sha256(stored()) == before
    return found
