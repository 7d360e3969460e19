"""Adapters of every kind of PEFT: sharded, trained, saved as a folder of PEFT, from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import zods
from tests.distributed.command_line import (
    MODEL,
    finetune_on_ranks,
    prompted_options,
    refusals_on_ranks,
    write_inputs,
)
from tests.distributed.models import configuration, opt_data
from tests.distributed.ranks import options_of, run_ranks
from tests.distributed.zoo import VOCABULARY, zoo_model
from tests.helpers import asked_for, sampled
from zods.cli.run_folder import read_metrics

peft = pytest.importorskip("peft")

CAUSAL = {"task_type": "CAUSAL_LM"}
VIRTUAL = {"num_virtual_tokens": 3, **CAUSAL}
KINDS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(r=2, **CAUSAL),
    "DoRA": peft.LoraConfig(r=2, use_dora=True, **CAUSAL),
    "LoRA, embeddings saved": peft.LoraConfig(r=2, modules_to_save=["embed_tokens"], **CAUSAL),
    "IA3": peft.IA3Config(**CAUSAL),
    "prefix tuning": peft.PrefixTuningConfig(**VIRTUAL),
    "prefix tuning with a projection": peft.PrefixTuningConfig(prefix_projection=True, **VIRTUAL),
    "prompt tuning": peft.PromptTuningConfig(**VIRTUAL),
    "p-tuning": peft.PromptEncoderConfig(encoder_hidden_size=8, **VIRTUAL),
    "layer norms": peft.LNTuningConfig(**CAUSAL),
    "VeRA": peft.VeraConfig(r=2, **CAUSAL),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, **CAUSAL),
    "LoHa": peft.LoHaConfig(r=2, **CAUSAL),
    "LoKr": peft.LoKrConfig(r=2, **CAUSAL),
    "tokens": peft.TrainableTokensConfig(token_indices=[1, 2], **CAUSAL),
}
DEFAULT = ("LoRA", "DoRA", "LoRA, embeddings saved", "prefix tuning", "IA3")  # the others are slow
STEPS = 3


def data_of() -> list[dict[str, torch.Tensor]]:
    rows = []
    for row in opt_data(16):
        ids = row["input_ids"] % 30
        rows.append({**row, "input_ids": ids, "labels": ids})
    return rows


def rank_of_kinds(stage: int, folder: Path, names: list[str]) -> dict[str, Any]:
    """Train each kind of adapter, save it, and load it by peft into the base model."""
    found = {}
    data = data_of()
    batch = {key: torch.stack([row[key] for row in data[:2]]) for key in data[0]}
    for name in names:
        torch.manual_seed(0)  # of the adapter's first values
        model = peft.get_peft_model(zoo_model("llama"), KINDS[name])
        section = {"direction": "low_rank", "examples_per_direction": 1, "normalize": True}
        config = configuration(4, stage=stage, method="mezo", **{**section, "lr": 1e-2})
        engine = zods.initialize(model=model, config=config, training_data=data)[0]
        names = {shard.name for shard in engine.sharded_parameters}
        losses = [engine.train_batch() for _ in range(STEPS)]
        engine.save_pretrained(folder / name)
        engine.eval()
        logits = engine(batch).logits.float()
        loaded = peft.PeftModel.from_pretrained(zoo_model("llama"), folder / name).eval()
        with torch.no_grad():
            again = loaded(**batch).logits
        found[name] = {
            "losses": losses,
            "only adapters": names == {n for n, p in model.named_parameters() if p.requires_grad},
            "loaded": float((logits - again).abs().max()),
            "files": sorted(path.name for path in (folder / name).iterdir()),
        }
        engine.close()
    return found


@pytest.fixture(scope="module")
def kinds(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results in one process and, sharded, on two ranks, by kind."""
    names, folder = asked_for(request, "name", KINDS, DEFAULT), tmp_path_factory.mktemp("kinds")
    (whole,) = run_ranks(1, rank_of_kinds, 0, folder / "whole", names)
    return whole, run_ranks(2, rank_of_kinds, 3, folder / "sharded", names)[0]


@pytest.mark.parametrize("name", sampled(KINDS, DEFAULT))
def test_every_kind_of_adapter_is_sharded_trained_and_saved_as_peft_saves_it(kinds, name):
    whole, sharded = (found[name] for found in kinds)
    assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert len(set(whole["losses"])) == STEPS, "the adapter is trained"
    for found in (whole, sharded):
        assert found["only adapters"]
        assert found["loaded"] < 1e-5
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(found["files"])


def run_with(tmp_path: Path, config: dict[str, Any], ranks: int = 2) -> Path:
    """A run of the command line with a file of peft."""
    write_inputs(
        tmp_path,
        {"train_batch_size": 4, "zero_optimization": {"stage": 3}, "zeroth_order": {"lr": 1e-3}},
    )
    (tmp_path / "peft.json").write_text(json.dumps(config))
    options = {"peft_config": tmp_path / "peft.json", "max_steps": 2, "save_model": True}
    finetune_on_ranks(ranks, prompted_options(tmp_path, tmp_path / "run", **options))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "IA3"},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
        # as peft itself saves it
        {"peft_type": "LORA", "r": 2, "inference_mode": True, "task_type": "CAUSAL_LM"},
    ],
    ids=["IA3", "prefix", "LoRA"],
)
def test_the_command_line_trains_the_adapter_of_a_file(config, tmp_path):
    run = run_with(tmp_path, config)
    saved = json.loads((run / "model" / "adapter_config.json").read_text())
    assert saved["peft_type"] == config["peft_type"]
    losses = [line["loss"] for line in read_metrics(run) if line["kind"] == "train"]
    assert len(losses) == 2
    peft.AutoPeftModelForCausalLM.from_pretrained(run / "model")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 2}, "peft_type is None; allowed are "),
        ({"peft_type": "lora"}, "peft_type is 'lora'; allowed are "),
        ({"peft_type": "ADALORA"}, "ADALORA chooses its ranks by gradients"),
        ({"peft_type": "LORA", "rank": 2}, "LORA has no key 'rank'."),
        ({"peft_type": "LORA", "r": 2, "lora_alpa": 2}, "Did you mean 'lora_alpha'?"),
        ({"peft_type": "LORA", "target_modules": ["no_such"]}, "no_such"),
        (
            {"peft_type": "LORA", "task_type": "SEQ_CLS"},
            "task_type is 'SEQ_CLS', but --task prompted needs 'CAUSAL_LM'",
        ),
    ],
)
def test_a_file_that_gives_no_adapter_is_refused(config, said, tmp_path):
    write_inputs(tmp_path, {"train_batch_size": 4, "zeroth_order": {"lr": 1e-3}})
    (tmp_path / "peft.json").write_text(json.dumps(config))
    options = {"peft_config": tmp_path / "peft.json", "model": MODEL}
    (found,) = refusals_on_ranks(1, prompted_options(tmp_path, tmp_path / "run", **options))
    assert "--peft_config " in found
    assert said in found


def test_an_adapter_that_would_leave_a_new_head_untrained_is_refused(tmp_path):
    write_inputs(tmp_path, {"train_batch_size": 4, "zeroth_order": {"lr": 1e-3}})
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2]}
    (tmp_path / "peft.json").write_text(json.dumps(config))
    options = options_of(
        deepspeed_config=tmp_path / "config.json",
        model=MODEL,
        output_dir=tmp_path / "run",
        train_file=tmp_path / "train.jsonl",
        peft_config=tmp_path / "peft.json",
    )
    (found,) = refusals_on_ranks(1, options)
    assert "TRAINABLE_TOKENS trains no module as a whole, but score.weight " in found


# --- resized embeddings ---------------------------------------------------------------------------

NEW_TOKENS = 4
# (keys of the adapter, whether the head is the embedding) by model
RESIZED: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "opt": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
}


def resized(name: str, seed: int) -> Any:
    """A model with rows for new tokens, drawn by the seed."""
    model = zoo_model(name)
    torch.manual_seed(seed)
    model.resize_token_embeddings(VOCABULARY + NEW_TOKENS)
    return model


def data_with_new_tokens() -> list[dict[str, torch.Tensor]]:
    """Rows of which every second token is a new one."""
    rows = []
    for row in data_of():
        ids = row["input_ids"].clone()
        ids[::2] = VOCABULARY + ids[::2] % NEW_TOKENS
        rows.append({**row, "input_ids": ids, "labels": ids})
    return rows


def trained(model: Any, data: Any, stage: int, folder: Path) -> tuple[Any, ...]:
    """Make some steps, and save the adapter: (engine, a batch, losses, logits of the batch)."""
    batch = {key: torch.stack([row[key] for row in data[:2]]) for key in data[0]}
    section = {"direction": "low_rank", "examples_per_direction": 1, "normalize": True}
    config = configuration(4, stage=stage, method="mezo", **{**section, "lr": 1e-2})
    engine = zods.initialize(model=model, config=config, training_data=data)[0]
    losses = [engine.train_batch() for _ in range(STEPS)]
    engine.save_pretrained(folder)
    engine.eval()
    return engine, batch, losses, engine(batch).logits.float()


def rank_of_resized(name: str, stage: int, folder: Path) -> dict[str, Any]:
    keys, _ = RESIZED[name]
    base = resized(name, 1)
    before = base.get_input_embeddings().weight.detach().clone()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, **keys, **CAUSAL))
    data = data_with_new_tokens()
    _, batch, losses, logits = trained(model, data, stage, folder)
    # other rows for the new tokens, which are to be replaced by those of the folder
    loaded = peft.PeftModel.from_pretrained(resized(name, 2), folder).eval()
    with torch.no_grad():
        again = loaded(**batch).logits
    rows = loaded.get_input_embeddings().weight.detach()
    return {
        "losses": losses,
        "logits": float((logits - again).abs().max()),
        "moved": float((rows - before)[VOCABULARY:].abs().max()),
        "tied": loaded.get_output_embeddings().weight.data_ptr() == rows.data_ptr(),
        "files": sorted(path.name for path in folder.iterdir()),
    }


@pytest.mark.slow  # an adapter that saves its embeddings is among the default kinds
@pytest.mark.parametrize("name", RESIZED)
def test_an_adapter_with_resized_embeddings_is_trained_and_loaded_with_the_same_outputs(
    name: str, tmp_path: Path
) -> None:
    (whole,) = run_ranks(1, rank_of_resized, name, 0, tmp_path / "whole")
    sharded, _ = run_ranks(2, rank_of_resized, name, 3, tmp_path / "sharded")
    assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert len(set(whole["losses"])) == STEPS
    for found in (whole, sharded):
        assert found["logits"] < 1e-5
        assert found["moved"] > 1e-4, "the rows of new tokens are trained"
        assert found["tied"] == RESIZED[name][1]
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(found["files"])
        assert not any(file.startswith("model") for file in found["files"])


# --- quantised weights ----------------------------------------------------------------------------


class Int8Linear(torch.nn.Linear):
    """A linear layer with frozen integers as weights, and a scale for each row."""

    def __init__(self, of: torch.nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(of.in_features, of.out_features, bias=False)
        scale = of.weight.detach().abs().amax(1, keepdim=True) / 127
        weight = (of.weight.detach() / scale).round().to(dtype)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.scale = torch.nn.Parameter(scale, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(input.dtype) * self.scale.to(input.dtype)
        return torch.nn.functional.linear(input, weight)


def quantised(dtype: torch.dtype) -> Any:
    """A decoder whose attention and MLP keep integers as weights, in this dtype."""
    model = zoo_model("llama")
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, Int8Linear(child, dtype))
    return model


def rank_of_quantised(stage: int, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = peft.get_peft_model(quantised(dtype), KINDS["LoRA"])
    data = data_of()
    engine, batch, losses, logits = trained(model, data, stage, folder)
    after = {name: value.cpu() for name, value in engine.state_dict().items()}
    loaded = peft.PeftModel.from_pretrained(quantised(dtype), folder).eval()
    with torch.no_grad():
        again = loaded(**batch).logits
    expected = loaded.state_dict()
    return {
        "losses": losses,
        "logits": float((logits - again).abs().max()),
        "int8": sum(value.dtype == torch.int8 for value in after.values()),
        "kept": all(
            torch.equal(value, expected[name])
            for name, value in after.items()
            if value.dtype == torch.int8
        ),
    }


@pytest.mark.slow  # frozen float weights are among the default kinds
def test_lora_on_frozen_int8_weights_makes_the_steps_of_the_same_integers_in_floats(
    tmp_path: Path,
) -> None:
    (floats,) = run_ranks(1, rank_of_quantised, 0, torch.float32, tmp_path / "floats")
    (whole,) = run_ranks(1, rank_of_quantised, 0, torch.int8, tmp_path / "whole")
    sharded = run_ranks(2, rank_of_quantised, 3, torch.int8, tmp_path / "sharded")[0]
    assert floats["int8"] == 0
    assert len(set(floats["losses"])) == STEPS
    for found in (whole, sharded):
        assert found["losses"] == pytest.approx(floats["losses"], rel=1e-6)
        assert found["int8"] == 14, "seven layers in each of two blocks"
        assert found["kept"]
        assert found["logits"] < 1e-5
