"""launch/slurm.sbatch under a real Slurm on two hosts in network namespaces."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.command_line import (
    LAUNCHED,
    LAUNCHED_STEPS,
    launched_options,
    outcome,
    write_inputs,
)
from tests.distributed.hosts import PATH, Hosts, hosts
from tests.distributed.ranks import LIMIT, REPOSITORY, master_port, run_command
from zods.trajectory.log import read_log

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
ENDLESS = 10**6
# /dev/shm is each host's own
SLURM = """\
ClusterName=tests
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/dev/shm/munge.sock
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
TmpFS={folder}/spool.%n
ReturnToService=2
NodeName=node[1-2] CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A Slurm with a controller on the first host and a node on each."""

    def __init__(self, two: Hosts) -> None:
        self._two, self._folder = two, two.folder / "slurm"
        (self._folder / "state").mkdir(parents=True)
        (self._folder / "key").write_bytes(bytes(range(128)))
        (self._folder / "key").chmod(0o400)
        (self._folder / "slurm.conf").write_text(SLURM.format(folder=self._folder))
        (self._folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def start(self) -> None:
        for host in (1, 2):
            self._daemon(
                host,
                *("munged", "--force", f"--key-file={self._folder}/key"),
                *("--socket=/dev/shm/munge.sock", "--pid-file=/dev/shm/munge.pid"),
                *(f"--log-file={self._folder}/munge{host}.log", "--seed-file=/dev/shm/munge.seed"),
            )
        self._daemon(1, "slurmctld")
        for host in (1, 2):
            self._daemon(host, "slurmd", "-N", f"node{host}")
        deadline = time.monotonic() + 60
        while (seen := self.run("sinfo", "-h", "-o", "%T %D"))[1].split() != ["idle", "2"]:
            assert time.monotonic() < deadline, seen
            time.sleep(0.5)

    def _daemon(self, host: int, *command: str) -> None:
        code, output = self._two.run(host, list(command), SLURM_CONF=f"{self._folder}/slurm.conf")
        assert code == 0, output

    def run(self, *command: str) -> tuple[int, str]:
        """Run a command of Slurm on the first host: (exit status, output)."""
        return self._two.run(1, list(command), SLURM_CONF=f"{self._folder}/slurm.conf")

    def submit(self, output: Path, options: list[str]) -> str:
        """Submit the script with a task on each node. Returns the job's number."""
        code, said = self._two.run(
            1,
            [
                *("sbatch", "--parsable", "--nodes", "2", "--ntasks-per-node", "1"),
                *("--output", str(output), "launch/slurm.sbatch", "--", *options),
            ],
            SLURM_CONF=f"{self._folder}/slurm.conf",
            ZODS_INTERFACE="eth0",
        )
        assert code == 0, said
        return said.strip()

    def status(self, job: str) -> int:
        """Wait for the end of a job. Returns its exit status."""
        deadline = time.monotonic() + LIMIT
        while True:
            _, said = self.run("scontrol", "show", "job", job)
            if not re.search(r"JobState=(PENDING|CONFIGURING|RUNNING|COMPLETING)", said):
                return int(re.search(r"ExitCode=(\d+):", said)[1])  # type: ignore[index]
            assert time.monotonic() < deadline, said
            time.sleep(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("job")
    write_inputs(made, LAUNCHED)
    return made


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    missing = [name for name in COMMANDS if shutil.which(name, path=PATH) is None]
    if missing:
        pytest.skip(f"Slurm needs {', '.join(missing)}: apt-get install slurm-wlm munge")
    with hosts(2, tmp_path_factory.mktemp("hosts") / "shared") as two:
        made = Slurm(two)
        made.start()
        yield made


def test_a_job_of_slurm_on_two_nodes_ends_with_the_bits_of_torchrun_on_one_host(slurm, folder):
    said = folder / "slurm.out"
    status = slurm.status(slurm.submit(said, launched_options(folder, "slurm")))
    assert status == 0, said.read_text()[-4000:]
    with master_port() as port:
        command = ["bash", str(REPOSITORY / "launch" / "torchrun.sh"), "--nproc_per_node", "2"]
        command += ["--master_port", str(port), "--"]
        command += launched_options(folder, "torchrun")
        code, output = run_command(command, REPOSITORY)
    assert code == 0, output[-4000:]
    by_slurm, by_torchrun = (outcome(folder / name) for name in ("slurm", "torchrun"))
    assert by_slurm == by_torchrun
    assert by_slurm.steps == LAUNCHED_STEPS


def test_a_job_that_slurm_stops_has_the_status_to_be_continued_and_continues(slurm, folder):
    said = folder / "stopped.out"
    number = slurm.submit(said, launched_options(folder, "stopped", max_steps=ENDLESS))
    metrics = folder / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert time.monotonic() < deadline, said.read_text()[-4000:]
        time.sleep(0.2)
    assert slurm.run("scancel", "--signal=TERM", number)[0] == 0
    assert slurm.status(number) == 75, said.read_text()[-4000:]
    made = read_log(folder / "stopped" / "trajectory.log").num_steps
    said = folder / "continued.out"
    options = launched_options(folder, "stopped", max_steps=made + 5, resume="auto")
    status = slurm.status(slurm.submit(said, options))
    assert status == 0, said.read_text()[-4000:]
    assert read_log(folder / "stopped" / "trajectory.log").num_steps == made + 5


def test_a_job_with_a_mistake_fails(slurm, folder):
    said = folder / "mistake.out"
    status = slurm.status(slurm.submit(said, launched_options(folder, "mistake", max_steps=-1)))
    assert status not in (0, 75)
    assert "max_steps" in said.read_text()
