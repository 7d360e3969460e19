"""The launchers in launch/: one job by each of them, on one host and on two; their exit statuses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from tests.distributed.command_line import (
    LAUNCHED,
    LAUNCHED_STEPS,
    Outcome,
    launched_options,
    outcome,
    write_inputs,
)
from tests.distributed.hosts import Hosts, by_mpirun, hosts
from tests.distributed.ranks import (
    LIMIT,
    REPOSITORY,
    environment_of_ranks,
    master_port,
    run_command,
    run_ranks,
)
from zods.comm.communicator import Communicator
from zods.comm.process import connect_ranks
from zods.trajectory.log import read_log

LAUNCH = REPOSITORY / "launch"
ENDLESS = 10**6  # steps of a job that is interrupted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("job")
    write_inputs(made, LAUNCHED)
    return made


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(2, tmp_path_factory.mktemp("hosts") / "shared") as started:
        (started.folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1  # the second\n")
        yield started


def ended(folder: Path, output: str) -> Outcome:
    found = outcome(folder / output)
    assert found.steps == LAUNCHED_STEPS
    return found


def by_torchrun(folder: Path, ranks: int, output: str, **options: Any) -> Outcome:
    """What `torchrun` with some ranks on one host ends with."""
    with master_port() as port:
        command = ["bash", str(LAUNCH / "torchrun.sh"), "--nproc_per_node", str(ranks)]
        command += ["--master_port", str(port), "--"]
        command += launched_options(folder, output, **options)
        code, said = run_command(command, REPOSITORY)
    assert code == 0, said[-4000:]
    return outcome(folder / output)


@pytest.fixture(scope="module")
def on_one_host(folder: Path) -> Outcome:
    found = by_torchrun(folder, 2, "torchrun2")
    assert found.steps == LAUNCHED_STEPS
    return found


def by_hostfile(some: Hosts, folder: Path, output: str) -> Outcome:
    command = ["bash", "launch/deepspeed.sh", "--hostfile", str(some.folder / "hostfile"), "--"]
    code, said = some.run(1, [*command, *launched_options(folder, output)], ZODS_INTERFACE="eth0")
    assert code == 0, said[-4000:]
    assert "node2: " in said
    return ended(folder, output)


def time_of_build() -> int:
    """When DeepSpeed's communication operator for CPUs, which every rank loads, was built."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return (Path(root) / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").stat().st_mtime_ns


def test_deepspeed_on_the_hosts_of_a_hostfile_ends_with_the_bits_of_one_host(
    two, folder, on_one_host
):
    """Nothing is compiled again: another ninja in the PATH of a login would do that."""
    before = time_of_build()
    assert by_hostfile(two, folder, "hostfile") == on_one_host
    assert time_of_build() == before


def rank_with_the_path_of_a_login() -> str | None:
    os.environ["PATH"] = os.defpath
    connect_ranks()
    return shutil.which("ninja")


def test_a_rank_with_the_path_of_a_login_finds_the_ninja_of_its_environment():
    own = Path(sys.executable).with_name("ninja")
    assert run_ranks(1, rank_with_the_path_of_a_login) == [str(own)]


@pytest.mark.slow
def test_four_hosts_end_with_the_bits_of_one_host(folder, tmp_path):
    with hosts(4, tmp_path / "shared") as four:
        names = (f"node{number}" for number in range(1, 5))
        (four.folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in names))
        assert by_hostfile(four, folder, "four") == by_torchrun(folder, 4, "torchrun4")


@pytest.mark.parametrize("channel", ["mpi", pytest.param("torch", marks=pytest.mark.slow)])
def test_mpirun_on_two_hosts_ends_with_the_bits_of_one_host(channel, two, folder, on_one_host):
    """The ranks' scalars travel through MPI, or through torch.distributed, the default."""
    section = {**LAUNCHED["zeroth_order"], **({"comm": "mpi"} if channel == "mpi" else {})}
    (folder / "mpi.json").write_text(json.dumps({**LAUNCHED, "zeroth_order": section}))
    options = launched_options(folder, channel, deepspeed_config=folder / "mpi.json")
    code, said = by_mpirun(two, options)
    assert code == 0, said[-4000:]
    assert ended(folder, channel) == on_one_host


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("numactl") is None, reason="--bind_cores_to_rank needs numactl")
def test_ranks_that_are_bound_to_cores_end_with_the_same_bits(folder, on_one_host):
    with master_port() as port:
        command = ["bash", str(LAUNCH / "deepspeed.sh"), "--num_gpus", "2", "--bind_cores_to_rank"]
        command += ["--master_port", str(port), "--", *launched_options(folder, "bound")]
        code, output = run_command(command, REPOSITORY)
    assert code == 0, output[-4000:]
    assert "numactl" in output
    assert ended(folder, "bound") == on_one_host


def rank_without_mpirun() -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        Communicator(torch.device("cpu")).use_mpi()
    return str(caught.value)


def test_mpi_for_ranks_that_mpirun_did_not_start_is_refused():
    for said in run_ranks(2, rank_without_mpirun):
        assert (
            'zeroth_order.comm: "mpi", but MPI has 1 ranks and torch 2. Start the ranks by' in said
        )


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "no such file"),
        ("node1 slots=two\n", "line 1: found 'node1 slots=two', expected \"NAME slots=N\""),
        ("node1 slots=1\nnode1 slots=1\n", "line 2: node1 is given twice"),
        ("# nothing\n", "has no host"),
        ("node1 slots=1\nnode7 slots=1\n", "node7: ssh: Could not resolve hostname node7"),
    ],
)
def test_a_wrong_hostfile_or_host_is_named_before_anything_is_started(two, folder, lines, said):
    wrong = two.folder / "wrong"
    wrong.unlink(missing_ok=True)
    if lines is not None:
        wrong.write_text(lines)
    command = ["bash", "launch/deepspeed.sh", "--hostfile", str(wrong), "--"]
    code, output = two.run(1, [*command, *launched_options(folder, "never")])
    assert code == 2
    assert said in output
    assert not (folder / "never").exists()


def test_a_host_that_is_cut_off_is_named_before_anything_is_started(two, folder):
    two.cut_off(2)
    try:
        command = ["bash", "launch/deepspeed.sh", "--hostfile", str(two.folder / "hostfile"), "--"]
        code, output = two.run(1, [*command, *launched_options(folder, "never")])
    finally:
        two.connect(2)
    assert code == 2
    assert "node2: ssh: connect to host node2" in output
    assert not (folder / "never").exists()


# --- a link that breaks ------------------------------------------------------------------------------

CUT_STEPS = 200  # that take longer than it takes to notice the third
HANG = 5.0  # seconds
ENDS_WITHIN = HANG + 30.0  # seconds: the roll call, and what a busy machine adds
GIVEN_UP_WITHIN = 180.0  # seconds: ssh gives a silent host up after 120


def ranks_of(run: Path) -> list[int]:
    """The processes of a run's ranks, on all hosts."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            words = path.read_text(errors="replace").split("\0")
            if "zods.finetune" in words and str(run) in words and "--local_rank=0" in words:
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_a_link_cut_during_a_run_ends_every_rank_and_the_resumed_run_has_the_same_bits(two, folder):
    """The launcher and rank 0 are on node1; node2 is cut off, and stays so until the launcher ends."""
    section = {**LAUNCHED["zeroth_order"], "hang_timeout": HANG}
    (folder / "hang.json").write_text(json.dumps({**LAUNCHED, "zeroth_order": section}))
    options = {"max_steps": CUT_STEPS, "deepspeed_config": folder / "hang.json"}
    undisturbed = by_torchrun(folder, 2, "uncut", **options)
    launcher = ["bash", "launch/deepspeed.sh", "--hostfile", str(two.folder / "hostfile"), "--"]
    run, log = folder / "cut", folder / "cut.out"
    command = [*launcher, *launched_options(folder, "cut", **options)]
    with log.open("w") as said:
        process = two.popen(1, command, said, ZODS_INTERFACE="eth0")
    try:
        waits_for_step(process, run, log, 3)
        assert len(ranks_of(run)) == 2
        two.cut_off(2)
        cut_at = time.monotonic()
        while left := ranks_of(run):
            assert time.monotonic() < cut_at + ENDS_WITHIN, (left, log.read_text()[-4000:])
            time.sleep(0.2)
        assert process.wait(GIVEN_UP_WITHIN) == 75, log.read_text()[-4000:]
    finally:
        two.connect(2)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert log.read_text().count("zods: rank 1 does not answer") == 1
    made = read_log(run / "trajectory.log").num_steps
    assert made == (run / "metrics.jsonl").read_text().count('"train"') < CUT_STEPS

    command = [*launcher, *launched_options(folder, "cut", resume="auto", **options)]
    code, output = two.run(1, command, ZODS_INTERFACE="eth0")
    assert code == 0, output[-4000:]
    assert outcome(run) == undisturbed


# --- exit statuses ------------------------------------------------------------------------------------


def waits_for_step(process: subprocess.Popen, run: Path, log: Path, step: int) -> None:
    """Wait until a run has made so many steps. log: what its launcher prints."""
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT
    while not metrics.exists() or metrics.read_text().count('"train"') < step:
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        assert process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.1)


def started(folder: Path, output: str, launcher: list[str]) -> tuple[subprocess.Popen, Path]:
    """A run that has made a step: (its launcher's script, what it prints)."""
    log = folder / f"{output}.out"
    process = subprocess.Popen(
        ["bash", *launcher, "--", *launched_options(folder, output, max_steps=ENDLESS)],
        cwd=REPOSITORY,
        env=environment_of_ranks(),
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    waits_for_step(process, folder / output, log, 1)
    return process, log


@pytest.mark.slow
def test_a_run_under_torchrun_that_is_stopped_returns_the_status_to_be_continued(folder):
    with master_port() as port:
        launcher = [str(LAUNCH / "torchrun.sh"), "--nproc_per_node", "2"]
        process, log = started(folder, "stopped", [*launcher, "--master_port", str(port)])
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(LIMIT) == 75, log.read_text()[-4000:]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert "--resume auto" in log.read_text()


@pytest.mark.slow
def test_a_run_whose_launcher_was_killed_does_not_count_as_finished(folder):
    with master_port() as port:
        launcher = [str(LAUNCH / "deepspeed.sh"), "--num_gpus", "2", "--master_port", str(port)]
        process, log = started(folder, "killed", launcher)
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            command = path.read_text(errors="replace") if path.exists() else ""
            if "deepspeed.launcher.launch" in command and str(folder / "killed") in command:
                os.kill(int(path.parent.name), signal.SIGKILL)
        try:
            assert process.wait(LIMIT) not in (0,), log.read_text()[-4000:]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def test_a_mistake_in_the_options_has_a_status_of_its_own(folder):
    command = ["bash", str(LAUNCH / "torchrun.sh"), "--nproc_per_node", "1", "--"]
    code, output = run_command(
        [*command, *launched_options(folder, "wrong", max_steps=-1)], REPOSITORY
    )
    assert code == 2, output[-4000:]


@pytest.mark.parametrize("name", ["deepspeed.sh", "mpirun.sh", "torchrun.sh"])
def test_a_launcher_without_options_prints_its_usage(name):
    code, output = run_command(["bash", str(LAUNCH / name), "--num_gpus", "1"], REPOSITORY)
    assert code == 2
    assert f"Usage: {name}" in output
