"""The files of a run at its ends: synced, whole on a full disk, and none left behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import zods
import zods.finetune
from tests.disks import Syncs, fill, small_disk
from tests.distributed.command_line import MODEL, prompted_options, write_inputs
from tests.distributed.models import Tiny, collate, configuration, opt_data, tiny_data, tiny_opt
from tests.distributed.ranks import run_ranks
from zods.cli.arguments import parse_arguments
from zods.config.deepspeed_json import read_first_order_config
from zods.training.first_order import FirstOrderEngine
from zods.training.resume import CHECKPOINTS, INITIAL

MEZO = {"method": "mezo", "lr": 1e-2}


def rank_of_durability(folder: Path) -> dict[str, list[str]]:
    """The files and folders that each kind of write leaves without a sync."""
    found = {}
    syncs = Syncs()
    engine = zods.initialize(
        model=tiny_opt(), config=configuration(8, **MEZO), training_data=opt_data()
    )[0]
    name = next(name for name, _ in engine.module.named_parameters())
    run = folder / "zeroth" / "runs" / "new"
    engine.resume(run, new=[name])
    assert (run / INITIAL).is_file()
    engine.train_batch()
    found["log"] = syncs.unsynced(folder / "zeroth")
    engine.save_checkpoint(run / CHECKPOINTS)
    found["checkpoint"] = syncs.unsynced(folder / "zeroth")
    engine.save_pretrained(run / "models" / "last")
    found["export"] = syncs.unsynced(folder / "zeroth")
    engine.save_16bit_model(run / "state")
    found["state dict"] = syncs.unsynced(folder / "zeroth")
    section = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    config = {"train_batch_size": 8, "optimizer": section, "steps_per_print": 10**9}
    first = FirstOrderEngine(tiny_opt(), read_first_order_config(config, 1), opt_data(), collate)
    run = folder / "first" / "runs" / "new"
    first.resume(run)
    first.train_batch()
    first.save_checkpoint(run / CHECKPOINTS)
    found["first order"] = syncs.unsynced(folder / "first")
    syncs.close()
    return found


def test_all_that_an_engine_writes_is_synced_with_its_folders(tmp_path):
    (found,) = run_ranks(1, rank_of_durability, tmp_path)
    assert {what: left for what, left in found.items() if left} == {}


# --- a full disk at the export --------------------------------------------------------------------


def rank_of_full_exports(disk: Path, elsewhere: Path) -> list[tuple[str, set[str]]]:
    """By number of free pages: the error of an export, and the files that are not as they should be
    or that should not be there.
    """
    engine = zods.initialize(model=tiny_opt(), config=configuration(8, stage=0, **MEZO))[0]
    engine.save_pretrained(elsewhere)
    whole = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    found = []
    for pages in (0, 1, 2, 3, 4, 6, 8, 12, 20, 40):
        fill(disk, pages)
        error = ""
        try:
            engine.save_pretrained(disk / "model")
        except OSError as raised:
            error = str(raised)
        written = {path.name: path.read_bytes() for path in (disk / "model").glob("*")}
        odd = {name for name, data in written.items() if whole.get(name) != data}
        found.append((error, odd | (set() if error else whole.keys() - written.keys())))
        shutil.rmtree(disk / "model", ignore_errors=True)
    return found


def test_a_full_disk_at_the_export_is_one_error_that_names_it_and_leaves_whole_files(tmp_path):
    with small_disk(tmp_path / "disk", 512) as disk:
        (found,) = run_ranks(1, rank_of_full_exports, disk, tmp_path / "elsewhere")
    errors = [error for error, _ in found if error]
    assert 3 <= len(errors) < len(found)
    for error in errors:
        assert str(disk / "model") in error
        assert "No space left" in error or "os error 28" in error
    assert [odd for _, odd in found if odd] == []


# --- the anchor's files ---------------------------------------------------------------------------


def rank_of_fewer_ranks(drive: Path) -> list[str]:
    section = {"method": "mezo_svrg", "lr": 1e-2, "anchor_interval": 3}
    config = configuration(
        12, nvme_path=drive, anchor={"point": "nvme", "gradient": "nvme"}, **section
    )
    engine = zods.initialize(model=Tiny(), config=config, training_data=tiny_data())[0]
    engine.train_batch()
    return sorted(str(path.relative_to(drive)) for path in drive.rglob("*") if path.is_file())


def test_files_that_a_killed_run_on_more_ranks_left_are_removed_and_no_folder_stays(tmp_path):
    for rank in range(4):
        (tmp_path / "zods_anchor" / f"rank{rank}").mkdir(parents=True)
        (tmp_path / "zods_anchor" / f"rank{rank}" / "point.bin").write_bytes(b"left")
    (tmp_path / "zods_anchor" / "rank3" / "notes").write_text("mine")
    for during in run_ranks(2, rank_of_fewer_ranks, tmp_path):
        own = [f"zods_anchor/rank{r}/{role}.bin" for r in (0, 1) for role in ("gradient", "point")]
        assert during == [*own, "zods_anchor/rank3/notes"]
    assert sorted(path.name for path in (tmp_path / "zods_anchor").iterdir()) == ["rank3"]


# --- models that are none -------------------------------------------------------------------------


class Harmful:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def pickled(to: Path, mark: Path | None = None) -> Path:
    """A copy of the model whose weights are in a pickle. mark: made by the code in the pickle."""
    shutil.copytree(MODEL, to)
    tensors: dict[str, Tensor | Harmful] = dict(load_file(to / "model.safetensors"))
    if mark is not None:
        tensors["x"] = Harmful(mark)
    torch.save(tensors, to / "pytorch_model.bin")
    (to / "model.safetensors").unlink()
    return to


def adapter(to: Path, base: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(str(base))
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, base_model_name_or_path=str(base))
    peft.get_peft_model(model, settings).save_pretrained(to)
    return to


def rank_of_bad_models(folder: Path) -> dict[str, str]:
    """The error of a start with each model; "nothing" where it starts."""
    mark = folder / "mark"
    models = {
        "a pickle": pickled(folder / "pickle"),
        "a pickle with code": pickled(folder / "code", mark),
        "a pickle that is cut": pickled(folder / "cut"),
        "a text": pickled(folder / "text"),
        "no weights": pickled(folder / "none"),
        "an adapter in a pickle": adapter(folder / "adapter", MODEL),
        "an adapter with code": adapter(folder / "adapter code", MODEL),
        "an adapter that is cut": adapter(folder / "adapter cut", MODEL),
        "an adapter in a pipe": adapter(folder / "adapter pipe", MODEL),
    }
    os.truncate(models["a pickle that is cut"] / "pytorch_model.bin", 1000)
    (models["a text"] / "pytorch_model.bin").write_text("version https://git-lfs")
    (models["no weights"] / "pytorch_model.bin").unlink()
    for name, path in models.items():
        if name.startswith("an adapter"):
            weights = load_file(path / "adapter_model.safetensors")
            (path / "adapter_model.safetensors").unlink()
            if name.endswith("pipe"):
                os.mkfifo(path / "adapter_model.safetensors")
                continue
            extra = {"x": Harmful(mark)} if name.endswith("code") else {}
            torch.save({**weights, **extra}, path / "adapter_model.bin")
            if name.endswith("cut"):
                os.truncate(path / "adapter_model.bin", 1000)
    found = {}
    for number, (name, model) in enumerate(models.items()):
        options = prompted_options(
            folder, folder / f"run{number}", model=model, tokenizer=MODEL, max_steps=1
        )
        try:
            zods.finetune.start(parse_arguments(options))
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    found["mark"] = str(mark.exists())
    return found


GOOD = ("a pickle", "an adapter in a pickle")


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_models_in_pickles_load_without_running_their_code_and_bad_ones_are_one_line(
    tmp_path, stage
):
    write_inputs(
        tmp_path,
        {"train_batch_size": 8, "zero_optimization": {"stage": stage}, "zeroth_order": MEZO},
    )
    (found,) = run_ranks(1, rank_of_bad_models, tmp_path)
    assert found.pop("mark") == "False"
    for name, said in found.items():
        if name in GOOD:
            assert said == "nothing", name
        else:
            assert said.startswith(("ValueError: ", "OSError: ")), (name, said)
            assert len(said.splitlines()) == 1, (name, said)
            assert str(tmp_path) in said, (name, said)
    assert "it is a named pipe" in found["an adapter in a pipe"]
