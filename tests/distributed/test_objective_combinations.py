"""Objectives of generated texts and over candidates, together with other options.

A run with an option is compared with the same steps on one rank without it, one point at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

import zods
from tests.distributed.command_line import (
    MODEL,
    finetune_on_ranks,
    refusals_on_ranks,
    write_inputs,
)
from tests.distributed.generated_texts import (
    BATCH,
    ONE,
    SECTION,
    WORDS,
    collate,
    data_of,
    loss_of_texts,
    word_tokenizer,
)
from tests.distributed.models import configuration, numpy_of, sha256, whole
from tests.distributed.ranks import options_of, run_ranks
from tests.distributed.zoo import VOCABULARY, zoo_model
from tests.helpers import sampled
from tests.published import CASES, write_files
from zods.cli.run_folder import read_metrics
from zods.integrations.hf import ZOTrainer, ZOTrainingArguments

STEPS = 3
TEXTS = {**SECTION, **ONE}
SVRG = {"method": "mezo_svrg", "anchor_interval": 2, "anchor_directions": 2}
SELECT = {"candidates": 12, "num_directions": 4}
NVME = {"offload": "nvme"}


def places(point: str, gradient: str) -> dict[str, Any]:
    return {"anchor": {"point": point, "gradient": gradient}}


# name: (objective, model, keys that decide the steps, keys that must not change them)
CELLS: dict[str, tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]] = {
    "texts, selector": (TEXTS, "opt", {"selector": {**SELECT, "source_column": "source"}}, {}),
    "texts, selector, clusters": (
        TEXTS,
        "opt",
        {"selector": {**SELECT, "weights": "cluster", "features": "zo"}, "accumulation": 2},
        {},
    ),
    "texts, nvme offload": (TEXTS, "wide", {}, NVME),
    "texts, nvme offload, one by one": (TEXTS, "wide", {}, {**NVME, "evaluation": "sequential"}),
    "texts, svrg on cpu": (TEXTS, "opt", SVRG, places("cpu", "cpu")),
    "texts, svrg, nvme everywhere": (TEXTS, "wide", SVRG, {**NVME, **places("nvme", "terms")}),
    "texts, prefix": (TEXTS, "prefix", {}, {}),
    "texts, prompt tuning": (TEXTS, "prompt tuning", {}, {}),
    "texts, its own loss": (TEXTS, "own loss", {}, {}),
    "words, its own loss": (WORDS, "own loss", {}, {}),
    "words, selector": (WORDS, "opt", {"selector": SELECT}, {}),
}
DEFAULT = ("texts, selector",)
CELL_PARAMETERS = sampled(CELLS, DEFAULT)


class OwnLoss(nn.Module):
    """A model with a loss that is not the cross entropy of its logits, as of a router."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo_model("opt")
        self.config = self.inner.config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **more: Any
    ) -> Any:
        found = self.inner(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more
        )
        if labels is not None:
            found.loss = found.loss + found.logits.square().mean()
        return found


def wide_opt() -> nn.Module:
    """A model whose matrices go to NVMe: each of two ranks has more than 1 MiB of one."""
    torch.manual_seed(0)
    shape = {"hidden_size": 736, "word_embed_proj_dim": 736, "num_hidden_layers": 1}
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            num_attention_heads=4,
            max_position_embeddings=16,
            ffn_dim=8,
            **shape,
        )
    ).eval()


def virtual_tokens(kind: type) -> nn.Module:
    model = zoo_model("llama")
    torch.manual_seed(1)
    return peft.get_peft_model(model, kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))


def model_of(name: str) -> nn.Module:
    if name == "wide":
        return wide_opt()
    if name == "prefix":
        return virtual_tokens(peft.PrefixTuningConfig)
    if name == "prompt tuning":
        return virtual_tokens(peft.PromptTuningConfig)
    return OwnLoss().eval() if name == "own loss" else zoo_model(name)


def engine_of(folder: Path, name: str, **others: Any) -> Any:
    """The engine of a cell; `others` replace the keys that must not change its steps."""
    objective, model, keys, neutral = CELLS[name]
    folder.mkdir(parents=True, exist_ok=True)
    section = {**objective, **keys, **(others or neutral)}
    return zods.initialize(
        model=model_of(model),
        config=configuration(BATCH, nvme_path=folder, **section),
        training_data=data_of(objective["objective"]),
        collate_fn=collate,
        tokenizer=word_tokenizer(),
    )[0]


def steps_of(engine: Any, number: int = STEPS) -> dict[str, Any]:
    losses = [engine.train_batch() for _ in range(number)]
    found = {
        "losses": losses,
        "form": engine.evaluation,
        "ids": engine.selection and engine.selection.selected_ids,
        "bits": sha256(whole(engine)),
        "weights": numpy_of(whole(engine)),
    }
    engine.close()
    return found


def rank_of_cells(folder: Path, names: Sequence[str], alone: bool) -> dict[str, dict[str, Any]]:
    """The steps of each cell; alone: of the run that it is compared with."""
    found = {}
    for name in names:
        others = {"evaluation": "sequential", "accumulation": CELLS[name][3].get("accumulation", 1)}
        found[name] = steps_of(engine_of(folder / name, name, **(others if alone else {})))
    return found


def agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-6)
    assert found["ids"] == expected["ids"]
    for key, value in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][key], value, rtol=0, atol=1e-5)


Runs = Callable[[str], tuple[list[dict[str, Any]], dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Maps a cell to its runs: on two ranks, and the one that it is compared with."""
    folder, found = tmp_path_factory.mktemp("cells"), {}

    def of_cell(name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        if name not in found:
            names = DEFAULT if name in DEFAULT else (name,)  # the default ones share their ranks
            ranks = run_ranks(2, rank_of_cells, folder / "ranks", names, False)
            (alone,) = run_ranks(1, rank_of_cells, folder / "alone", names, True)
            found.update({cell: ([rank[cell] for rank in ranks], alone[cell]) for cell in names})
        return found[name]

    return of_cell


@pytest.mark.parametrize("name", CELL_PARAMETERS)
def test_an_option_makes_the_steps_of_one_rank_without_it(runs: Runs, name: str):
    ranks, alone = runs(name)
    assert ranks[0]["bits"] == ranks[1]["bits"]
    assert any(ranks[0]["losses"])
    for rank in ranks:
        agree(rank, alone)


def rank_of_selected(folder: Path) -> tuple[list[float], list[float]]:
    """The losses of steps that change nothing, and minus the mean scores of the chosen examples."""
    engine = engine_of(folder, "texts, selector", lr=0.0, eps=1e-6)
    data, losses, expected = data_of(""), [], []
    score = loss_of_texts(zoo_model("opt"), TEXTS["objective"])
    params = {name: p.detach() for name, p in zoo_model("opt").named_parameters()}
    for _ in range(2):
        losses.append(engine.train_batch())
        chosen = collate([data[i] for i in engine.selection.selected_ids])
        expected.append(score(params, chosen))
    engine.close()
    return losses, expected


@pytest.mark.slow
def test_the_loss_of_a_sub_batch_is_minus_the_mean_score_of_the_chosen(tmp_path: Path):
    for losses, expected in run_ranks(2, rank_of_selected, tmp_path):
        assert losses == pytest.approx(expected)


def rank_of_resumed(folder: Path, name: str, steps: int) -> dict[str, Any]:
    engine = engine_of(folder / "other files", name, evaluation="auto")
    engine.resume(folder)
    return steps_of(engine, steps)


@pytest.mark.slow  # three runs
def test_a_run_resumed_on_another_number_of_ranks_goes_on_with_the_same_losses(tmp_path: Path):
    name = "texts, svrg on cpu"
    (tmp_path / "run").mkdir()
    whole_run = run_ranks(2, rank_of_resumed, tmp_path / "whole", name, 4)
    run_ranks(2, rank_of_resumed, tmp_path / "run", name, 2)
    (found,) = run_ranks(1, rank_of_resumed, tmp_path / "run", name, 2)
    assert found["losses"] == pytest.approx(whole_run[0]["losses"][2:])


# --- transformers' Trainer ------------------------------------------------------------------------


def rank_of_trainer(folder: Path, objective: dict[str, Any]) -> list[Any]:
    """The losses and the weights of a trainer, which also evaluates, and of an engine alone."""
    config = {"zero_optimization": {"stage": 3}, "zeroth_order": objective}
    data = data_of(objective["objective"])
    args = ZOTrainingArguments(
        output_dir=str(folder),
        deepspeed=config,
        per_device_train_batch_size=BATCH // torch.distributed.get_world_size(),
        lr_scheduler_type="constant",
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,  # candidates and references are no arguments of the model
    )
    trainer = ZOTrainer(
        model=zoo_model("opt"),
        args=args,
        data_collator=collate,
        train_dataset=data,
        eval_dataset=data[:6],
        processing_class=word_tokenizer(),
    )
    trainer.evaluate()
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    trained = sha256(whole(trainer.deepspeed))
    trainer.deepspeed.close()
    engine = zods.initialize(
        model=zoo_model("opt"),
        config={**config, "train_batch_size": BATCH},
        training_data=data,
        collate_fn=collate,
        tokenizer=word_tokenizer(),
    )[0]
    alone = steps_of(engine)
    return [(losses, trained), ([float(np.float32(x)) for x in alone["losses"]], alone["bits"])]


@pytest.mark.slow  # a trainer and an engine
def test_the_trainer_makes_the_steps_of_an_engine(tmp_path: Path):
    for trainer, engine in run_ranks(2, rank_of_trainer, tmp_path, TEXTS):
        assert trainer == engine


# --- the command line -----------------------------------------------------------------------------


def command_line(folder: Path, task: str, section: dict[str, Any]) -> list[str]:
    """Options of three steps of a task with its own data, on texts that it generates."""
    write_files(folder / "data", CASES[task].files)
    config = {
        "train_batch_size": 2,
        "zero_optimization": {"stage": 3},
        "zeroth_order": section,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return options_of(
        deepspeed_config=folder / "config.json",
        model=MODEL,
        output_dir=folder / "run",
        task=task,
        data_dir=folder / "data",
        max_steps=STEPS,
        max_length=64,
    )


GENERATED = {"method": "mezo", "lr": 1e-4, "objective": "f1", "generate": {"max_new_tokens": 3}}


@pytest.mark.slow  # the task without a selector and without generation is in test_declared_tasks
def test_a_task_trains_on_generated_texts_of_selected_examples_with_references(tmp_path: Path):
    section = {**GENERATED, "selector": {"candidates": 2, "strategy": "random"}}
    finetune_on_ranks(2, command_line(tmp_path, "drop", section))
    records = list(read_metrics(tmp_path / "run"))
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3]
    evaluations = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in evaluations] == [0, 3]
    assert all("accuracy" in r for r in evaluations)


@pytest.mark.parametrize(
    ("section", "words", "message"),
    [
        (GENERATED, [], "the data of --task instruction have none"),
        (
            {"method": "mezo", "objective": "candidates"},
            ["--packing"],
            'objective: "candidates" is the cross entropy over label words',
        ),
    ],
)
def test_plain_texts_have_neither_prompts_nor_label_words(
    tmp_path: Path, section: dict[str, Any], words: list[str], message: str
):
    write_inputs(tmp_path, {"train_batch_size": 4, "zeroth_order": section})
    options = options_of(
        deepspeed_config=tmp_path / "config.json",
        model=MODEL,
        output_dir=tmp_path / "run",
        task="instruction",
        data_format="text",
        train_file=tmp_path / "train.jsonl",
        max_length=16,
    )
    (said,) = refusals_on_ranks(1, [*options, *words])
    assert message in said
