"""The folder of a run: nothing in it is lost, adopted or overwritten unnoticed."""

import json
from pathlib import Path

import pytest

from zods.cli.run_folder import RunFolder, read_metrics
from zods.config.schema import parse_section
from zods.training.resume import LOG_NAME, copy_log
from zods.trajectory.log import LogFile, Trajectory, read_log
from zods.trajectory.records import Header, RunRecord, Step


def write_log(path: Path, num_steps: int) -> None:
    trajectory = Trajectory()
    trajectory.file = LogFile(path)
    trajectory.add(Header("Model", ()))
    trajectory.add(RunRecord(0, parse_section({"method": "mezo"}), 8, 1, {}))
    for step in range(num_steps):
        trajectory.add(Step(step, 1 / (step + 1), 1e-3, (0.5,), (0, step + 1)))
    trajectory.wait()
    trajectory.file.close()


def described(folder: Path, step: int) -> RunFolder:
    run = RunFolder(folder, rank=0, resume=True)
    run.describe({}, arguments={}, seed=1, world_size=1, device="cpu", step=step)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with a log and a line of metrics per step."""
    write_log(tmp_path / LOG_NAME, 3)
    folder = described(tmp_path, 0)
    folder.record("eval", 0, accuracy=0.5)
    for record in read_log(tmp_path / LOG_NAME).records:
        if isinstance(record, Step):
            folder.record("train", record.step + 1, loss=record.loss, lr=record.lr, seconds=0.1)
    return tmp_path


def test_lines_of_metrics_that_a_crash_lost_are_made_again_from_the_log(run):
    whole = list(read_metrics(run))
    steps = read_log(run / LOG_NAME).num_steps
    assert steps > 1
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole[:-1]))
    described(run, steps)
    mended = list(read_metrics(run))
    assert mended[:-1] == whole[:-1]
    for name in ("kind", "step", "loss", "lr"):
        assert mended[-1][name] == whole[-1][name]
    assert mended[-1]["seconds"] is None


def test_metrics_of_steps_that_are_made_again_are_removed(run):
    described(run, 1)
    assert [(line["kind"], line["step"]) for line in read_metrics(run)] == [
        ("eval", 0),
        ("train", 1),
    ]


@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_metrics_of_steps_without_a_log_are_an_error(run, damage):
    (run / LOG_NAME).unlink() if damage == "missing" else (run / LOG_NAME).write_bytes(b"")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"{damage}, but metrics.jsonl beside it has .* steps"):
        RunFolder(run, rank=0, resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_removed_file_of_metrics_is_an_error_at_the_next_line(run):
    folder = described(run, 1)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl.*removed while this run writes"):
        folder.record("train", 2, loss=1.0)


def test_a_symbolic_link_is_replaced_and_its_target_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").symlink_to(tmp_path / "precious")
    described(tmp_path / "run", 0)
    assert (tmp_path / "precious").read_text() == "mine"
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {}


def test_of_two_forks_into_one_folder_the_second_is_refused(run, tmp_path):
    copy_log(run, None, tmp_path / "fork")
    content = (tmp_path / "fork" / LOG_NAME).read_bytes()
    with pytest.raises(ValueError, match="another run has been started in this folder"):
        copy_log(run, None, tmp_path / "fork")
    assert (tmp_path / "fork" / LOG_NAME).read_bytes() == content
    assert [path.name for path in (tmp_path / "fork").iterdir()] == [LOG_NAME]
