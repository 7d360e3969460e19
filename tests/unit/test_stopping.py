"""SIGTERM and the end of the launcher request that a run stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.distributed.ranks import REPOSITORY, environment_of_ranks, master_port
from zods.comm import process
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


def deepspeed(port: int, *arguments: str) -> list[str]:
    """The command that starts one rank."""
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_gpus", "1", "--master_port", str(port), *arguments]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(process: int, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while is_alive(process):
        assert time.monotonic() < deadline, f"process {process} has not ended"
        time.sleep(0.05)


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
def test_the_end_of_the_deepspeed_command_requests_a_stop_while_launch_py_runs(tmp_path: Path):
    with master_port() as port, started(*deepspeed(port, str(SCRIPT), str(tmp_path))) as runner:
        launch_py = json.loads(wait_for(tmp_path / "listening"))["parent"]
        assert launch_py != runner.pid
        runner.kill()
        assert wait_for(tmp_path / "reason") == "the launcher is gone"
        os.kill(launch_py, 0)  # raises ProcessLookupError where the process has ended


@pytest.mark.launched
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_rank_ends_whose_deepspeed_command_ended_while_the_rank_imported(tmp_path, number):
    with (
        master_port() as port,
        started(*deepspeed(port, str(SCRIPT), str(tmp_path), "starting")) as runner,
    ):
        rank = json.loads(wait_for(tmp_path / "importing"))["pid"]
        runner.send_signal(number)
        runner.wait()
        (tmp_path / "imported").touch()
        wait_for_end(rank)


@pytest.mark.launched
@pytest.mark.parametrize("killed", ["runner", "launch.py"])
def test_a_rank_ends_whose_launcher_was_killed_before_the_rank_ran_python(tmp_path, killed):
    """launch.py starts a shell, which runs Python in its place after the kill."""
    (tmp_path / "imported").touch()
    shell = tmp_path / "rank.sh"
    shell.write_text(
        f"#!/bin/sh\necho $$ $PPID >{tmp_path}/t; mv {tmp_path}/t {tmp_path}/forked\n"
        f"while ! [ -e {tmp_path}/killed ]; do sleep 0.1; done\n"
        f"exec {sys.executable} {SCRIPT} {tmp_path} starting\n"
    )
    shell.chmod(0o755)
    with master_port() as port, started(*deepspeed(port, "--no_python", str(shell))) as runner:
        rank, launch_py = map(int, wait_for(tmp_path / "forked").split())
        os.kill(runner.pid if killed == "runner" else launch_py, signal.SIGKILL)
        runner.wait()
        (tmp_path / "killed").touch()
        wait_for(tmp_path / "importing")
        wait_for_end(rank)


@pytest.mark.launched
def test_a_deepspeed_command_goes_on_when_the_shell_that_started_it_ends(tmp_path):
    with master_port() as port:
        command = " ".join(deepspeed(port, str(SCRIPT), str(tmp_path), "starting"))
        with started("sh", "-c", f"{command} & sleep 1") as shell:
            assert shell.wait() == 0
            rank = json.loads(wait_for(tmp_path / "importing"))["pid"]
            (tmp_path / "imported").touch()
            wait_for(tmp_path / "guarding")
            time.sleep(2)
            assert is_alive(rank)


@pytest.mark.launched
def test_a_process_that_no_launcher_started_goes_on_as_an_orphan(tmp_path):
    (tmp_path / "imported").touch()
    with started("sh", "-c", f"sleep 1; {sys.executable} {SCRIPT} {tmp_path} starting &"):
        rank = json.loads(wait_for(tmp_path / "importing"))
        assert rank["parent"] != os.getpid()
        wait_for(tmp_path / "guarding")
        time.sleep(2)
        assert is_alive(rank["pid"])


def test_the_first_reason_is_kept():
    stop = StopRequest()
    assert stop.reason is None
    stop.request("the budget is spent")
    stop.request("another")
    assert stop.reason == "the budget is spent"


@pytest.mark.parametrize("codes", [(75, 1), (1, 75), (1, 75, 2)])
def test_the_status_to_be_continued_is_kept(monkeypatch, tmp_path, codes):
    monkeypatch.setenv("ZODS_EXIT_FILE", str(tmp_path / "status"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(process, "_status_is_written", threading.Lock())
    for code in codes:
        process.write_exit_status(code)
    assert (tmp_path / "status").read_text() == "75\n"
