"""First-order training with parameters and optimizer states on NVMe: damaged files are noticed."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import pytest

from tests.distributed.models import collate, opt_data, tiny_opt
from tests.distributed.ranks import run_ranks
from tests.helpers import LogTexts, flip
from zods.config.deepspeed_json import read_first_order_config
from zods.training.first_order import FirstOrderEngine
from zods.training.first_order_checkpoint import MANIFEST, OFFLOADED


def build(nvme: Path, sub_group_size: int = 10**9, torch_adam: bool = True) -> FirstOrderEngine:
    shutil.rmtree(nvme, ignore_errors=True)
    nvme.mkdir()
    on_nvme = {"device": "nvme", "nvme_path": str(nvme)}
    param = {**on_nvme, "buffer_size": 1 << 20, "buffer_count": 40, "max_in_cpu": 0}
    config = {
        "train_batch_size": 8,
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": sub_group_size,
            "offload_optimizer": on_nvme,
            "offload_param": param,
        },
        "bf16": {"enabled": True},
        "aio": {"block_size": 4096},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": torch_adam}},
        "steps_per_print": 10**9,
    }
    run = read_first_order_config(config, 1)
    model = tiny_opt()
    for layer in model.model.decoder.layers:
        layer.dropout = 0.0
    # DeepSpeed keeps what is smaller than 1 MiB in memory
    model.resize_token_embeddings(30_000, mean_resizing=False)
    model.bfloat16()
    deepspeed.zero.Init(module=model, config_dict_or_path=run.deepspeed)
    return FirstOrderEngine(model, run, opt_data(), collate)


def weights(engine: FirstOrderEngine) -> list[list[float]]:
    found = []
    for param in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([param]):
            found.append(param.detach().flatten()[:100].tolist())
    return found


def rank_of_savers(folder: Path, sub_group_size: int, torch_adam: bool = True) -> tuple[Any, int]:
    engine = build(folder / "nvme", sub_group_size, torch_adam)
    saved = []
    for _ in range(2):
        engine.train_batch()
        saved.append(weights(engine))
        engine.save_checkpoint(folder / "checkpoints")
    (folder / "checkpoints" / "global_step2" / MANIFEST).unlink()
    engine.save_checkpoint(folder / "checkpoints")  # again, as after a crash
    return saved, len(copies(folder))


def copies(folder: Path) -> list[Path]:
    """The optimizer's files in the newest checkpoint."""
    found = (folder / "checkpoints" / "global_step2" / OFFLOADED).rglob("*")
    return sorted(path for path in found if path.is_file())


# In a process of its own: DeepSpeed names the files by the number of parameters made before.
def rank_of_loaders(
    folder: Path, sub_group_size: int, torch_adam: bool = True
) -> tuple[int, Any, list[str]]:
    warnings = LogTexts("zods.training", logging.WARNING)
    engine = build(folder / "nvme", sub_group_size, torch_adam)
    try:
        engine.load_checkpoint(folder / "checkpoints")
    except ValueError as error:
        return engine.global_steps, None, [*warnings.texts, str(error)]
    return engine.global_steps, weights(engine), list(warnings.texts)


# DeepSpeed compiles its own optimizer for a CPU, which takes a minute.
@pytest.mark.slow
@pytest.mark.parametrize("torch_adam", [True, False])
def test_a_damaged_file_of_optimizer_states_is_not_loaded(tmp_path, torch_adam):
    ((saved, num_copies),) = run_ranks(1, rank_of_savers, tmp_path, 10**9, torch_adam)
    assert num_copies > 0
    assert run_ranks(1, rank_of_loaders, tmp_path, 10**9, torch_adam) == [(2, saved[1], [])]
    damaged = copies(tmp_path)[-1]
    flip(damaged, damaged.stat().st_size // 2)
    ((step, loaded, (said,)),) = run_ranks(1, rank_of_loaders, tmp_path, 10**9, torch_adam)
    assert (step, loaded) == (1, saved[0]), "an older checkpoint is used"
    assert str(damaged) in said
    assert "damaged" in said


def test_a_checkpoint_that_deepspeed_restores_only_in_part_is_refused(tmp_path):
    run_ranks(1, rank_of_savers, tmp_path, 600_000)
    ((step, _, said),) = run_ranks(1, rank_of_loaders, tmp_path, 600_000)
    assert step == 0
    warned, error = said
    assert "cannot be resumed" in warned
    assert "not loaded" in error


def rank_of_reads(folder: Path) -> str:
    engine = build(folder / "nvme")
    engine.train_batch()
    weight = engine.module.get_input_embeddings().weight
    flip(Path(weight.nvme_swapper.get_path(weight)), 4096)
    with pytest.raises(RuntimeError) as error:
        engine.train_batch()
    return str(error.value)


def test_a_parameter_on_nvme_that_was_changed_ends_the_run(tmp_path):
    (said,) = run_ranks(1, rank_of_reads, tmp_path)
    assert "not those that were written" in said
