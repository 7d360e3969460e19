"""Files of a run that are lost, mixed up, or removed: nothing starts again from 0 unnoticed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zods
import zods.finetune
from tests.distributed.command_line import finetune_on_ranks, prompted_options, write_inputs
from tests.distributed.models import Tiny, configuration, state, tiny_data
from tests.distributed.ranks import run_ranks
from tests.helpers import LogTexts
from zods.cli.arguments import parse_arguments
from zods.cli.run_folder import read_metrics
from zods.training.resume import CHECKPOINTS, LOG_NAME
from zods.trajectory.log import read_log
from zods.trajectory.records import Step

SAVED = (2, 4)
LAST = 5
OF_RANK_1 = "parameters-rank00001-of-00002.safetensors"


def build(folder: Path) -> Any:
    nvme = folder / "nvme"
    nvme.mkdir(parents=True, exist_ok=True)
    config = configuration(12, nvme_path=nvme, method="mezo", eps=1e-2, lr=2e-2)
    return zods.initialize(model=Tiny(), config=config, training_data=tiny_data(40))[0]


def run_to_the_end(folder: Path) -> list[Any]:
    """The states at the steps of SAVED and at the end; logged and saved in `folder`."""
    engine = build(folder)
    engine.resume(folder)
    states = []
    for step in range(1, LAST + 1):
        engine.train_batch()
        if step in SAVED:
            engine.save_checkpoint(folder / CHECKPOINTS)
            states.append(state(engine))
    states.append(state(engine))
    engine.close()
    torch.distributed.barrier()
    return states


# --- the log --------------------------------------------------------------------------------------


def without_newlines(data: bytes) -> bytes:
    return data.replace(b"\n", b" ")


LOST: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "zeroed": lambda data: bytes(len(data)),
    "cut in the first line": lambda data: data[:100],
    "without newlines": without_newlines,
}


def damaged(run: Path, to: Path, how: str, *, checkpoints: bool) -> Path:
    """A copy of a run whose log is damaged."""
    shutil.copytree(run, to)
    if not checkpoints:
        shutil.rmtree(to / CHECKPOINTS)
    content = LOST[how]((run / LOG_NAME).read_bytes())
    (to / LOG_NAME).unlink() if content is None else (to / LOG_NAME).write_bytes(content)
    return to


def rank_of_lost_logs(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    run_to_the_end(folder / "run")
    for how in LOST:
        for checkpoints in (True, False):
            name = f"{how}{' beside checkpoints' if checkpoints else ''}"
            at = damaged(folder / "run", folder / name, how, checkpoints=checkpoints)
            log = at / LOG_NAME
            before = log.read_bytes() if log.exists() else b""
            engine = build(at)
            try:
                engine.resume(at)
                found[name] = ("resumed", "", engine.global_steps == 0)
            except (ValueError, OSError) as error:
                found[name] = (type(error).__name__, str(error), log.read_bytes() == before)
            engine.close()
    return found


def test_a_lost_log_beside_checkpoints_is_an_error_with_the_ways_out_and_nothing_is_changed(
    tmp_path,
):
    (found,) = run_ranks(1, rank_of_lost_logs, tmp_path)
    for how in LOST:
        kind, text, unchanged = found[f"{how} beside checkpoints"]
        assert kind == "ValueError", how
        assert LOG_NAME in text
        assert "global_step4" in text
        assert "from a copy" in text
        assert unchanged, how


def test_without_checkpoints_only_a_log_that_a_new_run_can_leave_starts_over(tmp_path):
    (found,) = run_ranks(1, rank_of_lost_logs, tmp_path)
    for how in ("missing", "empty", "cut in the first line"):
        assert found[how] == ("resumed", "", True)
    for how in ("zeroed", "without newlines"):
        kind, text, unchanged = found[how]
        assert (kind, unchanged) == ("ValueError", True), how
        assert "not of a trajectory log" in text


def rank_of_a_disagreement(options: list[str]) -> tuple[str, list[int]]:
    """Run the command line until rank 1 has applied another update at step 3. Returns the error, and
    the steps of the metrics.
    """
    arguments = parse_arguments(options)
    engine, *rest = zods.finetune.start(arguments)
    commit = engine.run.recorder.add

    def other_at_step_2(record: Any) -> Any:
        change = commit(record)
        if isinstance(record, Step) and record.step == 2 and engine.global_rank == 1:
            engine.trajectory.head = "something else"
        return change

    engine.run.recorder.add = other_at_step_2
    with pytest.raises(RuntimeError, match="rank 1: what was applied up to step 4") as error:
        zods.finetune.finetune(arguments, engine, *rest)
    engine.close()
    metrics = read_metrics(arguments.model.output_dir)
    return str(error.value), [r["step"] for r in metrics if r["kind"] == "train"]


def test_after_a_disagreement_log_and_metrics_end_at_the_last_agreement_and_the_run_goes_on(
    tmp_path,
):
    section = {"method": "mezo", "lr": 1e-3, "agreement_interval": 2}
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 3}, "zeroth_order": section}
    write_inputs(tmp_path, config)
    options = prompted_options(tmp_path, tmp_path / "run", resume="auto", max_steps=6)
    (_, steps), _ = run_ranks(2, rank_of_a_disagreement, options)
    assert steps == [1, 2]
    assert read_log(tmp_path / "run" / LOG_NAME).num_steps == 2
    finetune_on_ranks(2, options)
    assert read_log(tmp_path / "run" / LOG_NAME).num_steps == 6


def rank_of_a_foreign_file(folder: Path) -> tuple[str, str]:
    folder.mkdir(exist_ok=True)
    (folder / LOG_NAME).write_text("my notes on trajectories")
    with pytest.raises(ValueError, match="another program's file") as error:
        build(folder).resume(folder)
    return str(error.value), (folder / LOG_NAME).read_text()


def test_a_file_of_the_logs_name_that_is_no_log_is_not_overwritten(tmp_path):
    ((_, content),) = run_ranks(1, rank_of_a_foreign_file, tmp_path / "run")
    assert content == "my notes on trajectories"


def rank_of_a_removed_folder(folder: Path) -> tuple[str, str]:
    engine = build(folder)
    engine.resume(folder / "run")
    engine.train_batch()
    shutil.rmtree(folder / "run")
    with pytest.raises(OSError, match="removed while this run writes to it") as error:
        engine.train_batch()
    return type(error.value).__name__, str(error.value)


def test_a_run_whose_folder_is_removed_ends_with_an_error_at_its_next_step(tmp_path):
    ((kind, text),) = run_ranks(1, rank_of_a_removed_folder, tmp_path)
    assert kind == "FileNotFoundError"
    assert str(tmp_path / "run" / LOG_NAME) in text


def rank_of_a_new_run(folder: Path) -> tuple[int, str]:
    run_to_the_end(folder)
    engine = build(folder)
    with pytest.raises(ValueError, match="another run has written to it") as error:
        engine.resume(folder, must_be_new=True)
    return engine.global_steps, str(error.value)


def test_a_run_that_must_be_new_does_not_adopt_the_log_of_another(tmp_path):
    for steps, text in run_ranks(2, rank_of_a_new_run, tmp_path):
        assert steps == 0
        assert "--resume auto" in text


# --- checkpoints ----------------------------------------------------------------------------------


def swap(run: Path) -> None:
    """Put rank 1's file of the first checkpoint into the second one."""
    first, second = (run / CHECKPOINTS / f"global_step{step}" for step in SAVED)
    shutil.copy(first / OF_RANK_1, second / OF_RANK_1)


def add(run: Path) -> None:
    second = run / CHECKPOINTS / "global_step4"
    shutil.copy(second / OF_RANK_1, second / "parameters-rank00002-of-00003.safetensors")


def remove(run: Path) -> None:
    (run / CHECKPOINTS / "global_step4" / OF_RANK_1).unlink()


def remove_state(run: Path) -> None:
    (run / CHECKPOINTS / "global_step4" / "state.json").unlink()


def blank_state(run: Path) -> None:
    (run / CHECKPOINTS / "global_step4" / "state.json").write_text("{}")


MIXED = {
    "a file of another checkpoint": (swap, "does not belong to the state.json beside it"),
    "a file too many": (add, "is not one of its files"),
    "a file missing": (remove, f"{OF_RANK_1} is missing"),
    "no state": (remove_state, "no state.json"),
    "a state of nothing": (blank_state, "not of format"),
}


def rank_of_mixed_checkpoints(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    states = run_to_the_end(folder / "run")
    for name, (damage, _) in MIXED.items():
        at = folder / name
        if torch.distributed.get_rank() == 0:
            shutil.copytree(folder / "run", at)
            damage(at)
        torch.distributed.barrier()
        engine = build(at)
        try:
            engine.load_checkpoint(at / CHECKPOINTS, "global_step4")
            error = "nothing"
        except (ValueError, OSError) as raised:
            error = str(raised)
        warnings = LogTexts("zods.training.resume")
        engine.resume(at)
        found[name] = {
            "error": error,
            "warnings": list(warnings.texts),
            "same end": state(engine) == states[-1],
        }
        engine.close()
        torch.distributed.barrier()
    return found


def test_a_checkpoint_of_mixed_files_is_an_error_and_a_resume_says_why_it_is_left_out(tmp_path):
    ranks = run_ranks(2, rank_of_mixed_checkpoints, tmp_path)
    for name, (_, said) in MIXED.items():
        for rank in ranks:
            assert said in rank[name]["error"], name
            assert rank[name]["same end"], name
        (text,) = [text for text in ranks[0][name]["warnings"] if "left out" in text]
        assert said in text, name


# --- shared memory --------------------------------------------------------------------------------


def rank_of_shared_memory(folder: Path) -> tuple[list[str], list[str], float]:
    port = os.environ["MASTER_PORT"]
    buffers = Path("/dev/shm").glob
    before = [path.name for path in buffers(f"deepspeed_allreduce_buffer_*_{port}_*")]
    torch.distributed.barrier()
    engine = build(folder)
    torch.distributed.barrier()
    after = [path.name for path in buffers(f"deepspeed_allreduce_buffer_*_{port}_*")]
    return before, after, engine.train_batch()


def test_a_run_leaves_no_buffer_of_deepspeed_in_shared_memory(tmp_path):
    for before, after, loss in run_ranks(2, rank_of_shared_memory, tmp_path):
        assert len(before) == 2, "DeepSpeed makes no such buffers any more"
        assert after == []
        assert loss > 0
