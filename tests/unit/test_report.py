"""The report of runs: what its page holds, how large it is, and the folders that it refuses."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zods.cli.plots import running_mean, series
from zods.cli.run_folder import RunFolder
from zods.config.schema import parse_section
from zods.files import atomic_write
from zods.report.__main__ import main
from zods.report.bins import MOST_BINS, binned
from zods.report.panels import Curve, Panel, draw, panels
from zods.report.runs import read_run
from zods.trajectory.log import LogFile, Trajectory
from zods.trajectory.records import Header, Refresh, RunRecord, Step

pytest.importorskip("matplotlib")


def make_run(
    folder: Path,
    *,
    num_steps: int = 6,
    lr: float = 1e-3,
    finished: bool = True,
    arguments: dict[str, Any] | None = None,
    **values: Any,
) -> Path:
    """A run's folder, with an anchor refreshed every third step. values: of each line."""
    section = {"method": "mezo_svrg", "lr": lr}
    run = RunFolder(folder, rank=0, resume=False)
    run.describe(
        {"zeroth_order": section},
        arguments=arguments or {},
        seed=1,
        world_size=2,
        device="cpu",
        step=0,
        has_begun=False,
    )
    trajectory = Trajectory()
    trajectory.file = LogFile(folder / "trajectory.log")
    trajectory.add(Header("Model", ()))
    trajectory.add(RunRecord(0, parse_section(section), 8, 2))
    run.record("eval", 0, accuracy=0.5)
    for step in range(num_steps):
        if step % 3 == 0:
            trajectory.add(Refresh(step, lr, (3.0, 4.0)))
        trajectory.add(Step(step, 1.0, lr, (0.5, 0.25), (0, step + 1)))
        run.record("train", step + 1, **{"loss": 1.0, "lr": lr, "seconds": 0.5, **values})
    run.record("eval", num_steps, accuracy=0.75)
    if finished:
        run.record("summary", num_steps, peak_memory_bytes=[2**20, 3 * 2**20], advice="none")
    trajectory.wait()
    trajectory.file.close()
    return folder


def text_of(page: Path) -> str:
    """The page's text without its tags and images."""
    return re.sub(r"<[^>]*>", " ", page.read_text())


def test_a_page_holds_the_figures_of_the_run(tmp_path: Path):
    run = make_run(tmp_path / "run", skipped=True)
    assert main([str(run)]) == 0
    text = text_of(run / "report.html")
    for words in (
        r"held-out accuracy\s+0.5000 → 0.7500",
        r"anchor refreshes\s+2",
        r"skipped steps\s+6",
        r"of it steps with a refresh\s+1.0 s \(33%\)",
        r"peak memory of each rank\s+1, 3 MiB",
        r"state\s+finished",
    ):
        assert re.search(words, text), words


def test_several_runs_are_compared_by_the_settings_in_which_they_differ(tmp_path: Path):
    runs = [make_run(tmp_path / name, lr=lr) for name, lr in (("a", 1e-3), ("b", 2e-3))]
    assert main([*map(str, runs), "--out", str(tmp_path / "both.html")]) == 0
    text = text_of(tmp_path / "both.html")
    compared = text.partition("Settings that differ")[2].partition("Over the steps")[0]
    assert re.search(r"config.zeroth_order.lr\s+0.001\s+0.002", compared)
    assert "seed" not in compared
    assert [curve.label for curve in panels([read_run(run) for run in runs])[0].curves] == [
        "run 1",
        "run 2",
    ]


def test_runs_of_the_same_settings_have_no_table_of_differences(tmp_path: Path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    page = tmp_path / "both.html"
    assert main([*map(str, runs), "--out", str(page)]) == 0
    assert "Settings that differ" not in text_of(page)


def test_the_page_loads_nothing_and_escapes_what_files_hold(tmp_path: Path):
    hostile = "<script>alert(1)</script>\"'&"
    run = make_run(
        tmp_path / "<img src=x onerror=alert(1)>",
        arguments={hostile: hostile},
        sources={"$_{a": 2, "_b": 1, "<b>": 1},
    )
    assert main([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert not re.search(r"(?:src|href)=(?!\"data:)", re.sub(r"&lt;.*?&gt;", "", page))
    assert "default-src 'none'" in page


def test_the_plots_are_written_as_png(tmp_path: Path):
    run = make_run(tmp_path / "run")
    assert main([str(run), "--png", str(tmp_path / "plots")]) == 0
    found = sorted((tmp_path / "plots").iterdir())
    assert [path.name for path in found][:2] == ["01_training_loss.png", "02_held_out_accuracy.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found)


def test_a_spike_of_one_step_in_100_000_remains_in_the_bins():
    values = np.ones(100_000)
    values[54_321], values[77_777] = 50.0, -50.0
    bins = binned(np.arange(100_000.0), values, smooth=True)
    assert len(bins.steps) == MOST_BINS
    assert (bins.high.max(), bins.low.min()) == (50.0, -50.0)
    assert abs(bins.steps[bins.high.argmax()] - 54_321) <= 100_000 / MOST_BINS


@pytest.mark.parametrize("number", [0, 1, 7, MOST_BINS, MOST_BINS + 1, 3 * MOST_BINS - 1])
def test_every_value_is_in_one_bin(number: int):
    values = np.random.default_rng(number).normal(size=number)
    bins = binned(np.arange(float(number)), values, smooth=False)
    assert len(bins.mean) == min(number, MOST_BINS)
    if number:
        assert (bins.low.min(), bins.high.max()) == (values.min(), values.max())
        assert (bins.low <= bins.mean).all()
        assert (bins.mean <= bins.high).all()


def test_the_running_mean_is_that_of_20_values():
    values = np.random.default_rng(0).normal(size=50)
    expected = [values[max(0, i - 19) : i + 1].mean() for i in range(50)]
    assert np.allclose(running_mean(values), expected, rtol=0, atol=1e-12)
    values[3] = 1e17  # leaves no trace behind its window
    assert np.allclose(running_mean(values)[23:], expected[23:], rtol=0, atol=1e-12)


def test_values_that_are_no_finite_numbers_are_left_out():
    odd = [None, "1", True, float("nan"), float("inf"), 10**400, [1], 2.0]
    steps, values = series([{"step": k, "x": value} for k, value in enumerate(odd)], "x")
    assert (steps.tolist(), values.tolist()) == ([7.0], [2.0])


@pytest.mark.parametrize(
    "num_steps", [3 * MOST_BINS, pytest.param(100_000, marks=pytest.mark.slow)]
)
def test_a_page_of_a_long_run_is_smaller_than_5_mb(tmp_path: Path, num_steps: int):
    """The number of steps does not matter any more above MOST_BINS."""
    run = make_run(
        tmp_path / "run",
        num_steps=num_steps,
        projected_grad=1.0,
        rms=1.0,
        sources={"a": 1, "b": 3},
    )
    assert main([str(run)]) == 0
    assert (run / "report.html").stat().st_size < 5e6


def test_a_page_that_follows_a_run_reloads_itself_until_the_run_has_ended(tmp_path: Path):
    run = make_run(tmp_path / "run", finished=False)
    page = run / "report.html"
    ended: list[int] = []
    follower = threading.Thread(
        target=lambda: ended.append(main([str(run), "--follow", "--interval", "1"]))
    )
    follower.start()
    while not page.exists():
        assert follower.is_alive()
    assert 'http-equiv="refresh" content="1"' in page.read_text()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "summary", "step": 6}\n')
    follower.join()
    assert ended == [0]
    assert 'http-equiv="refresh"' not in page.read_text()


def test_a_line_that_the_run_is_writing_is_left_out(tmp_path: Path):
    run = make_run(tmp_path / "run", finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    with (run / "trajectory.log").open("a") as file:
        file.write("0123456789abcd")
    assert len(read_run(run).train) == 6


def test_a_run_without_a_step_has_a_page(tmp_path: Path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    (run / "trajectory.log").unlink()
    assert main([str(run)]) == 0
    assert "not finished" in text_of(run / "report.html")


def replace_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        with atomic_write(run / name) as temporary:
            temporary.write_text(text.replace(old, new, 1))

    return change


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "no folder of a run"),
    "no run.json": (lambda run: (run / "run.json").unlink(), "run.json: missing"),
    "half a run.json": (lambda run: (run / "run.json").write_text("{"), "run.json: not valid"),
    "a list": (lambda run: (run / "config.json").write_text("[]"), "expected {...}, found list"),
    "a damaged line": (replace_text("metrics.jsonl", '"kind"', '"kin'), "line 1: no record"),
    "no step": (replace_text("metrics.jsonl", '"step": 0', '"step": -1'), "line 1: no record"),
    "a damaged log": (replace_text("trajectory.log", '"lr":', '"lr" :'), "checksum is wrong"),
    "a future log": (replace_text("trajectory.log", '"header":1', '"header":2'), "line 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_cannot_be_read_gets_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = make_run(tmp_path / "run")
    damage, message = REFUSED[name]
    damage(run)
    assert main([str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("zods.report: error: ")
    assert message in line
    assert not (run / "report.html").exists()


def test_a_comparison_needs_the_name_of_its_file(tmp_path: Path, capsys):
    assert main([str(tmp_path), str(tmp_path)]) == 2
    assert "--out: needed with several runs" in capsys.readouterr().err


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "1e9x"])
def test_an_interval_is_a_number_of_seconds(interval: str, tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--interval", interval])
    assert "expected a number of seconds" in capsys.readouterr().err


@pytest.mark.parametrize("others", [1.0, -1.0])
def test_a_logarithmic_axis_has_plain_numbers(others: float):
    values = np.full(50, others)
    values[7] = 1e3
    drawn = draw(Panel("x", [Curve("", 0, 0, np.arange(50.0), values)]), "svg").decode()
    assert "100" in re.findall(r"<!-- (.*?) -->", drawn)
    assert "mathdefault" not in drawn


def test_the_counts_of_all_sources_stay_in_the_plot_of_the_largest(tmp_path: Path):
    run = make_run(tmp_path / "run", sources={f"source {k:02}": k + 1 for k in range(20)})
    (panel,) = [p for p in panels([read_run(run)]) if p.title == "chosen examples by source"]
    assert panel.curves[-1].label == "13 others"
    assert np.allclose(sum(curve.values for curve in panel.curves), 1.0)


def test_metrics_of_a_run_are_json(tmp_path: Path):
    run = make_run(tmp_path / "run", loss=float("nan"))
    assert json.loads((run / "config.json").read_text())
    assert panels([read_run(run)])[0].title == "held-out accuracy"
