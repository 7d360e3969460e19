"""The folder of a run: nothing in it is lost, adopted or overwritten unnoticed."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.disks import Syncs, fill, small_disk, within
from tests.distributed.command_line import MODEL
from zods.cli.load_model import save_tokenizer
from zods.cli.plots import main as plot
from zods.cli.pretrained import check_weight_files
from zods.cli.run_folder import RunFolder, read_metrics
from zods.config.deepspeed_json import load_json
from zods.config.schema import parse_section
from zods.tasks import load_examples
from zods.training.checkpoint_files import latest_tag, newest_checkpoints
from zods.training.resume import INITIAL, LOG_NAME, copy_log
from zods.trajectory.base_weights import files_of_keys
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


def described(folder: Path, step: int, has_begun: bool = True) -> RunFolder:
    run = RunFolder(folder, rank=0, resume=True)
    run.describe(
        {}, arguments={}, seed=1, world_size=1, device="cpu", step=step, has_begun=has_begun
    )
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


def test_a_replica_that_follows_is_started_again_with_its_metrics_and_without_a_log(run):
    before = list(read_metrics(run))
    (run / LOG_NAME).unlink()
    with pytest.raises(ValueError, match="missing"):
        RunFolder(run, rank=0, resume=True)
    folder = RunFolder(run, rank=0, resume=True, has_log=False)
    folder.describe({}, arguments={}, seed=1, world_size=1, device="cpu", step=50, has_begun=True)
    assert list(read_metrics(run)) == before


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


def test_the_evaluation_before_a_refresh_at_step_0_is_kept(run):
    """The refresh has changed the weights, so that it cannot be made again."""
    described(run, 0)
    assert [(line["kind"], line["step"]) for line in read_metrics(run)] == [("eval", 0)]
    described(run, 0, has_begun=False)
    assert list(read_metrics(run)) == []


@pytest.mark.parametrize("step", [-1, 0, True, "2", None, 10**400])
def test_a_line_of_metrics_with_an_impossible_step_is_made_again_from_the_log(run, step):
    whole = list(read_metrics(run))
    lines = [{**line, "step": step} if line["step"] == 2 else line for line in whole]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    described(run, read_log(run / LOG_NAME).num_steps)
    assert [line["step"] for line in read_metrics(run)] == [line["step"] for line in whole]


def test_a_line_of_metrics_that_stands_twice_is_kept_once(run):
    whole = list(read_metrics(run))
    twice = [line for line in whole for _ in range(2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in twice))
    described(run, read_log(run / LOG_NAME).num_steps)
    assert list(read_metrics(run)) == whole


def test_metrics_of_steps_that_are_made_again_are_removed(run):
    described(run, 1)
    assert [(line["kind"], line["step"]) for line in read_metrics(run)] == [
        ("eval", 0),
        ("train", 1),
    ]


def first_lines(number: int) -> Callable[[bytes], bytes]:
    """Keep the first lines of a log with 3 steps; the header and the run's record come first."""
    return lambda data: b"".join(data.splitlines(keepends=True)[:number])


LOST_STEPS: dict[str, tuple[str, Callable[[bytes], bytes | None]]] = {
    "missing": ("missing", lambda data: None),
    "empty": ("empty", lambda data: b""),
    "no line": ("100 bytes without a whole line", lambda data: data[:100]),
    "no step": ("0 steps", first_lines(1)),
    "two steps": ("1 steps", first_lines(3)),
    "two steps, one torn": ("1 steps", lambda data: first_lines(4)(data)[:-20]),
}


@pytest.mark.parametrize("name", LOST_STEPS)
def test_metrics_of_steps_that_the_log_has_lost_are_an_error(run, name):
    found, damage = LOST_STEPS[name]
    log = damage((run / LOG_NAME).read_bytes())
    (run / LOG_NAME).unlink()
    if log is not None:
        (run / LOG_NAME).write_bytes(log)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match=f"{found}, but metrics.jsonl beside it has 3 steps"
    ) as error:
        RunFolder(run, rank=0, resume=True)
    assert "from a copy" in str(error.value)
    assert ("remove metrics.jsonl" in str(error.value)) == (found == "1 steps")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert log is None or (run / LOG_NAME).read_bytes() == log


def test_metrics_of_a_step_whose_record_is_torn_are_removed_because_the_step_is_made_again(run):
    (run / LOG_NAME).write_bytes((run / LOG_NAME).read_bytes()[:-20])
    described(run, read_log(run / LOG_NAME).num_steps)
    assert [line["step"] for line in read_metrics(run) if line["kind"] == "train"] == [1, 2]


def test_a_removed_file_of_metrics_is_an_error_at_the_next_line(run):
    folder = described(run, 1)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl.*removed while this run writes"):
        folder.record("train", 2, loss=1.0)


@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_a_symbolic_link_is_replaced_and_its_target_is_left_alone(tmp_path, name):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    described(tmp_path / "run", 0)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "run" / name).is_symlink()
    assert isinstance(json.loads((tmp_path / "run" / name).read_text()), dict)


@pytest.mark.parametrize("dangling", [True, False])
def test_a_log_that_is_a_symbolic_link_is_written_to_the_file_elsewhere(tmp_path, dangling):
    (tmp_path / "disk").mkdir()
    if not dangling:
        (tmp_path / "disk" / "log").touch()
    (tmp_path / LOG_NAME).symlink_to(tmp_path / "disk" / "log")
    write_log(tmp_path / LOG_NAME, 3)
    assert (tmp_path / LOG_NAME).is_symlink()
    assert read_log(tmp_path / "disk" / "log").num_steps == 3


def test_of_two_forks_into_one_folder_the_second_is_refused(run, tmp_path):
    copy_log(run, None, tmp_path / "fork")
    content = (tmp_path / "fork" / LOG_NAME).read_bytes()
    with pytest.raises(ValueError, match="another run has been started in this folder"):
        copy_log(run, None, tmp_path / "fork")
    assert (tmp_path / "fork" / LOG_NAME).read_bytes() == content
    assert [path.name for path in (tmp_path / "fork").iterdir()] == [LOG_NAME]


# --- on the disk ----------------------------------------------------------------------------------


@pytest.fixture
def syncs() -> Iterator[Syncs]:
    syncs = Syncs()
    yield syncs
    syncs.close()


def test_all_that_a_run_writes_at_its_start_and_all_but_the_lines_of_steps_are_synced(
    tmp_path, syncs
):
    folder = described(tmp_path / "runs" / "new", 0)
    assert syncs.unsynced(tmp_path / "runs") == []
    folder.record("eval", 0, accuracy=0.5)
    assert syncs.unsynced(tmp_path / "runs") == []
    folder.record("train", 1, loss=0.5)  # can be made again from the log
    assert syncs.unsynced(tmp_path / "runs") == ["runs/new/metrics.jsonl"]
    folder.record("summary", 1)
    assert syncs.unsynced(tmp_path / "runs") == []


def test_a_fork_is_synced(run, tmp_path, syncs):
    (run / INITIAL).parent.mkdir()
    (run / INITIAL).write_bytes(b"weights")
    copy_log(run, None, tmp_path / "forks" / "new")
    assert (tmp_path / "forks" / "new" / INITIAL).read_bytes() == b"weights"
    assert syncs.unsynced(tmp_path / "forks") == []


def tokenizer_saved(folder: Path) -> None:
    save_tokenizer(AutoTokenizer.from_pretrained(MODEL), folder / "model")


def described_anew(folder: Path) -> None:
    described(folder / "run", 0)


def error_of(write: Callable[[], Any]) -> str | None:
    try:
        write()
    except OSError as error:
        return str(error)
    return None


@pytest.mark.launched
@pytest.mark.parametrize(
    ("write", "names"),
    [
        (described_anew, {"config.json", "run.json", "metrics.jsonl"}),
        (tokenizer_saved, {"tokenizer.json", "tokenizer_config.json"}),
    ],
)
def test_a_full_disk_is_an_error_that_names_the_path_and_leaves_no_half_file(
    tmp_path, write: Callable[[Path], Any], names
):
    write(tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").rglob("*.json*")}
    assert names <= whole.keys()
    with small_disk(tmp_path / "disk", 8192) as disk:
        full = 0
        for pages in (0, 1, 2, 3, 4, 8, 16, 2000):
            fill(disk, pages)
            said = error_of(lambda: write(disk))
            assert said is None or ("No space left" in said and str(disk) in said)
            full += said is not None
            for path in disk.rglob("*.json*"):
                assert path.read_bytes() == whole[path.name], (pages, path)
            if pages < 2000:
                for path in list(disk.rglob("*.json*")):
                    path.unlink()
        assert full >= 2
        assert {path.name for path in disk.rglob("*.json*")} == whole.keys()


@pytest.mark.launched
def test_metrics_on_a_full_disk_are_an_error_that_names_the_file(tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        folder = described(disk / "run", 0)
        fill(disk, 0)
        with pytest.raises(OSError, match=r"run/metrics\.jsonl.*No space left.*same command"):
            folder.record("eval", 0, text="x" * 10_000)


# --- files that are none --------------------------------------------------------------------------

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a log": (LOG_NAME, lambda at: read_log(at / LOG_NAME)),
    "a log to go on with": (LOG_NAME, lambda at: LogFile(at / LOG_NAME)),
    "a log to copy": (LOG_NAME, lambda at: copy_log(at, None, at / "fork")),
    "metrics": ("metrics.jsonl", lambda at: list(read_metrics(at))),
    "metrics of a run that goes on": ("metrics.jsonl", lambda at: described(at, 1)),
    "metrics without a log": ("metrics.jsonl", lambda at: RunFolder(at, rank=0, resume=True)),
    "a configuration": ("config.json", lambda at: load_json(at / "config.json")),
    "data": ("rows.jsonl", lambda at: load_examples(file=at / "rows.jsonl", seed=1)),
    "compressed data": ("rows.csv.gz", lambda at: load_examples(file=at / "rows.csv.gz", seed=1)),
    "weights": ("model.safetensors", check_weight_files),
    "weights of a base": ("model.safetensors", files_of_keys),
    "an index": ("model.safetensors.index.json", files_of_keys),
    "latest": ("latest", latest_tag),
}


@pytest.mark.parametrize("what", READERS)
def test_a_named_pipe_in_a_files_place_is_an_error_and_no_wait(tmp_path, what):
    name, read = READERS[what]
    os.mkfifo(tmp_path / name)
    with within(10), pytest.raises(OSError, match=f"{name}: it is a named pipe"):
        read(tmp_path)


def test_a_checkpoint_whose_state_is_a_named_pipe_is_left_out_with_the_reason(tmp_path):
    (tmp_path / "global_step2").mkdir()
    os.mkfifo(tmp_path / "global_step2" / "state.json")
    with within(10):
        found, (reason,) = newest_checkpoints(tmp_path)
    assert found == []
    assert "state.json: it is a named pipe" in reason


@pytest.mark.parametrize(
    "line", ["{", "[1]", "[" * 100_000, "\0", '{"kind": "train"}', '{"step": 1' + "0" * 5000 + "}"]
)
def test_lines_that_are_no_metrics_are_left_out_by_a_run_and_named_by_the_plot(run, line, capsys):
    pytest.importorskip("matplotlib")
    path = run / "metrics.jsonl"
    content = path.read_text()
    path.write_text(line + "\n" + content)
    assert plot([str(run)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{path}, line 1: no record" in error
    described(run, 3)
    assert path.read_text() == content


def test_steps_without_a_loss_are_left_out_of_the_plot(run):
    pytest.importorskip("matplotlib")
    folder = described(run, 3)
    folder.record("train", 4, loss=None)  # as it is made again from the log where it was infinite
    folder.record("eval", 4)
    assert plot([str(run)]) == 0
    assert (run / "curves.png").stat().st_size > 0
