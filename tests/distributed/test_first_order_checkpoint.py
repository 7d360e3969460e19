"""Checkpoints of first-order training, which DeepSpeed writes.

No code in their files is run when they are loaded.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.models import collate, opt_data, tiny_opt
from tests.distributed.ranks import run_ranks
from tests.helpers import LogTexts, flip
from zods.cli.run_folder import RunFolder
from zods.config.deepspeed_json import read_first_order_config
from zods.finetune import checkpoint_to_fork
from zods.training import first_order_checkpoint
from zods.training.first_order import FirstOrderEngine
from zods.training.first_order_checkpoint import CLASSES_IN_CHECKPOINTS, MANIFEST
from zods.training.resume import CHECKPOINTS, LOG_NAME
from zods.trajectory.log import read_log
from zods.trajectory.records import Step

VARIABLE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def build(
    stage: int,
    bf16: bool,
    *,
    lr: float = 1e-3,
    data: Any = None,
    dropout: float = 0.1,
    activation: str = "relu",
    seed: int = 1,
    clipping: float = 0.0,
) -> FirstOrderEngine:
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": lr, "weight_decay": 0.01, "torch_adam": True},
        },
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": lr, "warmup_num_steps": 5}},
        "gradient_clipping": clipping,
        "steps_per_print": 10**9,
        "zeroth_order": {"seed": seed},
    }
    run = read_first_order_config(config, torch.distributed.get_world_size())
    model = tiny_opt()
    model.config.activation_function = activation
    for layer in model.model.decoder.layers:
        layer.dropout = dropout
    return FirstOrderEngine(model, run, data or opt_data(), collate)


def go_on(engine: FirstOrderEngine) -> list[float]:
    torch.manual_seed(9)  # dropout's random state is not in a checkpoint
    return [engine.train_batch() for _ in range(4)]


class Malicious:
    """An object that makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def poison(file: Path, mark: Path) -> None:
    """Add to a saved state an object whose code DeepSpeed's own load would run."""
    content = torch.load(file, weights_only=False)
    torch.save({**content, "extra": Malicious(mark)}, file)
    torch.load(file, weights_only=False)
    assert mark.exists(), "loading the file must run its code"
    mark.unlink()


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def rank_of_schedule() -> dict[str, Any]:
    engine = build(0, False)
    used = []
    step = engine.deepspeed.optimizer.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        used.append(engine.deepspeed.optimizer.param_groups[0]["lr"])
        return step(*args, **kwargs)

    engine.deepspeed.optimizer.step = watched
    reported = []
    for _ in range(4):
        engine.train_batch()
        assert engine.last_step is not None
        reported.append(engine.last_step.lr)
    return {"used": used, "reported": reported, "run": engine.recorder.run_record(0).to_json()}


def test_the_recorded_step_size_is_the_one_that_the_step_used():
    (found,) = run_ranks(1, rank_of_schedule)
    assert found["reported"] == found["used"]
    assert len(set(found["used"])) > 2, "a warm-up"
    assert found["run"]["optimizer"]["params"]["lr"] == 1e-3
    assert "lr" not in found["run"]["zeroth_order"]
    assert "method" not in found["run"]["zeroth_order"]


def rank_of_savers(folder: Path, stage: int, bf16: bool) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    engine = build(stage, bf16)
    for _ in range(3):
        engine.train_batch()
    engine.save_checkpoint(folder / "good")
    losses = go_on(engine)
    mark = folder / "ran"
    damaged: dict[str, Path] = {}
    for file in sorted((folder / "good" / "global_step3").glob("*.pt")):
        for name, damage in (("poisoned", lambda f: poison(f, mark)), ("cut", cut)):
            at = damaged[f"{name} {file.name}"] = folder / name / file.name
            if rank == 0:
                shutil.copytree(folder / "good", at)
                damage(at / "global_step3" / file.name)
    damaged["no folder"] = folder / "nothing"
    torch.distributed.barrier()
    again = build(stage, bf16)
    again.train_batch()
    said = {}
    for name, at in damaged.items():
        try:
            again.load_checkpoint(at)
            said[name] = ("nothing", "")
        except Exception as error:
            said[name] = (type(error).__name__, str(error))
    found = {"said": said, "ran": mark.exists(), "steps": again.global_steps, "losses": losses}
    os.environ[VARIABLE] = "0"
    again.load_checkpoint(folder / "good")
    found["resumed"] = go_on(again)
    found["variable"] = os.environ.pop(VARIABLE)
    build(stage, bf16).load_checkpoint(folder / "good")
    allowed = torch.serialization.get_safe_globals()
    found["left"] = VARIABLE in os.environ or any(
        kind in allowed for kind in CLASSES_IN_CHECKPOINTS
    )
    return found


DEFAULT = {(1, 0, False), (2, 1, False), (2, 3, True)}


@pytest.mark.parametrize(
    ("world_size", "stage", "bf16"),
    [
        pytest.param(*case, marks=[] if case in DEFAULT else pytest.mark.slow)
        for case in itertools.product([1, 2], [0, 1, 3], [False, True])
    ],
)
def test_checkpoints_resume_to_the_bit_and_a_file_with_code_in_it_is_refused_and_not_run(
    tmp_path, world_size, stage, bf16
):
    ranks = run_ranks(world_size, rank_of_savers, tmp_path, stage, bf16)
    for found in ranks:
        assert found["resumed"] == found["losses"]
        assert found["said"] == ranks[0]["said"]
        assert not found["ran"]
        assert found["steps"] == 1, "nothing was loaded"
        assert found["variable"] == "0"
        assert not found["left"], "types allowed for one load must not stay allowed"
        assert len(found["said"]) > 2
        for name, (kind, text) in found["said"].items():
            assert kind == "ValueError"
            assert name.split()[-1] in text or name == "no folder"
            assert "system" in text or "poisoned" not in name
            assert "weights_only" not in text, "the message must not advise to run the code"


def rank_of_unchecked_loads(folder: Path) -> tuple[str, bool]:
    engine = build(3, False)
    engine.train_batch()
    engine.save_checkpoint(folder)
    mark = folder / "ran"
    poison(next((folder / "global_step1").glob("*optim_states.pt")), mark)
    first_order_checkpoint.check = lambda folder, comm: None  # type: ignore[assignment]
    with pytest.raises(Exception, match="system") as error:
        build(3, False).load_checkpoint(folder)
    return type(error.value).__name__, mark.exists()


def test_deepspeeds_loads_run_no_code_even_of_files_that_were_not_checked_before(
    tmp_path,
):
    assert run_ranks(1, rank_of_unchecked_loads, tmp_path) == [("UnpicklingError", False)]


def rank_of_keepers(folder: Path) -> list[list[str]]:
    engine, found = build(1, False), []
    (folder / "global_step9").mkdir(exist_ok=True)  # a later step, as after a run went back
    for _ in range(4):
        engine.train_batch()
        engine.save_checkpoint(folder, keep=2)
        torch.distributed.barrier()
        found.append(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
        torch.distributed.barrier()
    build(1, False).load_checkpoint(folder)
    return found


def test_old_checkpoints_are_removed_but_the_last_ones_and_the_one_just_written(tmp_path):
    expected = [[f"global_step{step}", "global_step9"] for step in range(1, 5)]
    assert run_ranks(2, rank_of_keepers, tmp_path) == [expected, expected]


# --- checkpoints that a crash or a drive damaged --------------------------------------------------


def empty_latest(checkpoints: Path) -> None:
    (checkpoints / "latest").write_text("")


def no_latest(checkpoints: Path) -> None:
    (checkpoints / "latest").unlink()


def damaged_newest(checkpoints: Path) -> None:
    file = sorted((checkpoints / "global_step4").glob("*optim_states.pt"))[-1]
    flip(file, file.stat().st_size // 2)


def mixed_newest(checkpoints: Path) -> None:
    file = sorted((checkpoints / "global_step2").glob("*optim_states.pt"))[-1]
    shutil.copy(file, checkpoints / "global_step4" / file.name)


def file_missing(checkpoints: Path) -> None:
    sorted((checkpoints / "global_step4").glob("*optim_states.pt"))[-1].unlink()


def half_written_newest(checkpoints: Path) -> None:
    (checkpoints / "global_step4" / MANIFEST).unlink()


def damaged_manifest(checkpoints: Path) -> None:
    (checkpoints / "global_step4" / MANIFEST).write_text("{")


# {damage: (what does it, the step at which the run resumes, a part of the warning)}
DAMAGES: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "latest empty": (empty_latest, 4, ""),
    "latest missing": (no_latest, 4, ""),
    "newest damaged": (damaged_newest, 2, "damaged, or of another checkpoint"),
    "newest mixed": (mixed_newest, 2, "damaged, or of another checkpoint"),
    "a file missing": (file_missing, 2, "is missing"),
    "newest half written": (half_written_newest, 2, "not whole"),
    "manifest damaged": (damaged_manifest, 2, "damaged"),
}


def close_log(engine: FirstOrderEngine) -> None:
    """Close the log, so that the next engine may log in its folder."""
    if engine.recorder.trajectory.file is not None:
        engine.recorder.trajectory.file.close()
    torch.distributed.barrier()


def logged_run(folder: Path, seed: int = 1) -> list[float]:
    """A run with checkpoints at steps 2 and 4; returns its losses from step 2 on."""
    engine = build(1, False, dropout=0.0, seed=seed)
    engine.resume(folder)
    losses = []
    for step in range(1, 7):
        losses.append(engine.train_batch())
        if step in (2, 4):
            engine.save_checkpoint(folder / CHECKPOINTS)
    close_log(engine)
    return losses[2:]


def rank_of_damages(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    losses = logged_run(folder / "run")
    for name, (damage, _, _) in DAMAGES.items():
        at = folder / name
        if torch.distributed.get_rank() == 0:
            shutil.copytree(folder / "run", at)
            damage(at / CHECKPOINTS)
        torch.distributed.barrier()
        warnings = LogTexts(first_order_checkpoint.__name__)
        engine = build(1, False, dropout=0.0)
        engine.resume(at)
        began = engine.global_steps
        resumed = [engine.train_batch() for _ in range(began, 6)]
        found[name] = (began, list(warnings.texts), resumed == losses[began - 2 :])
        close_log(engine)
    return found


def test_a_resume_uses_the_last_checkpoint_that_is_whole_and_says_which_are_not(tmp_path):
    ranks = run_ranks(2, rank_of_damages, tmp_path)
    for name, (_, step, said) in DAMAGES.items():
        for rank in ranks:
            assert rank[name][0] == step, name
            assert rank[name][2], f"{name}: other losses"
        texts = ranks[0][name][1]
        assert any(said in text for text in texts) if said else not texts, f"{name}: {texts}"


def rank_of_restart(folder: Path) -> None:
    logged_run(folder)
    rank = torch.distributed.get_rank()
    if rank == 0:
        shutil.rmtree(folder / CHECKPOINTS)
        lines = [json.dumps({"kind": "train", "step": step}) + "\n" for step in range(1, 7)]
        (folder / "metrics.jsonl").write_text("".join(lines))
    torch.distributed.barrier()
    engine = build(1, False, dropout=0.0)
    RunFolder(folder, rank=rank, resume=True).follow_cuts(engine.recorder.trajectory)
    engine.resume(folder)
    assert engine.global_steps == 0
    close_log(engine)  # the run ends before `RunFolder.describe`
    RunFolder(folder, rank=rank, resume=True)


def test_a_restart_from_step_0_that_is_killed_can_be_started_again(tmp_path):
    """The metrics have no steps that the log has not."""
    run_ranks(2, rank_of_restart, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def rank_of_forks(folder: Path) -> dict[str, str]:
    logged_run(folder)
    checkpoints, found = folder / CHECKPOINTS, {}
    for damage in (empty_latest, no_latest, half_written_newest):
        damage(checkpoints)
        found[damage.__name__] = checkpoint_to_fork(folder, is_first_order=True).name
    shutil.rmtree(checkpoints / "global_step2")
    for name, is_first_order in (("first order", True), ("zeroth order", False)):
        empty_latest(checkpoints)
        with pytest.raises(FileNotFoundError) as error:
            checkpoint_to_fork(folder, is_first_order)
        found[name] = str(error.value)
    return found


def test_a_fork_starts_from_the_newest_whole_checkpoint_whatever_latest_says(tmp_path):
    (found,) = run_ranks(1, rank_of_forks, tmp_path)
    assert found["empty_latest"] == found["no_latest"] == "global_step4"
    assert found["half_written_newest"] == "global_step2"
    assert (
        f"no whole checkpoint of first-order training in {tmp_path}/checkpoints"
        in (found["first order"])
    )
    assert "no file `latest`" in found["zeroth order"]


def rank_of_other_ranks(folder: Path) -> str:
    with pytest.raises(ValueError, match="2 ranks") as error:
        build(1, False, dropout=0.0).load_checkpoint(folder / CHECKPOINTS)
    return str(error.value)


def test_a_checkpoint_of_another_number_of_ranks_is_one_clear_error(tmp_path):
    run_ranks(2, logged_run, tmp_path)
    (text,) = run_ranks(1, rank_of_other_ranks, tmp_path)
    assert "this run has 1" in text


OTHERS = {
    "another lr": ({"lr": 2e-3}, "made with the optimizer"),
    "clipping": ({"clipping": 0.5}, "made with gradient_clipping = 0.0, this run has 0.5"),
    "precision": ({"bf16": True}, 'made with bf16 = null, this run has {"enabled": true}'),
    "other data": ({"data": opt_data()[::-1]}, "other training data"),
    "another configuration": ({"activation": "gelu"}, "activation_function"),
}


def rank_of_others(folder: Path) -> dict[str, str]:
    logged_run(folder)
    said = {}
    for name, (changed, _) in OTHERS.items():
        before = (folder / LOG_NAME).read_bytes()
        with pytest.raises(ValueError, match=LOG_NAME) as error:
            build(**{"stage": 1, "bf16": False, "dropout": 0.0, **changed}).resume(folder)
        said[name] = str(error.value)
        assert (folder / LOG_NAME).read_bytes() == before
    return said


def test_a_resume_with_another_optimizer_or_other_data_is_refused(tmp_path):
    (said,) = run_ranks(1, rank_of_others, tmp_path)
    for name, (_, text) in OTHERS.items():
        assert text in said[name], name


def rank_of_earlier(folder: Path) -> tuple[int, list[str]]:
    logged_run(folder)
    for path in (folder / CHECKPOINTS).glob(f"*/{MANIFEST}"):
        path.unlink()
    warnings = LogTexts(first_order_checkpoint.__name__)
    engine = build(1, False, dropout=0.0)
    engine.load_checkpoint(folder / CHECKPOINTS)
    return engine.global_steps, list(warnings.texts)


def test_a_checkpoint_without_a_manifest_is_loaded_with_a_warning(tmp_path):
    ((step, said),) = run_ranks(1, rank_of_earlier, tmp_path)
    assert step == 4
    not_whole, unchecked = said
    assert "global_step2: not whole" in not_whole
    assert "without a check" in unchecked


# --- checkpoints of another log -------------------------------------------------------------------


def cut_log(at: Path, steps: int) -> None:
    """Lose the end of a log, at the end of a line."""
    log = read_log(at / LOG_NAME)
    os.truncate(at / LOG_NAME, log.ends[len(log.until(steps)) if steps else 0])


def without_head(at: Path) -> None:
    """Make the manifests those of an earlier version."""
    for path in (at / CHECKPOINTS).glob(f"*/{MANIFEST}"):
        manifest = json.loads(path.read_text())
        manifest.pop("head", None)
        path.write_text(json.dumps(manifest))


def cut_log_without_head(at: Path) -> None:
    without_head(at)
    cut_log(at, 3)


def of_another_run(at: Path) -> None:
    shutil.rmtree(at / CHECKPOINTS)
    shutil.copytree(at.parent / "other" / CHECKPOINTS, at / CHECKPOINTS)


# {what happened: (what does it, the step at which the run resumes; None: it is refused)}
LOGS: dict[str, tuple[Callable[[Path], None], int | None]] = {
    "the log lost its end": (lambda at: cut_log(at, 3), 2),
    "the log lost its end, no head": (cut_log_without_head, 2),
    "no head": (without_head, 4),
    "only the header left": (lambda at: cut_log(at, 0), None),
    "another run": (of_another_run, None),
}


def rank_of_logs(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    losses = logged_run(folder / "run")
    logged_run(folder / "other", seed=2)
    for name, (damage, _) in LOGS.items():
        at = folder / name
        if torch.distributed.get_rank() == 0:
            shutil.copytree(folder / "run", at)
            damage(at)
        torch.distributed.barrier()
        before = (at / LOG_NAME).read_bytes()
        warnings = LogTexts(first_order_checkpoint.__name__)
        engine = build(1, False, dropout=0.0)
        try:
            engine.resume(at)
        except ValueError as error:
            found[name] = (None, str(error), (at / LOG_NAME).read_bytes() == before)
            continue
        began = engine.global_steps
        resumed = [engine.train_batch() for _ in range(began, 6)]
        close_log(engine)
        steps = [r.step for r in read_log(at / LOG_NAME).records if isinstance(r, Step)]
        as_before = resumed == losses[began - 2 :] and steps == list(range(6))
        found[name] = (began, "\n".join(warnings.texts), as_before)
    return found


def test_a_checkpoint_that_does_not_belong_to_the_log_is_not_used(tmp_path):
    ranks = run_ranks(2, rank_of_logs, tmp_path)
    for name, (_, step) in LOGS.items():
        for rank in ranks:
            assert rank[name][0] == step, f"{name}: {rank[name]}"
            assert rank[name][2], name
        said = ranks[0][name][1]
        assert ("does not belong to" in said) == (name != "no head"), said
        if step is None:
            assert ranks[1][name][1] == said
            assert "from a copy" in said
