"""The command line on the quickstart's model: a whole run, its resumption, and mistakes.

One run goes through the real `deepspeed` launcher. The others are made on forked ranks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zods.finetune
from tests.distributed.command_line import (
    MODEL,
    finetune_on_ranks,
    labelled_rows,
    prompted_options,
    refusals_on_ranks,
    write_inputs,
    write_rows,
)
from tests.distributed.models import OF_THE_PAPER
from tests.distributed.ranks import launch, options_of, run_command
from zods.cli.arguments import parse_arguments
from zods.cli.run_folder import read_metrics
from zods.comm.process import RANKS, SIZES, TORCH
from zods.trajectory.log import read_log
from zods.trajectory.records import Refresh, Step
from zods.trajectory.replay import replay

CONFIG = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 3},
    "comms_logger": {"enabled": True, "prof_all": True, "verbose": False},
    "zeroth_order": {
        **OF_THE_PAPER,
        "lr": 1e-4,
        "anchor_interval": 2,
        "anchor": {"point": "terms", "gradient": "cpu"},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    write_inputs(folder, CONFIG)
    write_rows(folder / "wrong.jsonl", [*labelled_rows(), {"text": "x", "label": "neither"}])
    return folder


def finetune(options: list[str]) -> tuple[int, str]:
    """Run the command line through the launcher: (exit code, output of all ranks)."""
    return launch(Path(zods.finetune.__file__), *options)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    options = prompted_options(
        folder,
        folder / "run",
        max_steps=4,
        save_interval=2,
        eval_interval=2,
        save_model=True,
        plot=True,
        lr=2e-4,
    )
    code, output = finetune(options)
    assert code == 0, output[-4000:]
    assert "held-out accuracy" in output
    return folder / "run"


def test_a_run_folder_has_the_configuration_the_versions_metrics_curves_and_the_log(run):
    config = json.loads((run / "config.json").read_text())
    assert config["zeroth_order"]["lr"] == 2e-4, "the command line overrides the JSON"
    about = json.loads((run / "run.json").read_text())
    assert about["world_size"] == 2
    assert about["versions"]["deepspeed"]
    records = list(read_metrics(run))
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 2, 4]
    summary = records[-1]
    assert summary["evaluation"] in ("stacked", "sequential", "lockstep")
    assert summary["anchor_offloaded_bytes"] > 0
    assert summary["zods_bytes_per_step"] < 1024 < summary["zero3_bytes_per_step"]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    kinds = [type(record).__name__ for record in read_log(run / "trajectory.log").records]
    assert kinds == [
        "RunRecord",
        "Evaluation",
        "Refresh",
        "Step",
        "Step",
        "Refresh",
        "Step",
        "Step",
    ]


def test_log_and_metrics_take_less_than_300_bytes_per_step(run):
    files = ((run / "trajectory.log", b' {"step":'), (run / "metrics.jsonl", b'"kind": "train"'))
    lines = [
        line for path, mark in files for line in path.read_bytes().splitlines() if mark in line
    ]
    assert len(lines) == 8
    assert sum(len(line) + 1 for line in lines) < 4 * 300


def test_the_exported_model_loads_with_its_tokenizer(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(run / "model")
    trained = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    base = AutoModelForCausalLM.from_pretrained(MODEL).state_dict()
    assert trained.keys() == base.keys()
    assert all(not trained[name].equal(base[name]) for name in base)


def test_a_resumed_run_ends_where_the_undisturbed_one_did(folder, run):
    (run / "checkpoints" / "latest").write_text("global_step2")
    others = {"max_steps": 4, "lr": 2e-4, "resume": run / "checkpoints"}
    finetune_on_ranks(2, prompted_options(folder, folder / "resumed", **others))
    losses = {r["step"]: r["loss"] for r in read_metrics(run) if r["kind"] == "train"}
    resumed = {
        r["step"]: r["loss"] for r in read_metrics(folder / "resumed") if r["kind"] == "train"
    }
    assert resumed == {step: losses[step] for step in (3, 4)}


def test_a_finished_run_that_is_started_again_adds_no_second_final_evaluation(tmp_path):
    section = {"method": "mezo", "lr": 1e-4}
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 3}, "zeroth_order": section}
    write_inputs(tmp_path, config)
    options = prompted_options(tmp_path, tmp_path / "run", max_steps=2, resume="auto")
    for _ in range(2):
        finetune_on_ranks(1, options)
        lines = list(read_metrics(tmp_path / "run"))
        assert [r["step"] for r in lines if r["kind"] == "eval"] == [0, 2]
        assert [r["step"] for r in lines if r["kind"] == "train"] == [1, 2]


def test_a_run_that_ended_between_its_first_refresh_and_step_keeps_its_first_evaluation(
    folder, run
):
    whole = read_log(run / "trajectory.log")
    refresh = next(k for k, record in enumerate(whole.records) if isinstance(record, Refresh))
    cut = folder / "cut"
    cut.mkdir()
    log = (run / "trajectory.log").read_bytes()
    (cut / "trajectory.log").write_bytes(log[: whole.ends[refresh + 1]])
    first = next(line for line in (run / "metrics.jsonl").open() if '"eval"' in line)
    (cut / "metrics.jsonl").write_text(first)
    others = {"max_steps": 4, "eval_interval": 2, "lr": 2e-4, "resume": "auto"}
    finetune_on_ranks(2, prompted_options(folder, cut, **others))
    ours, theirs = (
        [(r["kind"], r["step"], r["loss"]) for r in read_metrics(of) if r["kind"] != "summary"]
        for of in (cut, run)
    )
    assert ours == theirs


SELECT = {"select": "4/8", "source_column": "label", "max_steps": 4, "lr": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2}], ids=["whole", "lora"])
def test_first_order_training_with_selection_resumes_where_it_was(folder, lora, tmp_path):
    first_order = {"optimizer": "adamw", **SELECT, **lora}
    saved = {"save_interval": 2, "save_model": True}
    code, output = finetune(prompted_options(folder, tmp_path / "whole", **first_order, **saved))
    assert code == 0, output[-4000:]
    configured, *logged = read_log(tmp_path / "whole" / "trajectory.log").records
    assert configured.optimizer["params"]["lr"] == 1e-3
    assert "anchor" not in output, "no row of a method that was not used"
    assert all(
        len(set(record.sub_batch.indices)) == 4 and record.coefficients is None for record in logged
    )
    assert (tmp_path / "whole" / "model").is_dir()
    records = [r for r in read_metrics(tmp_path / "whole") if r["kind"] == "train"]
    assert len({record["loss"] for record in records}) == 4
    assert all(record["selection_seconds"] > 0 for record in records)
    (tmp_path / "whole" / "checkpoints" / "latest").write_text("")  # as a crash may leave it
    resume = {"resume": tmp_path / "whole" / "checkpoints"}
    finetune_on_ranks(2, prompted_options(folder, tmp_path / "resumed", **first_order, **resume))
    assert list(read_log(tmp_path / "resumed" / "trajectory.log").records[1:]) == logged


def test_zeroth_order_steps_log_what_was_selected(folder, tmp_path):
    options = {**SELECT, "strategy": "structured_random"}
    finetune_on_ranks(2, prompted_options(folder, tmp_path / "run", **options))
    steps = [
        r for r in read_log(tmp_path / "run" / "trajectory.log").records if isinstance(r, Step)
    ]
    assert [len(set(record.sub_batch.indices)) for record in steps] == [4] * 4


def test_examples_of_a_target_file_choose_and_belong_to_the_run(folder, tmp_path):
    write_rows(tmp_path / "target.jsonl", labelled_rows()[:3])
    write_rows(tmp_path / "other.jsonl", labelled_rows()[3:6])
    by_target = {**SELECT, "strategy": "target", "target_file": tmp_path / "target.jsonl"}
    finetune_on_ranks(2, prompted_options(folder, tmp_path / "run", **by_target))
    log = read_log(tmp_path / "run" / "trajectory.log")
    steps = [record for record in log.records if isinstance(record, Step)]
    assert [len(set(record.sub_batch.indices)) for record in steps] == [4] * 4
    changed = {**by_target, "target_file": tmp_path / "other.jsonl", "max_steps": 5}
    options = prompted_options(folder, tmp_path / "run", **changed, resume="auto")
    first, second = refusals_on_ranks(2, options)
    assert first == second
    assert "it is of other training data (or other target data)" in first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**SELECT, "strategy": "target"}, "Give target_data to zods.initialize"),
        (
            {**SELECT, "strategy": "target", "target_file": "{folder}/wrong.jsonl"},
            "wrong.jsonl, line",
        ),
        ({"select": "4/8", "source_column": "origin"}, "no column 'origin'"),
        ({"validation_file": "{folder}/wrong.jsonl"}, "neither"),
        ({"model": "{folder}/nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_the_same_error_on_all_ranks_and_leaves_no_folder(
    folder, tmp_path, options, message
):
    """The launcher's exit code for bad input is tested in test_failed_start.py."""
    given = {name: str(value).format(folder=folder) for name, value in options.items()}
    first, second = refusals_on_ranks(2, prompted_options(folder, tmp_path / "bad", **given))
    assert first == second
    assert message in first
    assert not (tmp_path / "bad").exists()


def test_options_in_a_file_run_without_a_launcher_on_one_rank_with_a_summary_of_what_was_used(
    folder, tmp_path
):
    config = tmp_path / "mezo.json"
    schedule = {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": 1},
    }
    section = {"method": "mezo", "lr": 1e-4}
    config.write_text(
        json.dumps({"train_batch_size": 4, "scheduler": schedule, "zeroth_order": section})
    )
    run = {
        "deepspeed": str(config),
        "model": str(MODEL),
        "train_file": str(folder / "train.jsonl"),
        "num_epochs": 1,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))  # JSON is valid YAML
    command = [
        sys.executable,
        "-m",
        "zods.finetune",
        str(tmp_path / "run.yaml"),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    # 16 of 24 examples are held out, so that an epoch has two steps.
    command += [
        "--held_out",
        "16",
        "--num_epochs",
        "2",
    ]
    launcher = [name for name in os.environ if name in (*TORCH, *SIZES, *RANKS)]
    code, output = run_command(
        ["env", *(f"--unset={name}" for name in launcher), *command], tmp_path
    )
    assert code == 0, output[-4000:]
    summary = list(read_metrics(tmp_path / "run"))[-1]
    assert not [key for key in summary if key.startswith("anchor")], "the method has no anchor"
    assert "anchor" not in output.partition("held-out")[2]
    assert re.search(rf"^evaluation +{summary['evaluation']}$", output, re.MULTILINE)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["scheduler"]["params"] == {
        "total_num_steps": 4,
        "warmup_num_steps": 1,
        "warmup_max_lr": 1e-4,
    }
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    assert (recorded["model"], recorded["held_out"], recorded["num_epochs"]) == (
        str(MODEL),
        "16",
        2,
    )


def test_a_head_for_another_number_of_classes_is_replaced_and_replayed(folder, tmp_path):
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=3)
    model.save_pretrained(tmp_path / "three")
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "three")
    messages, _ = classify(folder, tmp_path / "run", tmp_path / "three")
    assert any("is for 3 classes, the data have 2: a new head is drawn" in m for m in messages)
    exported = exported_tensors(tmp_path / "run" / "model")
    assert exported["score.weight"].shape == (2, 32)
    log = str(tmp_path / "run" / "trajectory.log")
    replay(str(tmp_path / "three"), log, tmp_path / "replayed")
    assert all(
        exported[name].equal(tensor)
        for name, tensor in exported_tensors(tmp_path / "replayed").items()
    )


def test_an_exported_adapter_is_trained_on_and_replayed_from_its_base(folder, tmp_path):
    import peft
    import transformers

    base = transformers.AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
    base.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["score"], init_lora_weights=False
    )
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    described["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(described))
    # The adapter uses the tokenizer of its base.
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "base")
    classify(folder, tmp_path / "run", tmp_path / "adapter")
    before, after = (
        exported_tensors(path) for path in (tmp_path / "adapter", tmp_path / "run" / "model")
    )
    assert before.keys() == after.keys()
    # the adapter is two small steps away from the given one, so it was not drawn anew
    for name in before:
        assert 0 < (before[name] - after[name]).abs().max() < 0.01
    replay(str(tmp_path / "base"), str(tmp_path / "run" / "trajectory.log"), tmp_path / "replayed")
    assert all(
        after[name].equal(tensor)
        for name, tensor in exported_tensors(tmp_path / "replayed").items()
    )
    with pytest.raises(ValueError, match=r"an adapter; give its base model"):
        replay(
            str(tmp_path / "adapter"), str(tmp_path / "run" / "trajectory.log"), tmp_path / "again"
        )


def test_a_model_that_sees_later_tokens_is_refused_by_all_ranks(folder, tmp_path):
    import transformers

    config = transformers.XLNetConfig(vocab_size=2048, d_model=32, n_layer=1, n_head=2, d_inner=32)
    transformers.XLNetLMHeadModel(config).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "model")
    options = prompted_options(folder, tmp_path / "run", model=tmp_path / "model")
    first, second = refusals_on_ranks(2, options)
    assert first == second
    assert "not a causal language model" in first
    assert not (tmp_path / "run" / "trajectory.log").exists()


def classify(folder: Path, output: Path, model: Path) -> list[list[str]]:
    """Make two steps of a classifier on two ranks: the messages of each rank."""
    options = options_of(
        deepspeed_config=folder / "config.json",
        model=model,
        output_dir=output,
        train_file=folder / "train.jsonl",
        max_steps=2,
        max_length=48,
        method="mezo",
        save_model=True,
    )
    return finetune_on_ranks(2, options)


def exported_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's only file of weights."""
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--select", "8/4"), "expected K/N with 0 < K <= N"),
        (("--select", "0/4"), "expected K/N with 0 < K <= N"),
        (("--select", "4/8", "--train_batch_size", "4"), "sets train_batch_size to K"),
        (("--optimizer", "adamw", "--eps", "1e-3"), "--eps belongs to zeroth-order steps"),
        (("--lora_rank", "0"), "--lora_rank: found 0"),
        (("--lora_target_modules", "q_proj"), "--lora_target_modules belongs to --lora_rank"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, capsys):
    needed = ("--deepspeed_config", "c", "--model", "m", "--output_dir", "o", "--train_file", "t")
    with pytest.raises(SystemExit) as caught:
        parse_arguments([*needed, *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_reads_without_a_launcher():
    ended = subprocess.run(
        [sys.executable, "-m", "zods.finetune", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for option in (
        "--deepspeed_config",
        "--train_file",
        "--select",
        "--optimizer",
        "--method",
        "--anchor_interval",
    ):
        assert option in ended.stdout
