"""The bytes that a step gathers, counted where DeepSpeed calls torch, and the updates.

The updates are the same for every form of evaluation, also with directions of each rank's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zods
from tests.distributed.gather_counter import GatherCounter
from tests.distributed.models import (
    configuration,
    numpy_of,
    opt_data,
    sha256,
    tiny_opt,
    train,
    whole,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.zoo import with_adapters, zoo_batch, zoo_model
from tests.helpers import asked_for, sampled
from zods.trajectory.log import read_log
from zods.trajectory.updates import History, replay_

GATHERS = {"stage3_param_persistence_threshold": 0}  # gather every parameter, however small


def gathering(batch: int, **arguments: Any) -> dict[str, Any]:
    config = configuration(batch, **arguments)
    config["zero_optimization"] |= GATHERS
    return config


def padded_bytes(engine: Any) -> int:
    """The bytes of all parameters with their padding. A shared parameter counts once."""
    world_size = torch.distributed.get_world_size()
    sizes = {
        id(p): p.ds_tensor.numel() * p.ds_tensor.element_size() for p in engine.module.parameters()
    }
    return world_size * sum(sizes.values())


# (model, form asked for, form expected, further arguments) by name
SVRG = {
    "method": "mezo_svrg",
    "anchor_interval": 100,
    "anchor": {"point": "terms", "gradient": "terms"},
}
COUNTED: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    **{f"mezo, {form}": ("opt", form, form, {}) for form in ("stacked", "lockstep", "sequential")},
    **{
        f"svrg, {form}": ("opt", form, form, SVRG) for form in ("stacked", "lockstep", "sequential")
    },
    **{
        f"low rank, {form}": ("opt", form, form, {"direction": "low_rank"})
        for form in ("stacked", "lockstep")
    },
    "a direction per example": (
        *("opt", "stacked", "stacked"),
        {"direction": "low_rank", "examples_per_direction": 1},
    ),
    "four directions, stacked": ("opt", "stacked", "stacked", {"num_directions": 4}),
    "llama": ("llama", "auto", "stacked", {}),
    "mixtral": ("mixtral", "auto", "stacked", {}),
    "t5": ("t5", "auto", "lockstep", {}),
    "t5, adapters on frozen weights": ("t5", "auto", "lockstep", {}),
    "mamba": ("mamba", "auto", "lockstep", {}),
    "mamba, svrg": ("mamba", "auto", "lockstep", SVRG),
}
DEFAULT = (
    *("mezo, stacked", "mezo, sequential", "svrg, lockstep", "a direction per example"),
    *("mixtral", "t5, adapters on frozen weights", "mamba"),
)
# the number of forwards in a step; 1 for all others
FORWARDS = {"mezo, sequential": 2, "svrg, sequential": 4}


def rank_of_counts(names: list[str]) -> dict[str, tuple[str, list[float]]]:
    counter, found = GatherCounter(), {}
    for name in names:
        kind, form, _, arguments = COUNTED[name]
        arguments = {"method": "mezo", "lr": 1e-3, "eps": 1e-2, "evaluation": form, **arguments}
        batch = zoo_batch(kind, 2, 8)
        data = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)] * 2
        model = (with_adapters if "adapters" in name else zoo_model)(kind)
        engine = zods.initialize(model=model, config=gathering(4, **arguments), training_data=data)[
            0
        ]
        # Step 0 chooses the form, and steps 1, 2 and 4 check it. In these steps DeepSpeed's
        # prefetching learns the order of the parameters.
        train(engine, data, range(6))
        ratios = []
        for step in range(6, 8):
            before = counter.total
            train(engine, data, [step])
            ratios.append((counter.total - before) / padded_bytes(engine))
        found[name] = (engine.evaluation, ratios)
    return found


@pytest.fixture(scope="module")
def counts(request: pytest.FixtureRequest) -> list[dict[str, tuple[str, list[float]]]]:
    return run_ranks(2, rank_of_counts, asked_for(request, "name", COUNTED, DEFAULT))


@pytest.mark.parametrize("name", sampled(COUNTED, DEFAULT))
def test_a_step_gathers_the_parameters_once_in_one_forward_of_all_points(counts, name):
    for rank in counts:
        form, ratios = rank[name]
        assert form == COUNTED[name][2]
        assert ratios == [FORWARDS.get(name, 1.0)] * 2


# --- what is applied ------------------------------------------------------------------------------

STEPS = 10
COMMON = {"eps": 1e-2, "lr": 1e-3, "seed": 7}


def rounding(losses: list[float], lr: float) -> float:
    """The difference that two float32 runs may have after STEPS.

    It is twice the bound of test_engine.py for a float32 run and a float64 one.
    """
    return 2 * STEPS * (lr * 4 * 2 * 8 * 2.0**-23 * max(losses) / (2 * COMMON["eps"]) + 2.0**-24)


TRAJECTORIES = {
    "mezo": {"method": "mezo"},
    "svrg": {**SVRG, "anchor_interval": 4, "num_directions": 2},
    "low rank": {"method": "mezo", "direction": {"distribution": "low_rank", "rank": 2}},
}
FORMS = ("sequential", "stacked", "lockstep")


def rank_of_trajectories(folder: Path) -> dict[tuple[str, str], Any]:
    found = {}
    for name, arguments in TRAJECTORIES.items():
        for form in FORMS:
            config = gathering(8, **COMMON, **arguments, evaluation=form)
            engine = zods.initialize(model=tiny_opt(), config=config, training_data=opt_data())[0]
            engine.resume(folder / f"{name}-{form}")
            replayed = whole(engine)
            before = numpy_of(replayed)
            losses = train(engine, opt_data(), range(STEPS))
            history = History()
            records = read_log(folder / f"{name}-{form}" / "trajectory.log").records
            changes = [change for record in records if (change := history.change(record))]
            for shard in engine.sharded_parameters:
                replay_(replayed[shard.name].view(-1), shard, 0, changes, engine.run.direction)
            found[name, form] = {
                "before": before,
                "after": numpy_of(whole(engine)),
                "replayed": sha256(replayed) == sha256(whole(engine)),
                "losses": losses,
                "seeds": [[term.seed for term in change.update.terms] for change in changes],
                "form": engine.evaluation,
            }
    return found


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    return run_ranks(2, rank_of_trajectories, tmp_path_factory.mktemp("logs"))


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectories_do_not_depend_on_the_form_of_evaluation(trajectories, name, form):
    for rank in trajectories:
        one, other = rank[name, "sequential"], rank[name, form]
        tolerance = rounding(one["losses"], COMMON["lr"])
        assert other["form"] == form
        assert other["seeds"] == one["seeds"]
        for key, expected in one["after"].items():
            assert np.abs(other["after"][key] - expected).max() <= tolerance, key
        assert (
            max(np.abs(one["after"][key] - one["before"][key]).max() for key in one["after"])
            > 100 * tolerance
        )


def test_the_terms_applied_are_those_logged(trajectories):
    for rank in trajectories:
        assert all(found["replayed"] for found in rank.values())
