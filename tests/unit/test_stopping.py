"""SIGTERM and the end of the launcher request that a run stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.distributed.ranks import REPOSITORY, environment_of_ranks, master_port
from zods.comm.stop_request import StopRequest

SCRIPT = REPOSITORY / "tests" / "distributed" / "scripts" / "stopping.py"
RUN = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen]:
    """Start a process in a session of its own, and kill the session at the end."""
    process = subprocess.Popen(
        command, env=environment_of_ranks(), start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(file: Path) -> str:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline, f"{file.name} did not appear"
        time.sleep(0.05)
    return file.read_text()


@pytest.mark.launched
def test_sigterm_requests_a_stop_and_a_second_one_changes_nothing(tmp_path: Path):
    with started(sys.executable, str(SCRIPT), str(tmp_path)) as process:
        wait_for(tmp_path / "listening")
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert wait_for(tmp_path / "reason") == "SIGTERM"
        assert process.wait(10) == 0


@pytest.mark.launched
def test_a_forked_process_still_ends_on_sigterm(tmp_path: Path):
    with started(sys.executable, str(SCRIPT), str(tmp_path)):
        assert json.loads(wait_for(tmp_path / "listening"))["child"] == -signal.SIGTERM


@pytest.mark.launched
def test_the_end_of_the_parent_requests_a_stop_and_the_end_of_a_grandparent_does_not(
    tmp_path: Path,
):
    with started(sys.executable, "-c", RUN, "-c", RUN, str(SCRIPT), str(tmp_path)) as grandparent:
        listening = json.loads(wait_for(tmp_path / "listening"))
        grandparent.kill()
        time.sleep(2)
        assert not (tmp_path / "reason").exists()
        os.kill(listening["parent"], signal.SIGKILL)
        assert wait_for(tmp_path / "reason") == "the launcher is gone"


@pytest.mark.launched
def test_the_end_of_the_deepspeed_command_asks_though_its_launch_py_goes_on(tmp_path: Path):
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    with master_port() as port:
        command = [
            deepspeed,
            "--num_gpus",
            "1",
            "--master_port",
            str(port),
            str(SCRIPT),
            str(tmp_path),
        ]
        with started(*command) as runner:
            launch_py = json.loads(wait_for(tmp_path / "listening"))["parent"]
            assert launch_py != runner.pid
            runner.kill()
            assert wait_for(tmp_path / "reason") == "the launcher is gone"
            os.kill(launch_py, 0)  # it is there


def test_the_first_reason_stays():
    stop = StopRequest()
    assert stop.reason is None
    stop.request("the budget is spent")
    stop.request("another")
    assert stop.reason == "the budget is spent"
