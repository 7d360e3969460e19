"""The configuration: every key's default, type and range; what is refused, and that the refusal
says what to do.
"""

import copy
import json
import math
import re
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zods.config.anchor_section import STORAGES, AnchorConfig
from zods.config.auto_values import resolve_model_auto
from zods.config.deepspeed_json import RunConfig, load_json, read_config
from zods.config.replicas_section import ReplicasConfig
from zods.config.schema import (
    DISTRIBUTIONS,
    METHODS,
    SVRG_ONLY,
    AnnealConfig,
    DirectionConfig,
    MixtureConfig,
    ZerothOrderConfig,
    parse_section,
    read_section,
)
from zods.config.section import SECTION
from zods.config.selector_section import STRATEGIES, SelectorConfig

FOLDER = Path(__file__).parents[2] / "ds_configs"


def config(section: dict | None = None, **deepspeed) -> dict:
    """A whole configuration: batch 8 unless said otherwise."""
    if not any(key.startswith("train_") for key in deepspeed):
        deepspeed["train_batch_size"] = 8
    return {**deepspeed, SECTION: section or {}}


def refused(source, *parts: str, world_size: int = 1) -> str:
    """The message of the ValueError that `source` meets; each of `parts` must be in it."""
    with pytest.raises(ValueError, match=r".") as caught:
        read_config(source, world_size)
    message = str(caught.value)
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"
    return message


# --- the section: defaults, types, ranges ---

DEFAULTS = {
    "method": "mezo",
    "eps": 1e-3,
    "lr": "auto",
    "anchor_lr": None,
    "anchor_interval": 100,
    "num_directions": 1,
    "anchor_directions": 1,
    "anchor_split": True,
    "anchor_examples": None,
    "share_direction": True,
    "anchor_weight": 1.0,
    "direction": {"distribution": "low_rank", "rank": 1},
    "examples_per_direction": 1,
    "loss_mean": "tokens",
    "objective": "loss",
    "generate": None,
    "evaluation": "auto",
    "stream_memory_gb": None,
    "fused_norm": "auto",
    "seed": 42,
    "group_by_length": False,
    "mixture": None,
    "dataloader_num_workers": 0,
    "weight_decay": 0.0,
    "anneal": None,
    "normalize": True,
    "stochastic_rounding": True,
    "agreement_interval": 10,
    "max_nonfinite_steps": 10,
    "comm": "torch",
    "hang_timeout": 600.0,
    "load_timeout": 3600.0,
    "anchor": {
        "point": "cpu",
        "gradient": "cpu",
        "nvme_path": None,
        "buffer_count": 3,
        "buffer_size": 1 << 22,
        "pin_memory": True,
    },
    "selector": None,
    "replicas": None,
}
SELECTOR_DEFAULTS = {
    "candidates": 16,
    "strategy": "greedy",
    "target_file": None,
    "source_column": None,
    "num_clusters": 8,
    "quotas": None,
    "weights": "uniform",
    "warmup_steps": 0,
    "interval": 1,
    "metric": "l2",
    "features": "exact",
    "num_directions": 64,
    "rank": 4,
    "pattern": None,
    "eps": 1e-3,
    "two_sided": True,
    "top": 2560,
}
ANNEAL_DEFAULTS = {"alpha": 5.0, "threshold": 1.05}

# key: (values taken as they are, values refused)
NOT_NUMBERS = [
    "1",
    "1e-3",
    "",
    True,
    False,
    [],
    [1],
    {},
    {"value": 1},
    math.nan,
    math.inf,
    -math.inf,
    "auto",
]
FLOATS = {
    "eps": ([1e-8, 1e-3, 1, 10.0], [0, 0.0, -1e-3, None, *NOT_NUMBERS]),
    "lr": (["auto", 0, 0.0, 1e-7, 1], [-1e-9, None, *(v for v in NOT_NUMBERS if v != "auto")]),
    "anchor_lr": ([None, 0, 1e-3], [-1e-9, *NOT_NUMBERS]),
    "anchor_weight": (
        [0, 0.5, 1],
        [-0.1, 1.5, 2, None, *(n for n in NOT_NUMBERS if n != "auto")],
    ),
    "stream_memory_gb": ([None, 0.5, 80], [0, -1, *NOT_NUMBERS]),
    "hang_timeout": ([0.5, 600], [0, -1, None, *NOT_NUMBERS]),
    "load_timeout": ([0.5, 600], [0, -1, None, *NOT_NUMBERS]),
    "replicas.silence_timeout": ([0.5, 30], [0, -1, None, *NOT_NUMBERS]),
    "replicas.straggler_timeout": ([0.5, 30, None], [0, -1, *NOT_NUMBERS]),
    "replicas.leader_timeout": ([0.5, 300], [0, -1, None, *NOT_NUMBERS]),
    "weight_decay": ([0, 0.1, 1], [-0.1, None, *NOT_NUMBERS]),
    "anneal.alpha": ([1.01, 2, 5.0], [1, 1.0, 0.5, 0, -5, None, *NOT_NUMBERS]),
    "selector.eps": ([1e-8, 1e-3, 1], [0, -1e-3, None, *NOT_NUMBERS]),
    "anneal.threshold": ([0.5, 1, 1.05], [0, -1, None, *NOT_NUMBERS]),
}
NOT_WHOLE = [-1, 1.0, 2.5, 1e3, *NOT_NUMBERS]
INTEGERS = {
    "anchor_interval": ([1, 2, 10**6], [0, None, *NOT_WHOLE]),
    "num_directions": ([1, 16, 65536], [0, 65537, 10**9, None, *NOT_WHOLE]),
    "anchor_directions": ([1, 16], [0, 65537, None, *NOT_WHOLE]),
    "anchor_examples": ([None, 1, 10**9], [0, *NOT_WHOLE]),
    "seed": ([0, 1, 2**63 - 1], [2**63, 2**64, None, *NOT_WHOLE]),
    "agreement_interval": ([1, 1000], [0, None, *NOT_WHOLE]),
    "max_nonfinite_steps": ([0, 5], [None, *NOT_WHOLE]),
    "dataloader_num_workers": ([0, 4], [None, *NOT_WHOLE]),
    "generate.max_new_tokens": ([1, 256], [0, None, *NOT_WHOLE]),
    "direction.rank": ([1], [0, None, *NOT_WHOLE]),
    "anchor.buffer_count": ([1, 2, 8], [0, None, *NOT_WHOLE]),
    "replicas.index": ([0, 7], [None, *NOT_WHOLE]),
    "selector.candidates": ([8, 128], [0, None, *NOT_WHOLE]),
    "selector.num_clusters": ([1, 8], [0, None, *NOT_WHOLE]),
    "selector.warmup_steps": ([0, 8], [None, *NOT_WHOLE]),
    "selector.interval": ([1, 8], [0, None, *NOT_WHOLE]),
    "selector.num_directions": ([1, 8], [0, None, *NOT_WHOLE]),
    "selector.rank": ([1, 8], [0, None, *NOT_WHOLE]),
    "selector.top": ([1, 8], [0, None, *NOT_WHOLE]),
    "anchor.buffer_size": ([1, 10**9], [0, None, *NOT_WHOLE]),
}
NOT_BOOLEANS = [0, 1, None, "true", "false", "", [], {}, 1.0, "auto"]
BOOLEANS = {
    key: ([True, False], NOT_BOOLEANS)
    for key in (
        *("share_direction", "normalize", "stochastic_rounding", "anchor_split"),
        "group_by_length",
        *("anchor.pin_memory", "selector.two_sided"),
    )
}
BOOLEANS["fused_norm"] = (
    ["auto", True, False],
    ["apex", "true", *(value for value in NOT_BOOLEANS if value != "auto")],
)
NOT_NAMES = [None, "", 0, 1, True, [], {}, "auto", ["gaussian"]]
NAMES = {
    "method": (["mezo", "mezo_svrg"], ["MeZO", "svrg", "mezo-svrg", "adamw", *NOT_NAMES]),
    "direction.distribution": (list(DISTRIBUTIONS), ["normal", "Gaussian", "low rank", *NOT_NAMES]),
    "examples_per_direction": (["all", 1, 4], ["one", 1.0, -1, *(n for n in NOT_NAMES if n != 1)]),
    "objective": (
        ["loss", "accuracy", "token_accuracy", "candidates"],
        ["acc", "a.b", "a:b:c", ":f", *NOT_NAMES],
    ),
    "loss_mean": (["tokens", "examples"], ["token", "Tokens", "batch", *NOT_NAMES]),
    "evaluation": (
        ["auto", "stacked", "lockstep", "sequential"],
        ["Stacked", "both", *(n for n in NOT_NAMES if n != "auto")],
    ),
    "comm": (["torch", "mpi"], ["MPI", "gloo", *NOT_NAMES]),
    "anchor.point": (["device", "cpu", "terms"], ["gpu", "CPU", "disk", "none", *NOT_NAMES]),
    "anchor.gradient": (["device", "cpu", "terms"], ["gpu", "cuda", "none", *NOT_NAMES]),
}
NAMES |= {
    "selector.strategy": (list(STRATEGIES), ["Greedy", "best", *NOT_NAMES]),
    "selector.features": (["exact", "zo", "paper", "hidden_states"], ["gradient", *NOT_NAMES]),
    "selector.metric": (["l1", "l2", "cosine"], ["L1", *NOT_NAMES]),
    "selector.weights": (["uniform", "cluster"], ["Uniform", *NOT_NAMES]),
}
SECTIONS = {
    "selector": ([], [1, "on", [], True, False, "auto"]),
    "anchor": ([{}], [None, 1, "cpu", [], True, "auto"]),
    "direction": ([{}], [None, 1, [], True]),
    "anneal": ([{}], [1, "on", [], True, False, "auto"]),
    "generate": ([], [1, "on", [], True, False, "auto"]),
    "replicas": ([], [1, "on", [], True, False, "auto"]),
    "mixture": ([], [1, "on", [], True, False, "auto"]),
}
TEXTS = {
    "anchor.nvme_path": ([], [1, True, [], {}, "auto"]),
    "replicas.store": (
        ["host:29900"],
        ["host", ":1", "host:", "host:0", "host:65536", None, 1, True, [], {}, "auto"],
    ),
    "selector.source_column": ([None, "source"], [1, True, [], {}, "auto"]),
    "replicas.token_file": ([None, "/a/file"], [1, True, [], {}, "auto"]),
    "selector.target_file": ([None, "target.jsonl"], [1, True, [], {}, "auto"]),
    "selector.pattern": ([None, "v_proj"], [1, True, [], {}, "auto"]),
    "selector.quotas": ([None], [1, True, [], {}]),
    "mixture.source_column": (["source"], [None, 1, True, [], {}, "auto"]),
    "mixture.weights": ([{"a": 1.0, "b": 0.25}], [None, 1, True, [], {}]),
}
KEYS = {**FLOATS, **INTEGERS, **BOOLEANS, **NAMES, **SECTIONS, **TEXTS}


def nested(path: str, value) -> dict:
    """{"a": {"b": value}} for "a.b"."""
    first, _, rest = path.partition(".")
    needed = {
        "selector": {"candidates": 16},
        "replicas": {"store": "host:1"},
        "mixture": {"source_column": "s", "weights": {"a": 1}},
    }.get(first, {})
    others = {"method": "mezo_svrg"} if first in SVRG_ONLY else {}
    if first in ("objective", "generate"):
        others = {"lr": 1e-3}
    if first == "generate":
        others |= {"objective": "f1"}
    return {**others, first: {**needed, **nested(rest, value)} if rest else value}


def at(section: ZerothOrderConfig, path: str):
    found = section.to_dict()
    for key in path.split("."):
        found = found[key]
    return found


ACCEPTED = [
    (key, value) for key, (taken, _) in KEYS.items() for value in taken if key not in SECTIONS
]
REFUSED = [(key, value) for key, (_, values) in KEYS.items() for value in values]


def test_defaults_are_those_documented():
    assert parse_section({}).to_dict() == DEFAULTS
    assert parse_section({"anneal": {}}).to_dict() == {**DEFAULTS, "anneal": ANNEAL_DEFAULTS}
    assert parse_section({"anneal": None}).anneal is None
    assert parse_section({"selector": {"candidates": 16}}).to_dict() == {
        **DEFAULTS,
        "selector": SELECTOR_DEFAULTS,
    }
    assert parse_section({"selector": None}).selector is None
    svrg = {"method": "mezo_svrg"}
    assert parse_section({**svrg, "anchor": {}}) == parse_section(svrg)
    low_rank = DirectionConfig(distribution="low_rank", rank=1)
    assert parse_section({"direction": "low_rank"}).direction == low_rank
    assert parse_section(
        {"direction": {"distribution": "low_rank", "rank": 4}}
    ).direction == DirectionConfig(distribution="low_rank", rank=4)


def test_a_selector_is_refused_where_it_does_not_fit_the_batch():
    refused(config({"selector": {}}), f"{SECTION}.selector.candidates: missing")
    refused(
        config({"selector": {"candidates": 7}}),
        f"{SECTION}.selector.candidates: found 7",
        "8 (train_batch_size)",
    )
    quotas = {"candidates": 9, "source_column": "source", "quotas": {"a": 3, "b": 4}}
    refused(
        config({"selector": quotas}), f"{SECTION}.selector.quotas: they sum to 7, must sum to 8"
    )
    refused(
        config({"selector": {"candidates": 9, "quotas": {"a": 8}}}),
        "selector.quotas: given without",
        "source_column",
    )
    refused(config({"selector": quotas | {"quotas": {"a": -1}}}), "selector.quotas.a: found -1")
    target = {"candidates": 9, "strategy": "target"}
    refused(
        config({"selector": {"candidates": 9, "target_file": "t.jsonl"}}),
        "selector.target_file: given, but strategy is 'greedy'",
    )
    refused(
        config({"selector": target | {"features": "paper"}}), 'selector.features: found "paper"'
    )
    refused(
        config({"selector": quotas | target}), "selector.quotas: target does not choose by source"
    )
    taken = read_config(config({"selector": quotas | {"quotas": {"a": 3, "b": 5}}}), 1)
    assert taken.zeroth_order.selector.quotas == {"a": 3, "b": 5}
    assert read_config(taken.to_dict(), 1) == taken


def test_a_rank_belongs_to_low_rank_directions():
    refused(
        config({"direction": {"distribution": "gaussian", "rank": 4}}),
        f"{SECTION}.direction.rank: ",
        "low_rank",
    )


def test_keys_that_do_not_fit_are_refused_however_a_section_is_made():
    with pytest.raises(ValueError, match="rank: belongs to"):
        DirectionConfig(distribution="gaussian", rank=4)
    with pytest.raises(ValueError, match="nvme_path: missing"):
        AnchorConfig(point="nvme")


def test_a_section_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        ZerothOrderConfig().lr = 1.0


def test_every_quota_that_is_wrong_is_told_and_the_sum_of_the_others_is_not():
    quotas = {"b": -1, "a": "auto", "rank": 1.0, "c": 2}
    selector = {"candidates": 9, "source_column": "source", "quotas": quotas}
    _, *told = refused(config({"selector": selector})).splitlines()
    key = f"{SECTION}.selector.quotas"
    assert told == [
        f"  {key}.b: found -1, must be 0 or more.",
        f'  {key}.a: "auto" is not resolved for this key; give a value or leave it out for the '
        f"default.",
        f"  {key}.rank: found 1.0 (float), expected int.",
    ]


def test_mistakes_of_keys_are_told_in_the_order_of_the_file_and_those_between_keys_last():
    section = {
        "seed": -1,
        "direction": {"distribution": "gaussian", "rank": 2},
        "selector": {"rank": 0, "candidate": 1},
        "eps": 1,
        "lr": None,
        "replicas": {"store": "host"},
        "anneal": {"alpha": 1},
    }
    found: list[str] = []
    assert read_section(section, found).seed == ZerothOrderConfig().seed
    assert [message.split(":")[0].removeprefix(f"{SECTION}.") for message in found] == [
        "seed",
        "selector.rank",
        "selector.candidate",
        "selector.candidates",
        "anneal.alpha",
        "direction.rank",
        "lr",
        "replicas.store",
    ]


def test_a_key_of_earlier_versions_is_refused_with_what_takes_its_place():
    with pytest.raises(
        ValueError, match=r"zeroth_order.directions: a key of earlier versions\. Use "
    ):
        parse_section({"directions": "per_rank"})


def test_a_text_that_is_no_unicode_is_refused_by_its_key():
    refused(config({"loss_mean": "\ud800"}), f"{SECTION}.loss_mean: found '\\ud800'")
    refused(config({"\ud800": 1}), f"{SECTION}: found '\\ud800'")


def test_every_key_is_in_these_tests():
    for cls, prefix in (
        (ZerothOrderConfig, ""),
        (AnchorConfig, "anchor."),
        (AnnealConfig, "anneal."),
        (DirectionConfig, "direction."),
        (SelectorConfig, "selector."),
        (ReplicasConfig, "replicas."),
        (MixtureConfig, "mixture."),
    ):
        assert {prefix + name for name in cls.model_fields} <= set(KEYS)


@pytest.mark.parametrize(("key", "value"), ACCEPTED)
def test_a_value_in_range_is_taken_as_it_is(key, value):
    found = at(parse_section(nested(key, value)), key)
    assert found == value
    if key in FLOATS and value not in (None, "auto"):
        assert type(found) is float


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_a_value_of_another_type_or_range_is_refused_by_its_key(key, value):
    with pytest.raises(ValueError, match=rf"{SECTION}\.{re.escape(key)}: ") as caught:
        parse_section(nested(key, value))
    message = str(caught.value)
    assert repr(value) in message or value == "auto"
    if value == "auto" and key not in SECTIONS:
        assert "leave it out for the default" in message


@pytest.mark.parametrize("key", KEYS)
def test_a_mistake_of_the_section_is_a_mistake_of_the_configuration_in_the_same_words(key):
    for value in KEYS[key][1][:2]:
        with pytest.raises(ValueError, match=r".") as caught:
            parse_section(nested(key, value))
        assert refused(config(nested(key, value))) == str(caught.value)


def test_a_float_that_no_float_can_hold_is_refused():
    refused(config({"lr": 10**400}), f"{SECTION}.lr: ")


def test_the_names_allowed_are_told_with_the_nearest():
    assert "Did you mean 'mezo_svrg'?" in refused(config({"method": "mezo-svrg"}), *METHODS)
    assert "Did you mean 'gaussian'?" in refused(config({"direction": "gausian"}), *DISTRIBUTIONS)
    assert "Did you mean 'nvme'?" in refused(config({"anchor": {"point": "nvm"}}), *STORAGES)


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("learning_rte", None),
        ("epsilon", "eps"),
        ("num_direction", "num_directions"),
        ("anchor_directons", "anchor_directions"),
        ("Method", "method"),
        ("anchor.gradients", "gradient"),
        ("anchor.nvmepath", "nvme_path"),
        ("anneal.alfa", "alpha"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_and_the_allowed(path, nearest):
    message = refused(config(nested(path, 1)), f"{SECTION}.{path}: unknown key")
    if nearest is not None:
        assert f"Did you mean {nearest!r}?" in message
    cls = {"anchor": AnchorConfig, "anneal": AnnealConfig}.get(
        path.partition(".")[0], ZerothOrderConfig
    )
    assert all(name in message.partition("Allowed keys are")[2] for name in cls.model_fields)


@pytest.mark.parametrize("section", [None, [], "mezo", 1, True])
def test_a_section_that_is_none_is_refused(section):
    refused({"train_batch_size": 8, SECTION: section}, f"{SECTION}: ", "expected a section")


def test_a_configuration_without_the_section_is_refused():
    refused({"train_batch_size": 8}, SECTION, "Add one")


@pytest.mark.parametrize("key", SVRG_ONLY)
def test_keys_of_svrg_are_refused_with_mezo(key):
    value = DEFAULTS[key] if key != "anchor_lr" else 1e-3
    refused(config({"method": "mezo", key: value}), key, "mezo_svrg")
    assert parse_section({"method": "mezo_svrg", key: value}).is_svrg


def test_mezo_takes_every_other_key():
    others = {key: value for key, value in DEFAULTS.items() if key not in (*SVRG_ONLY, "method")}
    assert not parse_section({"method": "mezo", **others}).is_svrg


@pytest.mark.parametrize("role", ["point", "gradient"])
def test_nvme_needs_its_path_and_the_path_needs_nvme(role):
    key = f"{SECTION}.anchor.nvme_path"
    refused(config({"method": "mezo_svrg", "anchor": {role: "nvme"}}), key, "missing")
    refused(
        config({"method": "mezo_svrg", "anchor": {role: "nvme", "nvme_path": ""}}), key, "missing"
    )
    refused(
        config({"method": "mezo_svrg", "anchor": {role: "cpu", "nvme_path": "/drive"}}),
        key,
        "neither",
    )
    read = parse_section({"method": "mezo_svrg", "anchor": {role: "nvme", "nvme_path": "/drive"}})
    assert read.anchor.nvme_path == "/drive"


# --- DeepSpeed's part ---


@pytest.mark.parametrize("stage", [0, 3])
def test_stages_0_and_3_are_taken(stage):
    assert read_config(config(zero_optimization={"stage": stage}), 1).zero_stage == stage


def test_no_zero_section_is_stage_0():
    assert read_config(config(), 1).zero_stage == 0
    assert read_config(config(zero_optimization={}), 1).zero_stage == 0


@pytest.mark.parametrize("stage", [1, 2, 4, -1, "3", None, True, False, 3.5, [], "auto"])
def test_another_stage_is_refused(stage):
    refused(
        config(zero_optimization={"stage": stage}), "zero_optimization.stage", repr(stage), "0", "3"
    )


OFFLOADED = {"stage": 3, "offload_param": {"device": "nvme"}}
UNSUPPORTED = [
    ({"optimizer": {"type": "AdamW"}}, ["optimizer", SECTION, "remove"]),
    ({"optimizer": None}, ["optimizer"]),
    ({"fp16": {"enabled": True}}, ["fp16", "bf16"]),
    ({"fp16": {"enabled": "auto"}}, ["fp16", "bf16"]),
    ({"amp": {"enabled": True}}, ["amp: ", "bf16"]),
    ({"torch_autocast": {"enabled": True}}, ["torch_autocast"]),
    ({"gradient_clipping": 1.0}, ["gradient_clipping", "1.0"]),
    ({"expert_parallel": {"enabled": True}}, ["expert_parallel"]),
    ({"pipeline": {"stages": 2}}, ["pipeline"]),
    ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel"]),
    ({"sequence_parallel_size": 2}, ["sequence_parallel_size"]),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
        ["offload_optimizer", "offload_param"],
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        ["offload_optimizer"],
    ),
    (
        {"zero_optimization": {"stage": 0, "offload_param": {"device": "cpu"}}},
        ["offload_param", "stage 3", "stage 0"],
    ),
    ({"zero_optimization": OFFLOADED}, ["offload_param.nvme_path", "missing"]),
    (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
        ["zero_hpz_partition_size"],
    ),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, ["mics_shard_size"]),
    (
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        ["zero_quantized_weights"],
    ),
    (
        {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
        ["zero_quantized_nontrainable_weights"],
    ),
]


@pytest.mark.parametrize(
    ("deepspeed", "parts"), UNSUPPORTED, ids=[json.dumps(d) for d, _ in UNSUPPORTED]
)
def test_what_a_zeroth_order_step_cannot_use_is_refused_by_its_key(deepspeed, parts):
    refused(config(**deepspeed), *parts)


@pytest.mark.parametrize(
    "deepspeed",
    [
        {"fp16": {"enabled": False}},
        {"bf16": {"enabled": True}},
        {"torch_autocast": {"enabled": False}},
        {"gradient_clipping": 0.0},
        {"tensor_parallel": {}},
        {"sequence_parallel_size": 1},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}},
        {
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "nvme", "nvme_path": "/drive"},
            }
        },
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1}},
        {
            "activation_checkpointing": {"cpu_checkpointing": True},
            "vocabulary_size": 512,
            "datastates_ckpt": {},
        },
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": False}},
        {"steps_per_print": 10, "wall_clock_breakdown": False, "tensorboard": {"enabled": False}},
    ],
    ids=json.dumps,
)
def test_what_is_switched_off_or_of_no_concern_is_left_to_deepspeed(deepspeed):
    run = read_config(config(**deepspeed), 1)
    assert {key: run.deepspeed[key] for key in deepspeed} == deepspeed


@pytest.mark.parametrize("key", ["zero_optimization", "scheduler", "bf16", "fp16"])
@pytest.mark.parametrize("value", [[], "on", 3, True])
def test_a_section_of_deepspeed_that_is_no_section_is_refused_by_its_key(key, value):
    refused(config(**{key: value}), f"{key}")


@pytest.mark.parametrize("key", ["offload_param", "offload_optimizer"])
@pytest.mark.parametrize("value", [[], "cpu", 3, True])
def test_an_offload_section_that_is_no_section_is_refused_by_its_key(key, value):
    refused(config(zero_optimization={"stage": 3, key: value}), f"zero_optimization.{key}")


# --- batch sizes ---

_ = None  # not given
BATCHES = [  # ranks, (batch, micro, accumulation) given -> (batch, micro, accumulation)
    (1, (8, _, _), (8, 8, 1)),
    (2, (8, _, _), (8, 4, 1)),
    (8, (8, _, _), (8, 1, 1)),
    (1, (_, 4, _), (4, 4, 1)),
    (2, (_, 4, _), (8, 4, 1)),
    (2, (_, 4, 3), (24, 4, 3)),
    (2, (24, 4, _), (24, 4, 3)),
    (2, (24, _, 3), (24, 4, 3)),
    (2, (24, 4, 3), (24, 4, 3)),
    (2, (24, "auto", 3), (24, 4, 3)),
    (2, ("auto", 4, "auto"), (8, 4, 1)),
    (2, (24, 4, "auto"), (24, 4, 3)),
    (2, (8, "auto", "auto"), (8, 4, 1)),
    (3, (8, _, _), "8"),
    (16, (8, _, _), "8"),
    (2, (24, 4, 2), "24"),
    (2, (25, 4, _), "25"),
    (2, (4, 4, _), "4"),
    (2, (25, _, 3), "25"),
    (1, (_, _, 2), "train_micro_batch_size_per_gpu"),
    (1, ("auto", "auto", "auto"), "train_batch_size"),
    (1, (_, _, _), "train_batch_size"),
    (1, (0, _, _), "train_batch_size"),
    (1, (-8, _, _), "train_batch_size"),
    (1, (8.0, _, _), "train_batch_size"),
    (1, ("8", _, _), "train_batch_size"),
    (1, (True, _, _), "train_batch_size"),
    (1, (8, 0, _), "train_micro_batch_size_per_gpu"),
    (1, (8, _, 0), "gradient_accumulation_steps"),
    (1, (8, _, [1]), "gradient_accumulation_steps"),
]


@pytest.mark.parametrize(("ranks", "given", "expected"), BATCHES)
def test_batch_sizes_are_resolved_or_refused(ranks, given, expected):
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    source = {
        **{key: value for key, value in zip(keys, given, strict=True) if value is not _},
        SECTION: {},
    }
    if isinstance(expected, str):
        refused(source, expected, world_size=ranks)
    else:
        run = read_config(source, ranks)
        assert tuple(run.deepspeed[key] for key in keys) == expected


def test_batch_sizes_that_do_not_multiply_out_are_told_with_their_product():
    refused(config(train_batch_size=24, train_micro_batch_size_per_gpu=4,
                   gradient_accumulation_steps=2),
            "found 24", "(4)", "(2)", "(2) = 16", world_size=2)  # fmt: skip


# --- "auto" and the scheduler ---


def test_autos_of_the_scheduler_follow_from_lr():
    params = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": 10}
    run = read_config(config({"lr": 3e-5}, scheduler={"type": "WarmupLR", "params": params}), 1)
    resolved = {"warmup_min_lr": 0.0, "warmup_max_lr": 3e-5, "warmup_num_steps": 10}
    assert run.scheduler == {"type": "WarmupLR", "params": resolved}
    assert "scheduler" not in run.deepspeed


def test_an_auto_of_the_scheduler_that_does_not_follow_is_refused():
    params = {"warmup_num_steps": "auto", "total_num_steps": 10}
    refused(
        config(scheduler={"type": "WarmupDecayLR", "params": params}),
        "scheduler.params.warmup_num_steps",
        "auto",
    )


def test_a_scheduler_without_params_is_taken_and_follows_lr():
    run = read_config(config({"lr": 3e-5}, scheduler={"type": "WarmupLR"}), 1)
    assert run.scheduler == {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-5}}


@pytest.mark.parametrize(
    "scheduler",
    [
        {},
        {"params": {}},
        {"type": None},
        {"type": 1},
        {"type": "WarmupLR", "params": []},
        "WarmupLR",
        1,
        [],
    ],
    ids=json.dumps,
)
def test_a_scheduler_that_is_not_one_is_refused(scheduler):
    refused(config(scheduler=scheduler), "scheduler")


@pytest.mark.parametrize(
    ("deepspeed", "key"),
    [
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled"),
        ({"steps_per_print": "auto"}, "steps_per_print"),
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "auto"}},
         "zero_optimization.stage3_max_live_parameters"),
        ({"gradient_predivide_factor": "auto"}, "gradient_predivide_factor"),
        ({"aio": {"block_size": "auto"}}, "aio.block_size"),
    ],
)  # fmt: skip
def test_an_auto_that_nothing_resolves_is_refused_by_its_key(deepspeed, key):
    refused(config(**deepspeed), f"{key}: ", "auto")


def test_what_the_rest_of_the_configuration_settles_is_not_asked_for_again():
    """A configuration as it is written for the Trainer of transformers, but for the precision."""
    params = {
        "total_num_steps": "auto",
        "warmup_num_steps": 5,
        "warmup_max_lr": "auto",
        "warmup_min_lr": "auto",
    }
    source = config(
        {"lr": 2e-5},
        bf16={"enabled": False},
        fp16={"enabled": "auto", "initial_scale_power": 16},
        amp={"enabled": "auto", "opt_level": "auto"},
        gradient_clipping="auto",
        train_batch_size=8,
        train_micro_batch_size_per_gpu="auto",
        gradient_accumulation_steps="auto",
        scheduler={"type": "WarmupDecayLR", "params": params},
    )
    run = read_config(source, 2, total_steps=40)
    assert run.deepspeed["fp16"]["enabled"] is False
    assert run.deepspeed["gradient_clipping"] == 0.0
    assert "amp" not in run.deepspeed, "DeepSpeed refuses the key whatever its value"
    resolved = {
        "total_num_steps": 40,
        "warmup_num_steps": 5,
        "warmup_max_lr": 2e-5,
        "warmup_min_lr": 0.0,
    }
    assert run.scheduler["params"] == resolved
    assert read_config(run.to_dict(), 2) == run, "zods.initialize reads what zods.finetune resolved"
    assert "--max_steps" in refused(source, "scheduler.params.total_num_steps", world_size=2)


@pytest.mark.parametrize(
    "bf16", [{"enabled": "auto"}, {}, {"enabled": "true"}, {"enabled": 1}], ids=json.dumps
)
def test_the_dtype_of_the_weights_is_never_guessed(bf16):
    message = refused(
        config(bf16=bf16, fp16={"enabled": "auto"}), "bf16.enabled: ", "true", "false"
    )
    assert len(message.splitlines()) == 1, "that of fp16 follows from it"


def test_all_mistakes_of_a_configuration_are_told_at_once():
    source = config(
        {
            "method": "mezo",
            "lrr": 1e-6,
            "eps": 0,
            "anchor": {"point": "ram"},
            "selector": {"candidate": 16},
        },
        bf16={"enabled": "auto"},
        fp16={"enabled": "auto"},
        optimizer={"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        gradient_clipping=1.0,
        nebula={"enabled": False},
        steps_per_prin=5,
        zero_optimization={"stage": 2, "overlap_com": True, "reduce_scatter": "often"},
        tensorboard={"outputpath": "x"},
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}, "param": {}},
        train_batch_size=8,
        train_micro_batch_size_per_gpu=3,
    )
    first, *told = refused(source, world_size=1).splitlines()
    keys = [line.strip().split(":")[0] for line in told]
    assert sorted(keys) == sorted(
        [
            *("zeroth_order.lrr", "zeroth_order.eps", "zeroth_order.anchor.point", "zeroth_order"),
            *("zeroth_order.selector.candidate", "zeroth_order.selector.candidates"),
            *("bf16.enabled", "optimizer", "gradient_clipping", "nebula", "steps_per_prin"),
            *(
                "zero_optimization.stage",
                "zero_optimization.overlap_com",
                "zero_optimization.reduce_scatter",
            ),
            *("tensorboard.outputpath", "scheduler.param", "train_batch_size"),
        ]
    )
    assert first == f"{len(keys)} mistakes in the configuration:"


def test_an_absurd_batch_is_refused_at_once():
    refused(
        config(train_batch_size=10**12 + 1, train_micro_batch_size_per_gpu=2),
        "train_batch_size: found 1000000000001",
    )


def test_a_selector_that_does_not_fit_is_told_with_the_other_mistakes():
    message = refused(config({"eps": 0, "selector": {"candidates": 4}}, steps_per_prin=5))
    assert all(
        key in message
        for key in ("zeroth_order.eps", "zeroth_order.selector.candidates", "steps_per_prin")
    )


def test_a_batch_that_does_not_divide_is_told_by_the_keys_that_were_given():
    message = refused(
        config(train_batch_size=5, gradient_accumulation_steps=10), "train_batch_size: found 5"
    )
    assert "gradient_accumulation_steps (10)" in message
    assert "train_micro_batch_size_per_gpu" not in message, "which was not given, and would be 0"


MODEL_AUTOS = {
    "reduce_bucket_size": 4096,
    "stage3_prefetch_bucket_size": 3686,
    "stage3_param_persistence_threshold": 640,
}


def test_autos_of_the_buckets_follow_from_the_hidden_size_or_are_left_out():
    zero = {"stage": 3, **dict.fromkeys(MODEL_AUTOS, "auto")}
    run = read_config(config(zero_optimization=zero), 1)
    resolve_model_auto(run.deepspeed, 64)
    assert run.deepspeed["zero_optimization"] == {"stage": 3, **MODEL_AUTOS}
    run = read_config(config(zero_optimization=zero), 1)
    resolve_model_auto(run.deepspeed, None)
    assert run.deepspeed["zero_optimization"] == {"stage": 3}


def test_nothing_is_gathered_ahead_where_gathers_do_not_overlap_unless_the_json_says_so():
    nvme = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/drive"}}
    for zero, expected in (
        ({"stage": 3}, 0),
        ({"stage": 3, "stage3_prefetch_bucket_size": "auto"}, 0),
        ({"stage": 3, "stage3_prefetch_bucket_size": 7}, 7),
        ({"stage": 0}, None),
        (nvme, None),
    ):
        ds = {"zero_optimization": dict(zero)}
        resolve_model_auto(ds, 64, overlaps=False)
        assert ds["zero_optimization"].get("stage3_prefetch_bucket_size") == expected


def test_buckets_that_are_given_stay():
    ds = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5}}
    resolve_model_auto(ds, 64)
    assert ds == {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5}}


# --- files ---


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "no.json"))):
        read_config(tmp_path / "no.json", 1)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        read_config(tmp_path, 1)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"train_batch_size": 8',
        '{"a": }',
        "[1, 2]",
        "3",
        '"text"',
        "null",
        "{]",
        '{"a": [1, 2}',
        "\x00",
    ],
)
def test_a_file_that_is_not_json_is_named(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    refused(path, "broken.json")


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "empty.json"
    path.write_text("")
    refused(path)


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "broken.json"
    path.write_bytes(b'{"a": "\xff\xfe"}')
    refused(path, "broken.json")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"train_batch_size": 8, "zeroth_order": {}, "train_batch_size": 16}', "train_batch_size"),
        ('{"train_batch_size": 8, "zeroth_order": {"lr": 1e-6, "lr": 1e-5}}', "lr"),
        (
            '{"train_batch_size": 8, "zeroth_order": {"anchor": {"point": "cpu", "point": '
            '"terms"}}}',
            "point",
        ),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path, text, key):
    path = tmp_path / "twice.json"
    path.write_text(text)
    refused(path, "twice.json", f"{key} given twice")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + "0" * 5000])
def test_a_number_that_python_cannot_hold_is_refused_with_the_file(tmp_path, number):
    path = tmp_path / "large.json"
    path.write_text('{"train_batch_size": 8, "zeroth_order": {"lr": ' + number + "}}")
    refused(path, "large.json", "not valid JSON")


@pytest.mark.parametrize("nested", ["[" * 100_000, '{"a":' * 100_000])
def test_deep_nesting_is_refused_with_the_file(tmp_path, nested):
    path = tmp_path / "deep.json"
    path.write_text(nested)
    refused(path, "deep.json", "not valid JSON")


@pytest.mark.parametrize("where", ["top", "section"])
def test_a_section_of_50000_keys_is_refused_as_a_whole(tmp_path, where):
    keys = {f"key{k}": k for k in range(50_000)}
    whole = {**config(), **keys} if where == "top" else config(keys)
    path = tmp_path / "many.json"
    path.write_text(json.dumps(whole))
    for source in (path, whole):
        assert len(refused(source, "keys, at most 1000")) < 300


def test_sections_of_together_50000_keys_are_refused_at_once(tmp_path):
    """Each unknown key would be compared with all known ones."""
    sections = {f"section{k}": {f"key{n}": n for n in range(500)} for k in range(100)}
    path = tmp_path / "many.json"
    path.write_text(json.dumps({**config(), **sections}))
    for source in (path, {**config(), **sections}):
        began = time.monotonic()
        assert len(refused(source, "keys, at most 1000")) < 300
        assert time.monotonic() < began + 10


def test_comments_are_allowed(tmp_path):
    path = tmp_path / "commented.json"
    path.write_text(
        '# at the top\n{ // after the brace\n  "train_batch_size": 8, # of all ranks\n  /* whole\n '
        "lines */\n"
        '  "zeroth_order": {"lr": 1e-5, "eps": 2e-3 // [mu]\n}\n}\n'
    )
    section = read_config(path, 1).zeroth_order
    assert (section.lr, section.eps) == (1e-5, 2e-3)


def test_a_path_a_string_and_a_dict_give_the_same(tmp_path):
    source = config({"lr": 1e-5}, bf16={"enabled": True})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(source))
    assert read_config(path, 1) == read_config(str(path), 1) == read_config(source, 1)
    assert load_json(path) == source


def test_the_dict_given_is_not_changed():
    params = {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}
    source = config(
        {"lr": 1e-5},
        scheduler={"type": "WarmupLR", "params": params},
        zero_optimization={"stage": 3},
        amp={"enabled": False},
        fp16={"enabled": "auto"},
        bf16={"enabled": True},
        gradient_clipping="auto",
    )
    before = copy.deepcopy(source)
    run = read_config(source, 2)
    resolve_model_auto(run.deepspeed, 64)
    assert source == before


@pytest.mark.parametrize(
    "source",
    [
        config({"method": "mezo", "lr": 1e-4}),
        config(
            {"method": "mezo_svrg", "anneal": {"alpha": 2.0}, "anchor": {"point": "terms"}},
            zero_optimization={"stage": 3},
        ),
        config(
            scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
            train_micro_batch_size_per_gpu=4,
        ),
    ],
    ids=["mezo", "svrg", "scheduler"],
)
def test_the_resolved_configuration_of_a_run_can_be_read_again(source):
    """The run's folder keeps it, so that the run can be repeated."""
    run = read_config(source, 2)
    assert read_config(json.loads(json.dumps(run.to_dict())), 2) == run


# --- the files that are shipped ---


def shipped() -> list[Path]:
    return sorted(FOLDER.glob("*.json"))


def test_configurations_are_shipped():
    assert shipped(), "ds_configs/ holds no *.json"


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path, world_size):
    """A file that gives all three batch keys fits one world size, the others fit 1, 2 and 8."""
    ds = load_json(path)
    fixed = [
        ds.get(key)
        for key in (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
        )
    ]
    if all(isinstance(value, int) for value in fixed):
        world_size = fixed[0] // (fixed[1] * fixed[2])
    run = read_config(path, world_size)
    resolve_model_auto(run.deepspeed, 64)
    assert run.zeroth_order == parse_section(ds[SECTION])
    assert run.deepspeed["train_batch_size"] == (
        run.deepspeed["train_micro_batch_size_per_gpu"]
        * run.deepspeed["gradient_accumulation_steps"]
        * world_size
    )
    # only the form of evaluation, fused norms and the step size are found later
    assert json.dumps(run.deepspeed).count("auto") == 0
    autos = {key for key, value in run.zeroth_order.to_dict().items() if value == "auto"}
    assert autos <= {"evaluation", "fused_norm", "lr"}


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.name)
def test_every_shipped_configuration_begins_by_saying_what_it_is_for(path):
    assert path.read_text().startswith(("#", "//"))


# --- any input at all: a configuration, or an error that is meant for the user ---

WHOLE = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.0,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": "auto", "warmup_num_steps": 5},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "nvme", "nvme_path": "/drive"},
        "offload_optimizer": {"device": "none"},
        "reduce_bucket_size": "auto",
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
    },
    "aio": {"block_size": 1048576},
    SECTION: {
        **DEFAULTS,
        "method": "mezo_svrg",
        "anneal": ANNEAL_DEFAULTS,
        "anchor": {**DEFAULTS["anchor"], "point": "nvme", "nvme_path": "/a"},
    },
}


def paths_in(value, here=()) -> list[tuple[str, ...]]:
    inside = (
        [p for key, item in value.items() for p in paths_in(item, (*here, key))]
        if isinstance(value, dict)
        else []
    )
    return [here, *inside] if here else inside


NAMES_KNOWN = sorted({key for path in paths_in(WHOLE) for key in path})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.integers(),
    st.floats(),
    st.sampled_from(
        [
            "auto",
            "cpu",
            "nvme",
            "none",
            "terms",
            "mezo",
            "WarmupLR",
            "",
            "0",
            10**400,
            -(10**400),
            2**63,
        ]
    ),
    st.text(max_size=6),
)
ANY_NAME = st.sampled_from(NAMES_KNOWN) | st.text(max_size=6)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(ANY_NAME, inner, max_size=3),
    max_leaves=4,
)
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(paths_in(WHOLE)),
        st.sampled_from(["set", "set", "set", "delete", "add"]),
        ANY_NAME,
        VALUES,
    ),
    min_size=1,
    max_size=3,
)
FUZZ = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def mutated(mutations) -> dict:
    whole = copy.deepcopy(WHOLE)
    for path, action, name, value in mutations:
        parent = whole
        for key in path[:-1]:
            parent = parent.get(key) if isinstance(parent, dict) else None
        if not isinstance(parent, dict):
            continue  # an earlier mutation took it away
        if action == "delete":
            parent.pop(path[-1], None)
        elif action == "set":
            parent[path[-1]] = value
        elif isinstance(parent.get(path[-1]), dict):
            parent[path[-1]][name] = value
    return whole


def assert_read_or_refused(source, world_size: int) -> None:
    try:
        run = read_config(source, world_size)
    except (ValueError, FileNotFoundError):
        return
    assert isinstance(run, RunConfig)
    resolve_model_auto(run.deepspeed, 64)
    assert run.zero_stage in (0, 3)
    json.dumps(run.to_dict())


def test_the_configuration_that_is_mutated_is_a_good_one():
    assert read_config(WHOLE, 2).deepspeed["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize("examples", [200, pytest.param(400, marks=pytest.mark.slow)])
def test_any_mutated_configuration_is_read_or_refused(examples):
    @settings(FUZZ, max_examples=examples)
    @given(mutations=MUTATIONS, world_size=st.sampled_from([1, 2, 8]))
    def check(mutations, world_size):
        assert_read_or_refused(mutated(mutations), world_size)

    check()


@settings(FUZZ, max_examples=100)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 2000), st.integers(0, 3), st.binary(max_size=3)),
        min_size=1,
        max_size=3,
    )
)
def test_any_damaged_file_is_read_or_refused(tmp_path_factory, edits):
    text = json.dumps(WHOLE, indent=1).encode()
    for position, removed, inserted in edits:
        start = position % len(text)
        text = text[:start] + inserted + text[start + removed :]
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(text)
    assert_read_or_refused(path, 2)


@settings(FUZZ, max_examples=100)
@given(content=st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(content)
    assert_read_or_refused(path, 1)


def test_a_file_nested_too_deeply_is_refused(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text('{"a": ' + "[" * 100_000)
    refused(path, "deep.json")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("bf_16", "bf16"),
        ("zerothorder", "zeroth_order"),
    ],
)
def test_a_mistyped_key_of_deepspeed_names_the_nearest(key, nearest):
    with pytest.raises(ValueError, match=rf"{key}: unknown key.*{nearest}"):
        read_config({"train_batch_size": 8, "zeroth_order": {"method": "mezo"}, key: {}}, 1)


def test_an_objective_without_gradients_has_a_step_size_and_a_mean_over_examples():
    with pytest.raises(
        ValueError, match=r'zeroth_order.lr: "auto" measures the curvature of a smoo'
    ):
        parse_section({"objective": "accuracy"})
    taken = parse_section({"objective": "accuracy", "lr": 1e-3})
    assert (taken.averages, parse_section({}).averages) == ("examples", "tokens")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("group_by_length", True),
        ("mixture", {"source_column": "s", "weights": {"a": 1}}),
        ("dataloader_num_workers", 2),
    ],
)
def test_keys_of_the_loader_are_refused_with_a_selector_and_the_reason(key, value):
    section = {key: value, "selector": {"candidates": 16}}
    refused(config(section), f"{SECTION}.{key}: given with {SECTION}.selector, but ")
    assert getattr(read_config(config({key: value}), 1).zeroth_order, key)


@pytest.mark.parametrize("weight", [0, -1, "1", None])
def test_a_weight_of_a_mixture_is_positive(weight):
    section = {"mixture": {"source_column": "s", "weights": {"a": 1, "b": weight}}}
    refused(config(section), f"{SECTION}.mixture.weights.b: found {weight!r}")


def test_objectives_of_text_and_of_logits_are_told_apart_by_the_section_generate():
    generate = {"max_new_tokens": 8}
    with pytest.raises(ValueError, match=r'generate: missing; objective "f1" scores generated'):
        parse_section({"objective": "f1", "lr": 1e-3})
    with pytest.raises(ValueError, match='generate: given, but objective "accuracy"'):
        parse_section({"objective": "accuracy", "lr": 1e-3, "generate": generate})
    with pytest.raises(ValueError, match='lr: "auto" measures the curvature of a smooth loss'):
        parse_section({"objective": "f1", "generate": generate})
    taken = parse_section({"objective": "a.b:f", "lr": 1e-3, "generate": generate})
    assert taken.averages == "examples"


def test_the_cross_entropy_over_candidates_is_smooth_and_so_its_step_size_can_be_measured():
    taken = parse_section({"objective": "candidates", "anneal": {}})
    assert (taken.lr, taken.averages) == ("auto", "examples")
