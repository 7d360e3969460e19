"""Parameters on NVMe: no run changes another run's files, and no changed file is used unnoticed."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

import zods.finetune
from tests.distributed.command_line import prompted_options, refusals_on_ranks, write_inputs
from tests.distributed.models import WIDE, Wide, configuration, state, wide_data
from tests.distributed.ranks import run_ranks
from zods.cli.arguments import parse_arguments
from zods.params.swap_files import PREFIX

STEPS = 4
GIVEN = {"method": "mezo", "eps": 1e-2, "lr": 2e-2, "direction": "rademacher"}


def build(nvme: Path, *, sharded: bool = False) -> Any:
    nvme.mkdir(parents=True, exist_ok=True)
    config = configuration(4, offload="nvme", nvme_path=nvme, **GIVEN)
    model = Wide()
    if sharded:
        without = {key: value for key, value in config.items() if key != "zeroth_order"}
        deepspeed.zero.Init(module=model, config_dict_or_path=without)
    return zods.initialize(model=model, config=config, training_data=wide_data())[0]


def folders(nvme: Path) -> list[str]:
    return sorted(path.name for path in nvme.glob(PREFIX + "*"))


def swap_file(engine: Any) -> Path:
    param = engine.module.layers[1].weight
    return Path(param.nvme_swapper.get_path(param))


# --- two runs -------------------------------------------------------------------------------------


def rank_of_two_runs(folder: Path) -> tuple[list[Any], int]:
    """The last state of a run alone, and of two runs that make their steps in turn."""
    alone = build(folder / "alone")
    for _ in range(STEPS):
        alone.train_batch()
    first = build(folder / "shared")
    first.train_batch()
    second = build(folder / "shared")
    for _ in range(STEPS - 1):
        first.train_batch()
        second.train_batch()
    second.train_batch()
    return [state(engine) for engine in (alone, first, second)], len(folders(folder / "shared"))


def test_two_runs_with_one_nvme_path_do_not_change_each_other(tmp_path):
    for (alone, first, second), number in run_ranks(2, rank_of_two_runs, tmp_path):
        assert first == alone
        assert second == alone
        assert number == 2


def rank_of_a_run(nvme: Path) -> list[str]:
    build(nvme)
    return folders(nvme)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock of a file, as a process of another run does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_the_folder_of_a_run_that_was_killed_is_removed_by_the_next_run(tmp_path):
    for name in ("ended", "running"):
        (tmp_path / f"{PREFIX}{name}").mkdir()
        (tmp_path / f"{PREFIX}{name}" / "rank0.lock").touch()
    with held(tmp_path / f"{PREFIX}running" / "rank0.lock"):
        (found,) = run_ranks(1, rank_of_a_run, tmp_path)
    assert f"{PREFIX}running" in found
    assert f"{PREFIX}ended" not in found
    assert len(found) == 2


def rank_of_a_refused_run(nvme: Path) -> str:
    with pytest.raises(ValueError, match="nvme_path") as error:
        build(nvme, sharded=True)
    return str(error.value)


def test_a_model_that_was_made_in_the_path_of_a_running_run_is_refused(tmp_path):
    with held(tmp_path / "rank0.lock"):
        (said,) = run_ranks(1, rank_of_a_refused_run, tmp_path)
    assert said.startswith("zero_optimization.offload_param.nvme_path: ")
    assert str(tmp_path) in said
    assert "another run" in said


# --- damage ---------------------------------------------------------------------------------------


def overwrite(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.seek(4096)
        opened.write(b"\x3c" * 8192)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "8 KiB are overwritten": (overwrite, "its bytes are not those that were written"),
    "truncated": (lambda file: os.truncate(file, 4096), "it has 4096 bytes of"),
    "removed": (Path.unlink, "it is gone"),
}


def rank_of_damage(folder: Path) -> dict[str, tuple[str, str, Any]]:
    """For each damage: the file, the error of the next step, and the last state after a restart."""
    found: dict[str, tuple[str, str, Any]] = {}
    for name in ("undisturbed", *DAMAGE):
        engine = build(folder / "nvme")
        engine.resume(folder / name)
        for _ in range(2):
            engine.train_batch()
        file, error = swap_file(engine), ""
        if name in DAMAGE:
            engine.flush()
            DAMAGE[name][0](file)
            with pytest.raises(RuntimeError) as raised:
                engine.train_batch()
            error = str(raised.value)
            engine.close()
            engine = build(folder / "nvme")
            engine.resume(folder / name)
        for _ in range(STEPS - 2):
            engine.train_batch()
        found[name] = str(file), error, state(engine)
        engine.close()
    return found


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> dict[str, tuple[str, str, Any]]:
    (found,) = run_ranks(1, rank_of_damage, tmp_path_factory.mktemp("damage"))
    return found


@pytest.mark.parametrize("name", DAMAGE)
def test_a_changed_file_ends_the_run_and_a_restart_gives_the_undisturbed_weights(damaged, name):
    file, error, after = damaged[name]
    assert error.startswith(file)
    assert DAMAGE[name][1] in error
    assert "Start again with the same command" in error
    assert after == damaged["undisturbed"][2]


def rank_of_a_small_drive(nvme: Path) -> str:
    with pytest.raises(ValueError, match="too small") as error:
        build(nvme)
    return str(error.value)


def test_a_drive_that_is_too_small_is_refused_before_the_model_is_written(tmp_path):
    drive = tmp_path / "drive"
    drive.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(drive)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may not mount a drive")
    try:
        # each of two ranks needs 8.5 MB, so that the drive would hold one of them
        said = run_ranks(2, rank_of_a_small_drive, drive)
    finally:
        subprocess.run(["umount", str(drive)], check=True)
    needed = 4 * (WIDE * WIDE // 2) * 4
    assert all(f"need {needed} bytes" in text and str(drive) in text for text in said)


def rank_of_handles(nvme: Path) -> list[str]:
    param = build(nvme).module.layers[0].weight
    names = ("aio_read_handle", "aio_write_handle", "use_gds", "get_path")
    return [name for name in names if not hasattr(param.nvme_swapper, name)]


def test_deepspeed_still_has_the_names_that_the_checks_of_files_touch(tmp_path):
    assert run_ranks(1, rank_of_handles, tmp_path) == [[]]


def rank_of_two_drives(folder: Path, options: list[str]) -> list[str]:
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
    arguments = parse_arguments(options)
    engine, *rest = zods.finetune.start(arguments)
    drive = folder / f"drive{os.environ['LOCAL_RANK']}"
    torch.distributed.barrier()
    found = [str(path.relative_to(drive)) for path in drive.rglob("*") if path.is_file()]
    zods.finetune.finetune(arguments, engine, *rest)
    engine.close()
    return found


def test_each_rank_of_a_host_may_have_a_drive_of_its_own(tmp_path):
    drive = f"{tmp_path}/drive{{local_rank}}"
    offload = {"device": "nvme", "nvme_path": drive, "buffer_count": 5}
    anchor = {"point": "nvme", "gradient": "nvme", "nvme_path": drive}
    section = {"method": "mezo_svrg", "lr": 1e-5, "anchor": anchor}
    zero = {"stage": 3, "offload_param": offload}
    write_inputs(
        tmp_path, {"train_batch_size": 8, "zero_optimization": zero, "zeroth_order": section}
    )
    options = [str(word) for word in prompted_options(tmp_path, tmp_path / "run", max_steps=2)]
    said = refusals_on_ranks(2, options)
    assert "drive0 is not a folder" in said[0]
    for number in range(2):
        (tmp_path / f"drive{number}").mkdir()
    for rank, found in enumerate(run_ranks(2, rank_of_two_drives, tmp_path, options)):
        anchors = [name for name in found if name.startswith("zods_anchor")]
        assert sorted(anchors) == [f"zods_anchor/rank{rank}/{k}.bin" for k in ("gradient", "point")]
        assert any(name.endswith(f"/rank{rank}.lock") for name in found), "and the parameters"
