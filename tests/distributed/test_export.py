"""An exported model loads back with the run's weights and the names of the model's own library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import zods
from tests.distributed.models import configuration, opt_data, tiny_opt, whole
from tests.distributed.ranks import run_ranks

SECTION = {"method": "mezo", "eps": 1e-2, "lr": 1e-2, "seed": 7}
COMMON = {"task_type": "CAUSAL_LM"}
TARGETS = {"target_modules": ["q_proj", "v_proj"]}
METHODS: dict[str, Any] = {
    "LoRA": lambda: peft.LoraConfig(r=2, **TARGETS, **COMMON),
    "LoRA with a trained head": lambda: peft.LoraConfig(
        r=2, modules_to_save=["lm_head"], **TARGETS, **COMMON
    ),
    "VeRA": lambda: peft.VeraConfig(r=4, **TARGETS, **COMMON),
    "VeRA without its projection": lambda: peft.VeraConfig(
        r=4, save_projection=False, **TARGETS, **COMMON
    ),
    "IA3": lambda: peft.IA3Config(
        feedforward_modules=["fc2"], target_modules=["k_proj", "v_proj", "fc2"], **COMMON
    ),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=3, target_r=2, total_step=100, **TARGETS, **COMMON
    ),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **COMMON),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **TARGETS, **COMMON),
    "VBLoRA": lambda: peft.VBLoRAConfig(
        r=2, num_vectors=5, vector_length=4, topk=2, **TARGETS, **COMMON
    ),
}
# The modules of these models read parameters of other modules outside the forwards of those
# modules. ZeRO-3 leaves the parameters empty there.
NOT_AT_STAGE_3 = ("AdaLoRA", "VBLoRA")


# in the folder of an export: files of an earlier export in two parts, and a file of the user
OLDER = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
NOTES = "notes.txt"


class Shared(nn.Module):
    """A model with one layer under three names, a buffer, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        layer = nn.Linear(6, 6)
        self.layers = nn.ModuleList([layer, nn.Tanh(), layer])
        self.again = layer
        self.register_buffer("shift", torch.full((6,), 0.5))
        self.register_buffer("passing", torch.ones(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return ((x + self.shift) * self.passing).square().mean()


def adapted(method: str) -> Any:
    torch.manual_seed(4)
    return peft.get_peft_model(tiny_opt(), METHODS[method]())


def batch_of(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, Shared):
        return {"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(1))}
    rows = opt_data(4)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def rank_of_exports(folder: Path, stage: int) -> dict[str, Any]:
    found = {}
    methods = [method for method in METHODS if stage == 0 or method not in NOT_AT_STAGE_3]
    for name in ("shared", "tied", *methods):
        model = Shared() if name == "shared" else tiny_opt() if name == "tied" else adapted(name)
        engine = zods.initialize(
            model=model, config=configuration(4 * engine_ranks(), stage=stage, **SECTION)
        )[0]
        for _ in range(2):
            engine.backward(engine(batch_of(engine.module)))
            engine.step()
        if name == "tied" and engine.global_rank == 0:
            (folder / name).mkdir()
            for file in (*OLDER, NOTES):
                (folder / name / file).touch()
        engine.save_pretrained(folder / name)
        engine.eval()
        outputs = engine(batch_of(engine.module))
        value = outputs if isinstance(outputs, Tensor) else outputs.logits
        found[name] = {
            "weights": {key: tensor.numpy() for key, tensor in whole(engine).items()},
            "value": value.detach().numpy(),
            "files": sorted(path.name for path in (folder / name).iterdir())
            if engine.global_rank == 0
            else [],
        }
    return found


def engine_ranks() -> int:
    return torch.distributed.get_world_size()


@pytest.fixture(scope="module", params=[(1, 0), (2, 3)], ids=["stage 0", "stage 3 on two ranks"])
def exports(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    ranks, stage = request.param
    folder = tmp_path_factory.mktemp("exports")
    return folder, run_ranks(ranks, rank_of_exports, folder, stage)[0]


def test_a_module_under_several_names_is_exported_under_all_of_them(exports: Any):
    folder, found = exports
    exported = load_file(folder / "shared" / "model.safetensors")
    assert list(exported) == sorted(Shared().state_dict())
    model = Shared()
    model.load_state_dict(exported)
    for name, param in model.named_parameters():
        assert (param.detach().numpy() == found["shared"]["weights"][name]).all()
    assert model(**batch_of(model)).item() == pytest.approx(
        float(found["shared"]["value"]), rel=1e-6
    )


def test_a_tied_model_of_transformers_loads_back(exports: Any):
    folder, found = exports
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "tied")
    for name, param in model.named_parameters():
        assert (param.detach().numpy() == found["tied"]["weights"][name]).all()
    logits = model.eval()(**batch_of(model)).logits
    assert logits.detach().numpy() == pytest.approx(found["tied"]["value"], abs=1e-5)


def test_an_export_removes_the_weights_of_an_earlier_one_and_no_other_file(exports: Any):
    _, found = exports
    files = found["tied"]["files"]
    assert "model.safetensors" in files
    assert NOTES in files
    assert not set(OLDER) & set(files)


def test_an_adapter_loads_back_and_has_the_tensors_that_peft_itself_saves(
    exports: Any, tmp_path: Path
):
    folder, found = exports
    for method in found.keys() - {"shared", "tied"}:
        model = peft.PeftModel.from_pretrained(tiny_opt(), folder / method).eval()
        inputs = {key: value for key, value in batch_of(model).items() if key != "labels"}
        logits = model(**inputs).logits
        assert logits.detach().numpy() == pytest.approx(found[method]["value"], abs=1e-5), method
        adapted(method).save_pretrained(tmp_path / method)
        ours, theirs = (
            load_file(path / method / "adapter_model.safetensors") for path in (folder, tmp_path)
        )
        assert ours.keys() == theirs.keys(), method
        assert found[method]["files"] == sorted(
            path.name for path in (tmp_path / method).iterdir()
        ), method
