"""Every benchmark of the README runs at its smallest size and prints the promised JSON object."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import ENVIRONMENT
from tests.helpers import sampled

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "benchmarks"

# Keys: the commands of the README, without `python benchmarks/`. Values: the keys of the JSON
# object, and the keys of each of its rows.
SMOKE: dict[str, tuple[set[str], set[str]]] = {
    "step_time.py": (
        {"arguments", "kernels", "feeding"},
        {"method", "dtype", "evaluation", "ratio_to_floor", "step_s", "floor_s"},
    ),
    "frozen_blocks.py": ({"commit"}, {"run", "points", "ratio", "bound", "adapters_s", "whole_s"}),
    "zero3_step.py": (
        set(),
        {
            "ranks",
            "offload",
            "evaluation",
            "ratio_to_floor",
            "step_s",
            "gathered",
            "read",
            "written",
        },
    ),
    "kernel_speed.py": ({"backend", "float32", "bfloat16"}, set()),
    "selection.py --part speed": (set(), {"part", "n", "k", "library", "seconds", "objective"}),
    "selection.py --part scaling": (
        set(),
        {"part", "n", "ranks", "seconds", "peak_memory_gib", "selection_bytes_per_rank"},
    ),
    "selection.py --part quality": (
        set(),
        {"part", "features", "m", "agreement", "cost_forwards", "total_forwards"},
    ),
    "selection.py --part mixture": (set(), {"part", "choice", "relative_error"}),
    "selection.py --part training": (set(), {"part", "what"}),
    "selection.py --part recipes --seeds 5": (
        set(),
        {"part", "recipe", "arm", "seed", "steps", "seconds", "loss", "losses"},
    ),
    "quickstart.py": (
        {"mean_accuracy_gain"},
        {"method", "seed", "accuracy_before", "accuracy_after", "zods_bytes_per_step"},
    ),
    "sst2.py --model SMOLLM2 --data DATA/sst2": (
        {"model"},
        {"stage", "ranks", "dtype", "evaluation", "first_step_s", "step_s", "peak_memory_mib"},
    ),
    "tasks.py --model SMOLLM2 --data DATA": (
        {"commit", "arguments"},
        {
            *("task", "method", "seed", "steps", "batch", "forwards", "seconds"),
            *("accuracy_before", "accuracy_after", "train_loss"),
        },
    ),
    "planner.py": ({"commit"}, {"model", "how", "ranks", "planned_s", "step_s", "ratio"}),
    "startup.py": (
        {"examples", "model_bytes"},
        {"tokenised", "start_s", "data_s", "weights_s", "code_s", "share"},
    ),
    "methods.py --model SMOLLM2 --data DATA": (
        {"commit", "arguments"},
        {
            *("task", "method", "examples_per_direction", "lr", "tuned", "seed", "forwards"),
            *("seconds", "train_loss", "accuracy", "curve"),
        },
    ),
    "slow_link.py": (
        {"commit", "arguments"},
        {"hosts", "training", "delay_ms", "rate_mbit", "step_s", "delays", "sent", "received"},
    ),
    "replica_exchange.py": (
        {"commit"},
        {"replicas", "exchange_s", "leader_sends", "follower_sends", "socket_sent"},
    ),
    "scalar_exchange.py": (
        {"commit"},
        {"case", "number", "measured", "sends", "formula", "socket_sent", "exchange_s"},
    ),
    "gpu_check.py": ({"device"}, {"part", "passed"}),
    "training_memory.py": (
        {"commit", "arguments", "table", "largest_spread"},
        {"method", "batch", "length", "seed", "peak_bytes", "host_bytes", "process_bytes"},
    ),
    "selection_zero3.py": (
        {"commit", "arguments"},
        {
            *("training", "batch", "micro_batch", "peak_bytes", "peak_ratio"),
            *("step_s", "selection_s", "time_ratio", "times"),
        },
    ),
    "nvme_offload.py": (
        {"commit", "arguments"},
        {
            *("training", "capped", "seed", "outcome", "limit_bytes", "peak_bytes"),
            *("step_s", "read", "written", "losses"),
        },
    ),
    "anchor_memory.py": (
        set(),
        {"place", "parameters", "peak_rss_bytes", "added_bytes_per_parameter"},
    ),
    "variance.py": ({"commit"}, {"name", "part"}),
    "trajectory.py --part log": ({"log"}, set()),
    "trajectory.py --part whole replay": ({"whole", "replay"}, set()),
    "trajectory.py --part restart": ({"restart"}, set()),
    "faults.py": (
        {"commit"},
        {"cell", "fault", "kind", "struck", "exit_code", "outcome", "restarts", "identical"},
    ),
    "attack.py": (
        {"commit", "command"},
        {"attack", "outcome", "silent", "traceback", "passed", "seed", "seconds"},
    ),
}
DEFAULT = {"step_time.py", "kernel_speed.py", "trajectory.py --part log"}  # the others take minutes
# their figures are in benchmarks/results only
NOT_IN_THE_README = {"selection.py --part scaling"}


def readme_commands() -> set[str]:
    """The commands in the last column of the README's table of figures."""
    text = (REPOSITORY / "README.md").read_text()
    rows = re.findall(r"^\|.*\|([^|]*)\|$", text[text.index("## Figures") :], re.MULTILINE)
    quoted = {command for row in rows for command in re.findall(r"`([^`]+)`", row)}
    assert all(command.startswith("python benchmarks/") for command in quoted), (
        "each pair of backticks holds one whole command"
    )
    return {command.removeprefix("python benchmarks/") for command in quoted}


def test_every_command_of_the_readme_has_a_smoke_run():
    assert readme_commands() | NOT_IN_THE_README == set(SMOKE)


def test_every_benchmark_is_in_the_readme():
    scripts = {
        path.name for path in FOLDER.glob("*.py") if "add_smoke_option(parser)" in path.read_text()
    } | {"anchor_memory.py"}
    assert scripts == {command.split()[0] for command in readme_commands()}


@pytest.mark.parametrize(
    "command",
    sampled(SMOKE, DEFAULT),
)
def test_a_benchmark_runs_at_its_smallest_size_and_prints_the_promised_keys(
    command: str, tmp_path: Path
):
    script, *options = shlex.split(command)
    ended = subprocess.run(
        [sys.executable, FOLDER / script, *options, "--smoke"],
        cwd=tmp_path,
        # The path is that of a shell in which the environment is active: `deepspeed` is found
        # beside this Python.
        env={
            **os.environ,
            **ENVIRONMENT,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    report: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    keys, row_keys = SMOKE[command]
    assert set(report) >= keys | {"benchmark", "machine"}
    assert report["benchmark"] == script.removesuffix(".py")
    assert {"cpu", "threads", "torch", "deepspeed"} <= set(report["machine"])
    if row_keys:
        assert report["rows"]
        assert all(set(row) >= row_keys for row in report["rows"])
    if script == "faults.py":
        assert all(row["identical"] for row in report["rows"])
