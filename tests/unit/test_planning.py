"""The planner on configurations alone: parameters, memory by form and place, its command line."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, OPTConfig

from zods.planning.__main__ import configuration, main, size
from zods.planning.activations import activations
from zods.planning.memory import memory, step_forwards
from zods.planning.model_shape import ModelShape, model_shape, read_model_config
from zods.planning.setup import Setup, read_setup
from zods.planning.traffic import traffic

REPOSITORY = Path(__file__).parents[2]
SMALL = LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
)


@pytest.fixture(scope="module")
def small() -> ModelShape:
    return model_shape("small", SMALL, torch.bfloat16)


def setup_of(model: ModelShape, ranks: int = 4, memory: int | None = None, **how: Any) -> Setup:
    section = how.pop("section", {})
    config = configuration(8, **how)
    config["zeroth_order"] |= section
    return read_setup(model, config, world_size=ranks, length=32, gpu_memory=memory)


@pytest.mark.parametrize(
    ("name", "numel"), [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("70b", 68_976_648_192)]
)
def test_built_in_shapes_have_the_published_number_of_parameters(name, numel):
    assert model_shape(name, read_model_config(name), torch.bfloat16).numel == numel


def test_a_shared_parameter_counts_once():
    shape = {"vocab_size": 50, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24}
    config = OPTConfig(**shape, num_hidden_layers=1, num_attention_heads=2)
    model = model_shape("opt", config, torch.float32)
    assert [p.name for p in model.shared] == ["model.decoder.embed_tokens.weight"]
    assert model.numel == sum(model.numel_by_kind().values())
    assert model.numel_by_kind()["embedding"] == 50 * 16 + (2048 + 2) * 16


def test_activations_grow_in_proportion_to_the_rows(small):
    two, eight = (activations(small, rows, 32) for rows in (2, 8))
    assert eight.logits == 4 * two.logits == 8 * 32 * 1000 * 2
    assert 3.9 < eight.peak / two.peak <= 4


def test_low_rank_directions_need_no_copies_of_matrices(small):
    low_rank, gaussian = (
        memory(setup_of(small, section={"direction": name}))["copies"].device
        for name in ("low_rank", "gaussian")
    )
    assert gaussian == 2 * 1000 * 64 * 2  # of the head, at the points of a pair
    assert low_rank < gaussian


def test_points_that_do_not_fit_take_more_forwards(small):
    setup = setup_of(small, method="mezo_svrg", section={"stream_memory_gb": 2.0**-30})
    assert step_forwards(setup) == (16, 2, 2)
    assert step_forwards(setup_of(small, method="mezo_svrg")) == (32, 4, 1)
    # parameters that stay gathered are gathered once
    once = traffic(setup_of(small)).gathered
    assert 1.99 * once < traffic(setup).gathered <= 2 * once


def test_the_anchor_is_where_the_configuration_says(small):
    parts = {
        storage: memory(setup_of(small, method="mezo_svrg", anchor=storage))["anchor point"]
        for storage in ("device", "cpu", "nvme", "terms")
    }
    assert parts["device"].device == parts["cpu"].host == parts["cpu"].pinned
    assert parts["device"].device == sum(p.owned_numel(0, 4) * 2 for p in small.parameters)
    assert parts["nvme"].nvme > 0
    assert not any(parts["terms"])


def test_offloaded_parameters_leave_the_device(small):
    for offload, place in (("cpu", "host"), ("nvme", "host")):  # shards below 1 MiB stay in memory
        weights = memory(setup_of(small, offload=offload))["weights"]
        assert getattr(weights, place) == sum(
            p.padded_numel(4) * 2 for p in small.parameters if p.numel > 640
        )


@pytest.mark.parametrize(
    ("text", "expected"), [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), ("1.5TB", 15 * 10**11)]
)
def test_sizes_are_parsed(text, expected):
    assert size(text) == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpu-memory", "80gb"], "found '80gb', expected a number with one of MB, GB"),
        (["--gpus", "0"], "found '0', expected a whole number, 1 or more"),
        (["--method", "adam"], "invalid choice: 'adam'"),
    ],
)
def test_wrong_options_are_refused(options, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--model", "7b", *options])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", 'no "model_type", which names the architecture'),
        ("[1", "Expecting ',' delimiter"),
        ('{"model_type": "unheard"}', "unheard"),
        ('{"model_type": "t5"}', "not a causal language model"),
    ],
)
def test_a_wrong_model_is_refused_in_one_line(content, said, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(content)
    assert main(["--model", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"zods.planning: error: --model {file}: ")
    assert said in error
    assert error.count("\n") == 1


def test_the_command_prints_a_table_and_the_same_figures_as_json(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_dict()))
    command = ["--model", str(tmp_path), "--gpus", "2", "--nodes", "2", "--gpu-memory", "1MB"]
    assert main(command) == 0
    assert "does not fit 0.001 GB of device memory" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["ranks"], planned["fits"]) == (4, False)
    assert planned["memory"]["total"]["device"] == sum(
        of_kind["device"] for kind, of_kind in planned["memory"].items() if kind != "total"
    )


@pytest.mark.launched
def test_the_tables_for_administrators_are_those_of_the_code():
    sizing = runpy.run_path(str(REPOSITORY / "launch" / "sizing.py"))
    page = (REPOSITORY / "launch" / "README.md").read_text()
    assert sizing["with_tables"](page, sizing["tables"]()) == page, "run python launch/sizing.py"
