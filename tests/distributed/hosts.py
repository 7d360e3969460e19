"""Several hosts on this machine, for tests of launchers: network namespaces joined by a bridge.

Each host has its own network, hostname, processes, /dev/shm and sshd; the files are shared. It needs
root, and the commands COMMANDS.
"""

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

from tests.distributed.ranks import LIMIT, REPOSITORY, environment_of_ranks

COMMANDS = ("ip", "unshare", "nsenter", "sshd", "ssh-keygen", "pdsh")
SSHD = """\
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/ssh/authorized_keys
PidFile none
UsePAM no
StrictModes no
MaxStartups 100
PermitRootLogin yes
PermitUserEnvironment no
"""
CLIENT = """\
Host *
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  IdentityFile {folder}/ssh/id
"""


# launch/setup.sh puts sshd into .venv where the machine has none
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin:{REPOSITORY}/.venv/openssh/usr/sbin"


STARTS_WITHIN = 20.0  # seconds, a host


class Unavailable(Exception):
    """This machine cannot have such hosts."""


def lacking() -> str | None:
    """Why this machine cannot have such hosts, or None."""
    if os.geteuid() != 0:
        return "several hosts on one machine need root, for network namespaces"
    missing = [name for name in COMMANDS if shutil.which(name, path=PATH) is None]
    if missing:
        return (
            f"several hosts need {', '.join(missing)}: apt-get install iproute2 openssh-server pdsh"
        )
    sshd = subprocess.run(
        [str(shutil.which("sshd", path=PATH)), "-V"], capture_output=True, text=True, check=False
    )
    if sshd.returncode == 127:  # a library of it is missing
        return f"several hosts need sshd, which does not start here: {sshd.stderr.strip()}"
    probe = subprocess.run(
        ["unshare", "-n", "-m", "-p", "-f", "--mount-proc", "true"],
        capture_output=True,
        check=False,
    )
    return None if probe.returncode == 0 else f"no namespaces here: {probe.stderr.decode().strip()}"


class Hosts:
    """Running hosts, by number from 1. names: their names. folder: files that they share."""

    def __init__(self, count: int, folder: Path) -> None:
        self.folder, self._tag = folder, f"z{os.getpid() % 100_000}"
        self.names = [f"node{k}" for k in range(1, count + 1)]
        self._processes: list[subprocess.Popen] = []

    def start(self) -> None:
        """Raises Unavailable where sshd cannot serve here."""
        self._write_files()
        self._ip(*(f"netns add {self._namespace(k + 1)}" for k in range(len(self.names))))
        self._join()
        for number in range(1, len(self.names) + 1):
            self._start(number)

    def _namespace(self, number: int) -> str:
        return f"{self._tag}h{number}"

    def _join(self) -> None:
        """Give each host a network interface eth0, joined with the others' by a bridge."""
        self._ip(f"netns add {self._tag}s", f"-n {self._tag}s link add br0 type bridge")
        self._ip(f"-n {self._tag}s link set br0 up")
        for number in range(1, len(self.names) + 1):
            name, outer = self._namespace(number), f"{self._tag}v{number}"
            self._ip(
                f"link add {outer} type veth peer name eth0 netns {name}",
                f"link set {outer} netns {self._tag}s",
                f"-n {self._tag}s link set {outer} master br0",
                f"-n {self._tag}s link set {outer} up",
            )

    def _write_files(self) -> None:
        (self.folder / "ssh").mkdir(parents=True)
        for key in ("host_key", "ssh/id"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)]
            subprocess.run(command, check=True)
        shutil.copy(self.folder / "ssh/id.pub", self.folder / "ssh/authorized_keys")
        (self.folder / "ssh/config").write_text(CLIENT.format(folder=self.folder))
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        lines = [f"10.77.0.{k} {name}" for k, name in enumerate(self.names, 1)]
        users = Path("/etc/passwd").read_text()
        if "\nsshd:" not in users:
            users += "sshd:x:999:65534::/run/sshd:/usr/sbin/nologin\n"
        (self.folder / "passwd").write_text(users)
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(lines) + "\n")

    @staticmethod
    def _ip(*commands: str) -> None:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True)

    def _start(self, number: int) -> None:
        name = self._namespace(number)
        self._ip(
            f"-n {name} addr add 10.77.0.{number}/24 dev eth0",
            f"-n {name} link set eth0 up",
            f"-n {name} link set lo up",
        )
        inside = (
            f"hostname {self.names[number - 1]}; mount --bind {self.folder}/hosts /etc/hosts; "
            f"mkdir -p /root/.ssh /run/sshd; mount --bind {self.folder}/ssh /root/.ssh; "
            "mount -t tmpfs tmpfs /dev/shm; "
            f"mount --bind {self.folder}/passwd /etc/passwd; "
            f"exec {shutil.which('sshd', path=PATH)} -D -f {self.folder}/sshd_config"
        )
        unshare = ["unshare", "-muipf", "--mount-proc", "--kill-child", "bash", "-c", inside]
        self._processes.append(
            subprocess.Popen(["ip", "netns", "exec", name, *unshare], start_new_session=True)
        )
        deadline = time.monotonic() + STARTS_WITHIN
        while (answer := self.run(number, ["ssh", self.names[number - 1], "true"]))[0]:
            if time.monotonic() > deadline:
                raise Unavailable(f"sshd does not serve on a host of the test: {answer[1].strip()}")
            time.sleep(0.2)

    def _first_process(self, number: int) -> int:
        """The host's process 1, by its number on this machine."""
        deadline = time.monotonic() + STARTS_WITHIN
        parent = self._processes[number - 1].pid
        while time.monotonic() < deadline:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            if children:
                return int(children[0])
            time.sleep(0.05)
        raise TimeoutError("the host's first process did not start")

    def cut_off(self, number: int) -> None:
        """Take the host's link down."""
        self._ip(f"-n {self._tag}s link set {self._tag}v{number} down")

    def connect(self, number: int) -> None:
        """Bring the host's link up again."""
        self._ip(f"-n {self._tag}s link set {self._tag}v{number} up")

    def traffic(self, number: int) -> tuple[int, int]:
        """The bytes that the host has (received, sent), headers included."""
        command = ["ip", "-n", self._namespace(number), "-s", "-j", "link", "show", "eth0"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)[0]
        return found["stats64"]["rx"]["bytes"], found["stats64"]["tx"]["bytes"]

    def popen(
        self, number: int, command: list[str], output: Any = subprocess.PIPE, **variables: str
    ) -> subprocess.Popen:
        """Start a command on a host, in the repository's folder, with the environment of ranks."""
        here = ["nsenter", "-t", str(self._first_process(number)), "-m", "-u", "-i", "-n", "-p"]
        environment = environment_of_ranks(
            PATH=f"{Path(sys.executable).parent}:{PATH}", **variables
        )
        return subprocess.Popen(
            [*here, f"--wd={REPOSITORY}", *command],
            env=environment,
            text=True,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, number: int, command: list[str], **variables: str) -> tuple[int, str]:
        """Run a command on a host: (exit status, output). It fails after LIMIT seconds."""
        process = self.popen(number, command, **variables)
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"{' '.join(command)} still ran after {LIMIT} s:\n{output[-4000:]}")
        return process.returncode, output

    def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in (f"{self._tag}s", *(self._namespace(k + 1) for k in range(len(self.names)))):
            if Path("/run/netns", name).exists():
                subprocess.run(["ip", "netns", "delete", name], check=False)


@contextlib.contextmanager
def hosts(count: int, folder: Path) -> Iterator[Hosts]:
    """So many hosts. The test is skipped where this machine cannot have them."""
    reason = lacking()
    if reason is not None:
        pytest.skip(reason)
    made = Hosts(count, folder)
    try:
        try:
            made.start()
        except Unavailable as error:
            pytest.skip(str(error))
        yield made
    finally:
        made.close()


def by_mpirun(two: Hosts, options: list[str]) -> tuple[int, str]:
    """Start zods.finetune with a rank on each of two hosts: (exit status, output)."""
    command = ["bash", "launch/mpirun.sh", "--allow-run-as-root", "-n", "2"]
    command += ["--host", "node1,node2", "--", *options]
    return two.run(1, command, ZODS_INTERFACE="eth0")
