"""Learning-rate schedulers of the configuration.

Every scheduler class of torch and DeepSpeed follows lr, or is refused before the start.
"""

import inspect

import pytest
import torch
from deepspeed.runtime import lr_schedules

from zods.config.deepspeed_json import read_config, read_first_order_config
from zods.config.schedules import (
    ZerothOrderOptimizer,
    build_scheduler,
    scheduler_class,
    with_provisional_length,
)

NEEDED = {  # parameters without a default, and parameters that shorten the schedules
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": "auto", "step_size_up": 3},
    "ExponentialLR": {"gamma": 0.9},
    "MultiStepLR": {"milestones": [2, 4]},
    "OneCycleLR": {"total_steps": 20},
    "StepLR": {"step_size": 2},
    "WarmupDecayLR": {"total_num_steps": 8, "warmup_num_steps": 3},
    "WarmupLR": {"warmup_num_steps": 3},
    "WarmupCosineLR": {"total_num_steps": 8, "warmup_num_steps": 3},
    "OneCycle": {"cycle_min_lr": "auto", "cycle_first_step_size": 3},
    "LRRangeTest": {"lr_range_test_step_size": 2},
}
# made of functions or of other schedulers, which JSON cannot hold
OBJECTS = (
    "ChainedScheduler",
    "LambdaLR",
    "MultiplicativeLR",
    "SequentialLR",
)
WITH_ARGUMENT = ("ReduceLROnPlateau",)


def classes() -> list[str]:
    """Every class of torch and DeepSpeed that makes a schedule."""
    base = torch.optim.lr_scheduler.LRScheduler
    found = [
        name
        for name, kind in vars(torch.optim.lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, base)
    ]
    return sorted({*found, *lr_schedules.VALID_LR_SCHEDULES} - {"LRScheduler", "_LRScheduler"})


def config(name: str, lr: float, **params) -> dict:
    scheduler = {"type": name, "params": {**NEEDED.get(name, {}), **params}}
    return {
        "train_batch_size": 8,
        "scheduler": scheduler,
        "zeroth_order": {"method": "mezo", "lr": lr},
    }


def step_sizes(name: str, lr: float, **params) -> list[float]:
    run = read_config(config(name, lr, **params), 1)
    optimizer = ZerothOrderOptimizer([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = build_scheduler(run.scheduler, optimizer)
    sizes = []
    for _ in range(12):
        sizes.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return sizes


@pytest.mark.parametrize(
    "name", [name for name in classes() if name not in (*OBJECTS, *WITH_ARGUMENT)]
)
@pytest.mark.filterwarnings("error:Detected call of")
def test_every_schedule_scales_with_lr(name):
    sizes = step_sizes(name, 0.25)
    assert step_sizes(name, 0.5) == pytest.approx([2 * size for size in sizes]), (
        "the schedule has its own step size"
    )
    if name != "LRRangeTest":  # it grows from lr on purpose, until training fails
        assert max(sizes) <= 0.25 * (1 + 1e-9)  # some schedules multiply rounded factors


@pytest.mark.parametrize("name", [*OBJECTS, *WITH_ARGUMENT])
def test_a_schedule_that_json_cannot_make_or_the_engine_cannot_step_is_refused(name):
    params = (
        {"mode": "max"}
        if name in WITH_ARGUMENT
        else {"lr_lambda": "x"}
        if "lr_lambda" in arguments(name)
        else {}
    )
    with pytest.raises(ValueError, match=rf"^scheduler\.(type|params): .*{name}") as caught:
        read_config(config(name, 0.5, **params), 1)
    if name in WITH_ARGUMENT:
        assert "step() needs an argument (metrics)" in str(caught.value)


def arguments(name: str) -> list[str]:
    return list(inspect.signature(scheduler_class(name)).parameters)


PEAKS = [
    ("WarmupLR", "warmup_max_lr"),
    ("WarmupDecayLR", "warmup_max_lr"),
    ("OneCycle", "cycle_max_lr"),
    ("LRRangeTest", "lr_range_test_min_lr"),
    ("OneCycleLR", "max_lr"),
    ("CyclicLR", "max_lr"),
]


@pytest.mark.parametrize(("name", "key"), PEAKS)
def test_a_peak_that_differs_from_lr_is_refused_and_both_are_named(name, key):
    assert key not in NEEDED[name]
    read_config(config(name, 3e-4, **{key: 3e-4}), 1)
    with pytest.raises(
        ValueError,
        match=rf"^scheduler\.params\.{key}: found 0\.002, but zeroth_order\.lr is 0\.0003",
    ):
        read_config(config(name, 3e-4, **{key: 2e-3}), 1)


@pytest.mark.parametrize(
    ("name", "key"),
    [("WarmupLR", "warmup_min_lr"), ("CosineAnnealingLR", "eta_min"), ("OneCycle", "cycle_min_lr")],
)
def test_a_floor_above_lr_is_refused_and_both_are_named(name, key):
    read_config(config(name, 1e-3, **{key: 1e-4}), 1)
    with pytest.raises(
        ValueError,
        match=rf"^scheduler\.params\.{key}: found 0\.01, above zeroth_order\.lr.* 0\.001",
    ):
        read_config(config(name, 1e-3, **{key: 1e-2}), 1)


def test_a_schedule_follows_the_optimizer_of_a_first_order_run_in_the_same_way():
    optimizer = {"type": "AdamW", "params": {"lr": 2e-4}}
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}
    run = read_first_order_config(
        {"train_batch_size": 8, "optimizer": optimizer, "scheduler": scheduler}, 1
    )
    assert run.scheduler["params"]["warmup_max_lr"] == 2e-4
    scheduler["params"]["warmup_max_lr"] = 1e-3
    with pytest.raises(
        ValueError, match=r"warmup_max_lr: found 0\.001, but optimizer\.params\.lr is 0\.0002"
    ):
        read_first_order_config(
            {"train_batch_size": 8, "optimizer": optimizer, "scheduler": scheduler}, 1
        )


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("WarmupLr", {}, "scheduler.type: found 'WarmupLr'"),
        ("Optimizer", {}, "scheduler.type: found 'Optimizer'"),
        ("LRScheduler", {}, "scheduler.type: found 'LRScheduler'"),
        ("StepLR", {"step_sise": 3}, "StepLR refused"),
        ("StepLR", {"step_size": 0}, "StepLR refused"),
        ("WarmupLR", {"warmup_num_steps": -3}, "WarmupLR refused"),
        ("CosineAnnealingLR", {"T_max": 0}, "CosineAnnealingLR refused"),
    ],
)
def test_a_scheduler_that_cannot_be_made_is_refused_when_the_configuration_is_read(
    name, params, message
):
    with pytest.raises(ValueError, match=r"^scheduler") as caught:
        read_config(config(name, 1e-4, **params), 1)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "params", "key"),
    [
        ("OneCycleLR", {"total_steps": 20}, "total_steps"),
        ("WarmupDecayLR", {"total_num_steps": 20}, "total_num_steps"),
        ("WarmupCosineLR", {"total_num_steps": 20}, "total_num_steps"),
        (
            "OneCycle",
            {"cycle_first_step_size": 5, "cycle_second_step_size": 15},
            "cycle_first_step_size",
        ),
    ],
)
def test_a_schedule_that_ends_before_the_run_is_refused(name, params, key):
    read_config(config(name, 1e-4, **params), 1, total_steps=20)
    read_config(config(name, 1e-4, **params), 1)
    with pytest.raises(ValueError, match=rf"{key}: {name} ends after 20 steps, but the run has 21"):
        read_config(config(name, 1e-4, **params), 1, total_steps=21)


def test_a_cycle_that_ends_above_zero_may_be_shorter_than_the_run():
    read_config(config("OneCycle", 1e-4, cycle_min_lr=1e-5), 1, total_steps=100)


def test_a_provisional_length_lets_a_configuration_be_checked_before_the_steps_are_known():
    source = config("WarmupDecayLR", 1e-4, total_num_steps="auto")
    read_config(with_provisional_length(source), 1)
    assert source["scheduler"]["params"]["total_num_steps"] == "auto"
    source["zeroth_order"]["epss"] = 1
    with pytest.raises(ValueError, match="epss") as caught:
        read_config(with_provisional_length(source), 1)
    assert "auto" not in str(caught.value)


@pytest.mark.parametrize("name", ["WarmupLR", "OneCycle"])
def test_a_schedule_is_a_factor_of_a_measured_step_size(name):
    key = {"WarmupLR": "warmup_max_lr", "OneCycle": "cycle_max_lr"}[name]
    floor = {"cycle_min_lr": 0.0} if name == "OneCycle" else {}
    source = {
        "train_batch_size": 8,
        "scheduler": {"type": name, "params": {**floor}},
        "zeroth_order": {"lr": "auto"},
    }
    assert read_config(source, 1).scheduler["params"][key] == 1.0
    source["scheduler"]["params"][key] = 1e-3
    with pytest.raises(ValueError, match=rf"{key}: found 0.001, but zeroth_order.lr \(.auto., of"):
        read_config(source, 1)
