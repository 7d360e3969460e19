"""The planner on configurations alone: parameters, memory by form and place, its command line."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, OPTConfig

from zods.config.deepspeed_json import read_config
from zods.plan import main, size
from zods.planning.activations import forward_peak
from zods.planning.first_order import first_order, training_peak
from zods.planning.memory import copies_of_modules, memory, step_forwards, total
from zods.planning.model_shape import ModelShape, model_shape, read_model_config
from zods.planning.proposal import Cluster, configuration
from zods.planning.rates import rates_of_gpu
from zods.planning.report import GB
from zods.planning.setup import Setup, read_setup
from zods.planning.step_time import Replicas, refresh_time, replica_time, step_time
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
    two, eight = (forward_peak(small, rows, 32) for rows in (2, 8))
    assert eight.logits == 4 * two.logits == 8 * 32 * 1000 * 2
    assert 3.9 < eight.bytes / two.bytes <= 4
    assert eight.flops == 4 * two.flops


def test_operations_are_two_for_each_weight_and_token_and_those_of_attention(small):
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 176) + 64 * 1000
    attention = 2 * 2 * 64 * 32  # scores and their product with the values, in each of two blocks
    assert forward_peak(small, 3, 32).flops == 3 * 32 * 2 * (matrices + attention)


def test_bytes_held_while_modules_run_count_at_the_time_of_the_activations(small):
    alone = forward_peak(small, 4, 32).bytes
    held = [0] * len(small.modules)
    held[0] = 10**5  # of the embedding, which runs first
    assert forward_peak(small, 4, 32, held=tuple(held)).bytes == alone
    held[-1] = 10**9  # of the head
    assert 10**9 < forward_peak(small, 4, 32, held=tuple(held)).bytes < 10**9 + alone


def test_modules_that_run_inside_one_another_hold_their_bytes_at_once():
    shape = {"hidden_size": 16, "ffn_dim": 32, "vocab_size": 50}
    config = OPTConfig(**shape, num_hidden_layers=1, num_attention_heads=2)
    model = model_shape("opt", config, torch.float32)
    outer = model.module.model.decoder.layers[0]
    inner = (outer.fc1, outer.fc2)
    of_outer = model.modules[0][1]  # as if the block owned parameters, too
    nested = replace(model, modules=((outer, of_outer), *((m, of_outer) for m in inner)))
    alone = forward_peak(nested, 2, 8).bytes
    both = forward_peak(nested, 2, 8, held=(10**9, 10**8, 10**8)).bytes
    assert 11 * 10**8 < both < 11 * 10**8 + alone, "fc1 and fc2 run one after the other"


def test_low_rank_directions_need_no_copies_of_matrices(small):
    low_rank, gaussian = (
        copies_of_modules(setup, step_forwards(setup))
        for setup in (
            setup_of(small, section={"direction": name}) for name in ("low_rank", "gaussian")
        )
    )
    assert max(gaussian) == 2 * 1000 * 64 * 2  # of the head, at the points of a pair
    assert max(low_rank) < max(gaussian)


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
        (["--link", "0.5"], "found '0.5', expected a byte or more"),
        (["--link", "fast"], "found 'fast', expected a number with one of MB, GB"),
        (["--dropout", "2"], "found '2', expected a number, 0 to 1"),
        (["--tokens", "many"], "found 'many', expected a number, 1 or more"),
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
    assert error.startswith(f"zods.plan: error: --model {file}: ")
    assert said in error
    assert error.count("\n") == 1


@pytest.fixture
def small_model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_dict()))
    return str(tmp_path)


def planned_by(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main([*options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_prints_a_table_and_the_same_figures_as_json(small_model, capsys):
    command = ["--model", small_model, "--gpus", "2", "--nodes", "2", "--tokens", "1e6"]
    planned = planned_by(capsys, *command)
    assert planned["ranks"] == 4
    assert planned["memory"]["total"]["device"] == sum(
        of_kind["device"] for kind, of_kind in planned["memory"].items() if kind != "total"
    )
    assert planned["steps"] == -(-(10**6) // (4 * 8 * 512))
    assert planned["seconds"] == planned["steps"] * planned["step_seconds"]["total"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert f"{planned['steps']:,} steps of 16,384 tokens" in table
    assert f"{planned['bound']} bound a step" in table
    assert json.loads(table[table.index("\n{") :]) == planned["config"]


# (options, how the proposal stores the parameters, micro-batch) by what is planned
CLUSTERS: dict[str, tuple[str, str | None, int]] = {
    "one consumer's GPU": ("--model 7b --gpus 1 --gpu-memory 24GB", None, 8),
    "a GPU smaller than the model": (
        "--model 7b --gpus 1 --gpu-memory 8GB --host-memory 64GB",
        "cpu",
        8,
    ),
    "less host memory than the model": (
        "--model 13b --gpus 1 --gpu-memory 8GB --host-memory 16GB --nvme 1TB",
        "nvme",
        8,
    ),
    "a node": ("--model 70b --gpus 8 --gpu A100 --method mezo_svrg --host-memory 1TB", None, 8),
    "a node of little memory": (
        "--model 70b --gpus 8 --gpu-memory 20GB --method mezo_svrg --host-memory 64GB --nvme 8TB",
        None,
        4,
    ),
    "64 nodes": ("--model 70b --gpus 8 --nodes 64 --gpu H100 --batch 32", None, 32),
}


@pytest.mark.parametrize(("options", "offload", "micro_batch"), CLUSTERS.values(), ids=[*CLUSTERS])
def test_a_proposal_is_a_valid_configuration_that_fits(options, offload, micro_batch, capsys):
    planned = planned_by(capsys, *options.split())
    config = read_config(planned["config"], planned["ranks"])
    assert planned["fits"]
    assert config.deepspeed["train_micro_batch_size_per_gpu"] == micro_batch
    offloaded = config.deepspeed["zero_optimization"].get("offload_param")
    assert (offloaded and offloaded["device"]) == offload


def test_a_cluster_that_is_too_small_is_told_the_smallest_change(capsys):
    assert main(["--model", "7b", "--gpus", "1", "--gpu-memory", "8GB", "--offload", "none"]) == 2
    error = capsys.readouterr().err
    assert "no configuration of 1 nodes of 1 GPUs fits" in error
    needed = re.search(r"--gpu-memory (\d+)GB instead of 8GB", error)
    assert needed is not None
    enough = f"--model 7b --gpus 1 --gpu-memory {needed[1]}GB --offload none"
    assert planned_by(capsys, *enough.split())["fits"]


RATES = rates_of_gpu("A100", bf16=True)


def time_of(model: ModelShape, **how: Any) -> dict[str, float]:
    ranks, per_node = how.pop("ranks", 4), how.pop("per_node", 4)
    return step_time(setup_of(model, ranks, **how), how.get("rates", RATES), per_node).phases


def test_time_of_gathers_follows_the_slower_of_the_links(small):
    moved = traffic(setup_of(small)).gathered
    latency = len(small.modules) * RATES.latency
    assert time_of(small)["gathers"] == pytest.approx(moved / RATES.node_link + latency)
    assert time_of(small, per_node=2)["gathers"] == pytest.approx(moved / RATES.link + latency)
    assert time_of(small, ranks=1)["gathers"] == 0


def test_a_step_takes_its_longest_part_where_parts_overlap_and_their_sum_elsewhere(small):
    setup = setup_of(small, offload="cpu")
    overlapping = step_time(setup, RATES, 2)
    in_turn = step_time(setup, replace(RATES, overlaps=False), 2)
    assert overlapping.phases == in_turn.phases
    assert in_turn.total == pytest.approx(sum(in_turn.phases.values()))
    rest = sum(overlapping.phases[name] for name in ("update", "scalars"))
    assert overlapping.total == pytest.approx(overlapping.phases[overlapping.bound] + rest)
    assert overlapping.bound == "gathers"


def test_a_refresh_is_forwards_of_two_points_each_with_its_gathers(small):
    setup = setup_of(small, method="mezo_svrg", section={"anchor_interval": 50})
    phases = step_time(setup, RATES, 4).phases
    # 32 examples a forward of four ranks, of which one has 8
    one = max(forward_peak(small, 16, 32).flops / RATES.flops, phases["gathers"])
    assert refresh_time(setup, RATES, phases, 1000) == pytest.approx(32 * one / 50)
    assert "refresh" in step_time(setup, RATES, 4, examples=1000).phases


def test_an_anchor_kept_as_terms_takes_longer_forwards(small):
    stored, terms = (
        time_of(small, method="mezo_svrg", anchor=place)["forwards"] for place in ("cpu", "terms")
    )
    assert terms > stored


def test_replicas_divide_the_batch(small, small_model, capsys):
    command = ["--model", small_model, "--gpus", "2", "--batch", "2"]
    alone = planned_by(capsys, *command)
    four = planned_by(capsys, *command, "--replicas", "4")
    assert four["tokens_per_step"] == 4 * alone["tokens_per_step"]
    # a lone replica takes the whole batch
    assert four["micro_batch"] == 4 * alone["micro_batch"]
    setup, alone_setup = setup_of(small), setup_of(small)
    shared = step_time(setup, RATES, 4, replicas=Replicas(4, 0.0, 1e9)).phases["forwards"]
    assert shared == pytest.approx(step_time(alone_setup, RATES, 4).phases["forwards"] / 4)


def test_micro_batches_take_as_many_passes_of_first_order_training(small):
    one = first_order(setup_of(small), RATES, 4)["AdamW"].time.phases
    four = first_order(setup_of(small, accumulation=4), RATES, 4)["AdamW"].time.phases
    assert four["forwards"] == pytest.approx(4 * one["forwards"])
    assert four["gathers"] == pytest.approx(4 * one["gathers"])


def test_the_folder_of_the_drives_is_that_of_the_option(small_model, capsys):
    command = ["--model", small_model, "--gpus", "1", "--offload", "nvme", "--nvme-path", "/data"]
    config = planned_by(capsys, *command)["config"]
    assert config["zero_optimization"]["offload_param"]["nvme_path"] == "/data"


def test_weights_of_ranks_on_cpus_count_as_host_memory(small):
    setup = replace(setup_of(small), on_gpu=False)
    needed = total(list(memory(setup).values()))
    exact = Cluster(gpus=4, nodes=1, host_memory=4 * (needed.host + needed.device))
    assert not exact.shortages(setup)
    assert replace(exact, host_memory=exact.host_memory - 1).shortages(setup)


def test_replicas_wait_for_two_delays_and_the_leaders_messages(small):
    setup = setup_of(small)
    near, far = (Replicas(3, delay, 1e6) for delay in (0.0, 0.1))
    assert replica_time(setup, far) == pytest.approx(replica_time(setup, near) + 0.2)
    assert replica_time(setup, Replicas(5, 0.0, 1e6)) == 2 * replica_time(setup, near)
    assert replica_time(setup, Replicas(1, 0.1, 1e6)) == 0


def test_first_order_training_holds_states_and_activations(small):
    setup = setup_of(small)
    others = first_order(setup, RATES, 4)
    adamw, lora = others["AdamW"], others["LoRA + AdamW"]
    states = (16 - 2) * -(-small.numel // 4)
    assert adamw.device_bytes - lora.device_bytes == states
    # every block keeps its activations for the backward pass
    alone = forward_peak(small, 8, 32).bytes
    assert training_peak(small, 8, 32) > 2 * alone
    assert adamw.time.phases["forwards"] == pytest.approx(1.5 * lora.time.phases["forwards"])


def test_planning_for_ten_thousand_nodes_plots_a_step_time_for_each(small_model, tmp_path):
    assert main(["--model", small_model, "--plot", str(tmp_path / "nodes.png")]) == 0
    assert (tmp_path / "nodes.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.launched
def test_a_row_of_the_tables_for_administrators_is_that_of_the_code():
    sizing = runpy.run_path(str(REPOSITORY / "launch" / "sizing.py"))
    shape = model_shape("7B", read_model_config("7b"), torch.bfloat16)
    mezo = sizing["planned"](shape, sizing["GPUS"], 1, 80 * GB)
    page = (REPOSITORY / "launch" / "README.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith("| 7B | 1 |"))
    kinds = ("weights", "gathered and copies", "activations")
    sizes = [sizing["_gb"](mezo["memory"][kind]["device"]) for kind in kinds]
    assert row.split(" | ")[2:6] == [*sizes, sizing["_total"](mezo)]


@pytest.mark.slow
def test_the_tables_for_administrators_are_those_of_the_code():
    sizing = runpy.run_path(str(REPOSITORY / "launch" / "sizing.py"))
    page = (REPOSITORY / "launch" / "README.md").read_text()
    assert sizing["with_tables"](page, sizing["tables"]()) == page, "run python launch/sizing.py"
