"""A restart with another model's configuration is refused; what else it changes is said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import zods
from tests.distributed.command_line import MODEL, finetune_on_ranks, prompted_options, write_inputs
from tests.distributed.models import configuration, opt_data, tiny_data, tiny_of_file, tiny_opt
from tests.distributed.ranks import run_ranks
from tests.helpers import LogTexts
from zods.training import recorder
from zods.training.resume import LOG_NAME
from zods.trajectory.log import read_log
from zods.trajectory.records import RunRecord

GIVEN = {"method": "mezo", "eps": 1e-2, "lr": 1e-3}
STEPS = 2


def with_adapter(alpha: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_opt(), config)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.constant_(parameter, 0.01)
    return model


def with_config(**changed: Any) -> torch.nn.Module:
    model = tiny_opt()
    for name, value in changed.items():
        setattr(model.config, name, value)
    return model


def logged(folder: Path, model: torch.nn.Module, data: Any = None, **changed: Any) -> None:
    """Resume, and train STEPS steps more."""
    config = configuration(4, **{**GIVEN, **changed})
    engine = zods.initialize(model=model, config=config, training_data=data or opt_data())[0]
    try:
        engine.resume(folder)
        for _ in range(STEPS):
            engine.train_batch()
    finally:
        engine.close()


# --- the model's configuration --------------------------------------------------------------------

# how the first run makes its model, how the second does, and what the error names
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "activation": (
        tiny_opt,
        lambda: with_config(activation_function="gelu"),
        'activation_function is "relu" in the log, "gelu" here',
    ),
    "normalisation": (
        tiny_opt,
        lambda: with_config(do_layer_norm_before=False),
        "do_layer_norm_before is true in the log, false here",
    ),
    "adapter": (
        lambda: with_adapter(4),
        lambda: with_adapter(8),
        "adapter default: lora_alpha is 4 in the log, 8 here",
    ),
}


def rank_of_other_models(folder: Path) -> dict[str, str]:
    found = {}
    for name, (first, second, _) in MODELS.items():
        logged(folder / name, first())
        before = (folder / name / LOG_NAME).read_bytes()
        with pytest.raises(ValueError, match=LOG_NAME) as error:
            logged(folder / name, second())
        found[name] = str(error.value)
        assert (folder / name / LOG_NAME).read_bytes() == before
        logged(folder / name, first())
    return found


def test_a_model_with_another_configuration_is_refused(tmp_path):
    (found,) = run_ranks(1, rank_of_other_models, tmp_path)
    for name, (_, _, text) in MODELS.items():
        assert text in found[name]


# --- settings that a restart may change -----------------------------------------------------------

CHANGED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, []),
    "step size and seed": (
        {"lr": 2e-3, "seed": 7},
        ["zeroth_order.lr: 0.001 -> 0.002; zeroth_order.seed: 42 -> 7"],
    ),
    "eps and decay": (
        {"eps": 2e-2, "weight_decay": 0.1},
        ["zeroth_order.eps: 0.01 -> 0.02; zeroth_order.weight_decay: 0.0 -> 0.1"],
    ),
    "schedule": (
        {
            "top": {
                "scheduler": {
                    "type": "WarmupLR",
                    "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 5},
                }
            }
        },
        ["scheduler"],
    ),
}


def rank_of_changed_settings(folder: Path) -> dict[str, list[str]]:
    found = {}
    for name, (changed, _) in CHANGED.items():
        logged(folder / name, tiny_opt())
        texts = LogTexts("zods.training.log_checks")
        logged(folder / name, tiny_opt(), **changed)
        found[name] = list(texts.texts)
    return found


def test_the_settings_that_a_restart_changes_are_said_in_one_line(tmp_path):
    (found,) = run_ranks(1, rank_of_changed_settings, tmp_path)
    for name, (_, texts) in CHANGED.items():
        assert len(found[name]) == len(texts), found[name]
        for said, text in zip(found[name], texts, strict=True):
            assert text in said
            assert LOG_NAME in said


def rank_of_changed_code(folder: Path) -> tuple[list[str], list[Any]]:
    logged(folder, tiny_opt())
    texts = LogTexts("zods.training.log_checks")
    used = recorder.code_in_use()
    other = {**used, "torch": "9.0", "lock": "other packages"}
    recorder.code_in_use = lambda: other  # type: ignore[assignment]
    logged(folder, tiny_opt())
    records = [r for r in read_log(folder / LOG_NAME).records if isinstance(r, RunRecord)]
    return texts.texts, [(r.step, r.code and r.code["torch"]) for r in records]


def rank_in_another_image(folder: Path) -> list[str]:
    texts = LogTexts("zods.training.log_checks")
    for image in (None, None, "zods-cpu:1", "zods-cpu:2", None):
        os.environ.pop("ZODS_IMAGE", None)
        if image is not None:
            os.environ["ZODS_IMAGE"] = image
        recorder.code_in_use.cache_clear()
        logged(folder, tiny_opt())
    return texts.texts


def test_a_restart_in_another_image_or_without_it_is_said_in_one_line(tmp_path):
    (texts,) = run_ranks(1, rank_in_another_image, tmp_path)
    assert [text.partition("code.image: ")[2] for text in texts] == [
        'null -> "zods-cpu:1"',
        '"zods-cpu:1" -> "zods-cpu:2"',
        '"zods-cpu:2" -> null',
    ]


def rank_of_a_changed_model_file(folder: Path) -> list[str]:
    """The second start's model is of a file with one more comment, the third's of that file again."""
    texts = LogTexts("zods.training.log_checks")
    for comment in ("", "# changed", "# changed"):
        logged(folder, tiny_of_file(folder / "my_model.py", comment), data=tiny_data())
    return texts.texts


def test_a_restart_with_a_changed_file_of_the_model_is_said_once(tmp_path):
    ((text,),) = run_ranks(1, rank_of_a_changed_model_file, tmp_path)
    assert "code.model: " in text
    assert text.count("->") == 1


def rank_of_adapters(folder: Path) -> dict[str, str]:
    logged(folder, with_adapter(4))
    record = read_log(folder / LOG_NAME).run_at_end()
    assert record is not None
    assert record.code is not None
    return record.code


def test_the_code_of_a_run_with_adapters_has_the_version_of_peft(tmp_path):
    (code,) = run_ranks(1, rank_of_adapters, tmp_path)
    assert code["peft"] == peft.__version__
    assert "model" not in code, "its classes are of transformers and peft"


def test_a_restart_with_another_tokenizer_is_said(tmp_path):
    section = {"method": "mezo", "lr": 1e-4}
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 3}, "zeroth_order": section}
    write_inputs(tmp_path, config)
    shutil.copytree(MODEL, tmp_path / "tokenizer")
    options = prompted_options(
        tmp_path, tmp_path / "run", tokenizer=tmp_path / "tokenizer", resume="auto", max_steps=1
    )
    (first,) = finetune_on_ranks(1, options)
    rules = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = rules["model"]["vocab"]
    one, other = (token for token in vocabulary if token in ("\u00e9", "\u00f6"))  # not in the data
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(rules))
    (second,) = finetune_on_ranks(1, options)
    assert not [text for text in first if "code.tokenizer" in text]
    assert len([text for text in second if "code.tokenizer" in text]) == 1


def test_a_restart_with_other_code_is_said_and_recorded(tmp_path):
    ((texts, codes),) = run_ranks(1, rank_of_changed_code, tmp_path)
    (text,) = texts
    assert f'code.torch: "{torch.__version__}" -> "9.0"' in text
    assert '-> "other packages"' in text
    assert codes == [(0, torch.__version__), (STEPS, "9.0")]
