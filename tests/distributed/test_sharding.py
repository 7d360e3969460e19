"""Shards of ZeRO-3: the elements that a rank stores, and updates of them.

Updates do not depend on the way in which parameters are cut, or on where they are stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zods
from tests.distributed.models import Awkward, configuration, sha256, whole
from tests.distributed.ranks import run_ranks
from zods.core.directions import Direction
from zods.core.estimators import Term, Update
from zods.kernels import combine_

WORLD_SIZES = (1, 2, 3, 4)
LAYOUTS = [(0, "none"), (3, "none"), (3, "cpu"), (3, "nvme")]
DTYPES = (torch.float32, torch.bfloat16)
STEPS = 10
GRADIENT = (Term(2**63 + 11, 0.25), Term(12, -0.5))  # the terms of the anchor gradient
DENSE_COEFFICIENT = -(2.0**-6)


def given(step: int) -> tuple[list[int], list[float], float, int]:
    """Seeds, coefficients, decay and rounding seed of one step.

    Its three terms have very different sizes.
    """
    seeds = [1000 * step + 1, 2**64 - 1 - step, 77]
    return seeds, [0.01 * (step + 1), -3e-5, 1e-9 * 7**step], 1.0 - 1e-3 * step, 900 + step


def build(stage: int, offload: str, dtype: torch.dtype, nvme_path: Path, **section: Any) -> Any:
    config = configuration(
        12,
        stage=stage,
        offload=offload,
        nvme_path=nvme_path,
        bf16=dtype is torch.bfloat16,
        **section,
    )
    return zods.initialize(model=Awkward(dtype), config=config, training_data=[torch.ones(5)] * 12)[
        0
    ]


def rank_of_layouts(folder: Path) -> dict[Any, dict[str, Any]]:
    """For every layout and dtype: the shards, where they are stored, z, and the digest.

    The digest is that of the weights after ten given steps.
    """
    found = {}
    for stage, offload in LAYOUTS:
        for dtype in DTYPES:
            path = folder / f"{offload}-{dtype}"
            path.mkdir(parents=True, exist_ok=True)
            section = {"method": "mezo_svrg", "anchor": {"point": "terms", "gradient": "cpu"}}
            engine = build(stage, offload, dtype, path, **section)
            shards = [
                (
                    p.name,
                    p.ordinal,
                    p.offset,
                    p.numel,
                    local.float().numpy().copy() if p.whole_numel < 100 else None,
                )
                for p, local in engine.sharded_parameters.iterate_with_read_ahead(write=False)
            ]
            stored = {
                p.name: getattr(p.param, "ds_tensor", p.param).device.type
                if getattr(getattr(p.param, "ds_tensor", None), "final_location", None) != "nvme"
                else "nvme"
                for p in engine.sharded_parameters
            }
            num_files = len(list(path.rglob("*.swp")))
            engine.anchor.set_gradient(GRADIENT)
            for step in range(STEPS):
                seeds, coefficients, decay, rounding_seed = given(step)
                update = Update(
                    tuple(map(Term, seeds, coefficients)), decay, DENSE_COEFFICIENT, rounding_seed
                )
                engine.sharded_parameters.apply_(
                    update, direction=Direction(), dense=engine.anchor.gradient.read
                )
                if step == 4:  # a forward between two steps leaves nothing behind
                    with torch.no_grad():
                        engine.deepspeed(torch.ones(2, 5, dtype=dtype))
                    zods.params.zero3_adapter.release_gathered(engine.deepspeed)
            after = sha256(whole(engine))
            z = {}
            for distribution in ("gaussian", "rademacher"):
                zods.params.zero3_adapter.release_gathered(engine.deepspeed)
                for shard, local in engine.sharded_parameters.iterate_with_read_ahead(write=True):
                    Direction(distribution).combine_(
                        local, shard, shard.offset, seeds=[4321], coefficients=[1.0]
                    )
                z[distribution] = sha256(whole(engine))
            found[stage, offload, dtype] = {
                "shards": shards,
                "stored": stored,
                "files": num_files,
                "after": after,
                "z": z,
            }
    return found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(n, id=f"{n}-ranks", marks=pytest.mark.slow if n in (2, 4) else [])
        for n in WORLD_SIZES
    ],
)
def layouts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[Any, Any]]:
    return run_ranks(request.param, rank_of_layouts, tmp_path_factory.mktemp("offload"))


@pytest.fixture(scope="module")
def dense() -> dict[torch.dtype, dict[str, Any]]:
    """The results on whole parameters in one process, by the kernel alone."""
    found = {}
    for dtype in DTYPES:
        params = {name: (k, p) for k, (name, p) in enumerate(Awkward(dtype).named_parameters())}
        initial = {name: p.detach().clone() for name, (_, p) in params.items()}
        trainable = {name: (k, p) for name, (k, p) in params.items() if p.requires_grad}
        gradient = {
            name: combine_(
                torch.empty_like(p),
                seeds=[t.seed for t in GRADIENT],
                coefficients=[t.coefficient for t in GRADIENT],
                parameter=k,
                offset=0,
            )
            for name, (k, p) in trainable.items()
        }
        for step in range(STEPS):
            seeds, coefficients, decay, rounding_seed = given(step)
            for name, (k, p) in trainable.items():
                combine_(
                    p.data,
                    weight=p.data,
                    scale=decay if p.dim() >= 2 else 1.0,
                    seeds=seeds,
                    coefficients=coefficients,
                    parameter=k,
                    offset=0,
                    dense=gradient[name],
                    dense_coefficient=DENSE_COEFFICIENT,
                    rounding_seed=rounding_seed,
                )
        after = sha256({name: p for name, (_, p) in params.items()})
        z = {}
        for distribution in ("gaussian", "rademacher"):
            for k, p in trainable.values():
                combine_(
                    p.data,
                    seeds=[4321],
                    coefficients=[1.0],
                    distribution=distribution,
                    parameter=k,
                    offset=0,
                )
            z[distribution] = sha256({name: p for name, (_, p) in params.items()})
        found[dtype] = {"initial": initial, "after": after, "z": z}
    return found


every_layout = pytest.mark.parametrize(("stage", "offload"), LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@every_dtype
@every_layout
def test_ten_given_steps_leave_the_bits_of_the_dense_reference(
    layouts, dense, stage, offload, dtype
):
    digests = [rank[stage, offload, dtype]["after"] for rank in layouts]
    assert digests == [dense[dtype]["after"]] * len(layouts)


@every_dtype
@every_layout
def test_a_direction_is_the_same_bits_for_every_layout_and_tier(
    layouts, dense, stage, offload, dtype
):
    for rank in layouts:
        assert rank[stage, offload, dtype]["z"] == dense[dtype]["z"]


@every_dtype
def test_the_ranks_shards_are_each_whole_parameter_cut_once(layouts, dense, dtype):
    initial = dense[dtype]["initial"]
    ordinals = {name: k for k, name in enumerate(initial)}
    for stage, offload in LAYOUTS[1:]:
        by_rank = [rank[stage, offload, dtype]["shards"] for rank in layouts]
        for shards in zip(*by_rank, strict=True):
            name = shards[0][0]
            assert all(shard[:2] == (name, ordinals[name]) for shard in shards)
            end = 0
            for _, _, offset, numel, _ in shards:
                assert numel == 0 or offset == end
                end += numel
            assert end == initial[name].numel()
            if name != "big":
                joined = torch.cat([torch.from_numpy(shard[4]) for shard in shards])
                assert torch.equal(joined, initial[name].float().view(-1))
    if len(layouts) == 4:
        numels = [{p[0]: p[3] for p in rank[3, "none", dtype]["shards"]} for rank in layouts]
        assert [n["one"] for n in numels] == [1, 0, 0, 0]
        assert [n["five"] for n in numels] == [2, 2, 1, 0]
        assert [n["seven"] for n in numels] == [2, 2, 2, 1]


@every_layout
def test_a_tied_parameter_has_one_shard_and_a_frozen_one_none(layouts, stage, offload):
    for rank in layouts:
        names = [shard[0] for shard in rank[stage, offload, torch.float32]["shards"]]
        assert names == ["one", "three", "five", "seven", "big", "first.weight", "second.bias"]


@every_dtype
def test_with_nvme_the_large_shards_are_in_files_and_the_small_ones_in_memory(layouts, dtype):
    for rank in layouts:
        found = rank[3, "nvme", dtype]
        assert found["files"] >= 1
        assert found["stored"].pop("big") == "nvme"
        assert set(found["stored"].values()) == {"cpu"}


def rank_of_deepspeed_names(folder: Path) -> list[str]:
    engine = build(3, "nvme", torch.float32, folder, method="mezo")
    param = engine.module.big
    wanted = {
        "Parameter": (param, ["ds_tensor", "ds_shape", "ds_numel", "nvme_swapper"]),
        "ds_tensor": (param.ds_tensor, ["ds_numel", "final_location", "status"]),
        "swapper": (
            param.nvme_swapper,
            [
                "available_swap_in_buffers",
                "swap_in",
                "synchronize_reads",
                "swap_out_and_release",
                "synchronize_writes",
                "remove_partition_and_release_buffers",
            ],
        ),
        "status": (type(param.ds_tensor.status), ["NOT_AVAILABLE", "AVAILABLE", "INFLIGHT"]),
        "optimizer": (engine.deepspeed.optimizer, ["partition_all_parameters"]),
    }
    missing = [
        f"{kind}.{name}"
        for kind, (owner, names) in wanted.items()
        for name in names
        if not hasattr(owner, name)
    ]
    sizes = (param.ds_numel, tuple(param.ds_shape), param.ds_tensor.ds_numel)
    if sizes != (1024 * 1030, (1024, 1030), 1024 * 1030 // 2):
        missing.append(f"ds_numel, ds_shape or ds_tensor.ds_numel mean something else: {sizes}")
    if param.ds_tensor.final_location != "nvme" or param.ds_tensor.status.name != "NOT_AVAILABLE":
        missing.append("final_location or status mean something else")
    param.nvme_swapper.swap_in([param], async_op=True)
    param.nvme_swapper.synchronize_reads()
    offset = torch.distributed.get_rank() * param.ds_tensor.ds_numel
    expected = Awkward(torch.float32).big.data.view(-1)[offset : offset + param.ds_tensor.ds_numel]
    if not torch.equal(param.ds_tensor.data.view(-1)[: expected.numel()], expected):
        missing.append("swap_in does not bring this rank's shard")
    param.nvme_swapper.remove_partition_and_release_buffers([param])
    return missing


def test_deepspeed_still_has_the_names_that_sharding_touches(tmp_path):
    assert run_ranks(2, rank_of_deepspeed_names, tmp_path) == [[], []]


def rank_of_unusable_models() -> list[str]:
    said = []
    for prepare in (lambda m: m.requires_grad_(False), lambda m: m.to(torch.float64)):
        model = torch.nn.Linear(3, 3)
        prepare(model)
        with pytest.raises(ValueError, match="trainable") as error:
            zods.initialize(model=model, config=configuration(12, stage=0, method="mezo"))
        said.append(str(error.value))
    return said


def test_a_model_without_usable_trainable_parameters_is_refused_on_all_ranks():
    first, second = run_ranks(2, rank_of_unusable_models)
    assert first == second
    assert "no trainable parameter" in first[0]
    assert "float32 or bfloat16" in first[1]
