"""Check the hosts of a hostfile before ranks are started there.

    python -m zods.cli.hosts HOSTFILE [--cwd FOLDER]

DeepSpeed runs on this host alone where the hostfile does not exist, and an unreachable host or
another version shows itself late, or as a hang. This command asks every host over ssh, as
DeepSpeed's launcher does, for its versions of the packages that compute and for the digest of
zods's files. It prints the name of the first host, which has rank 0. Called by launch/deepspeed.sh.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import shlex
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zods.comm.package_digest import package_digest

PACKAGES = ("torch", "deepspeed", "transformers")
SECONDS = 60  # for the answer of a host
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


def read_hostfile(path: Path) -> dict[str, int]:
    """The slots of each host. Raises FileNotFoundError, or ValueError where a line is wrong."""
    if not path.is_file():
        raise FileNotFoundError(
            f'--hostfile {path}: no such file. Give a file with a line "NAME slots=N" per host.'
        )
    found: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        matched = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if matched is None:
            raise ValueError(f'{path}, line {number}: found {text!r}, expected "NAME slots=N".')
        if matched[1] in found:
            raise ValueError(f"{path}, line {number}: {matched[1]} is given twice.")
        found[matched[1]] = int(matched[2])
    if not found:
        raise ValueError(f'{path}: has no host. Give a line "NAME slots=N" per host.')
    return found


def description() -> dict[str, str]:
    """The versions on this host, without importing the packages."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return {**versions, "zods's files": package_digest()}


def described(host: str, cwd: Path) -> dict[str, str]:
    """The versions on another host. Raises OSError, naming the host, where it does not answer."""
    python = f"{shlex.quote(sys.executable)} -m zods.cli.hosts --describe"
    command = f"cd {shlex.quote(str(cwd))} && PYTHONPATH={shlex.quote(str(cwd))} {python}"
    try:
        done = subprocess.run(
            [*SSH, host, command], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"{host}: no answer within {SECONDS} s over ssh.") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise OSError(
            f"{host}: {' '.join(said) or 'ssh failed'}. It must be reachable by ssh without a "
            f"password, and have {sys.executable} and {cwd}."
        )
    return json.loads(done.stdout.splitlines()[-1])


def mistakes(hosts: list[str], cwd: Path) -> list[str]:
    """A message for each host that does not answer or differs from the first."""

    def ask(host: str) -> dict[str, str] | str:
        try:
            return described(host, cwd)
        except (OSError, ValueError) as error:
            return str(error)

    with ThreadPoolExecutor(min(len(hosts), 64)) as pool:
        answers = dict(zip(hosts, pool.map(ask, hosts), strict=True))
    found = [answer for answer in answers.values() if isinstance(answer, str)]
    known = {host: answer for host, answer in answers.items() if isinstance(answer, dict)}
    for host, answer in known.items():
        first, expected = next(iter(known.items()))
        found += [
            f"{host}: {name} is {value}, but {expected.get(name)} on {first}. Install the same."
            for name, value in answer.items()
            if value != expected.get(name)
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("hostfile", type=Path, nargs="?")
    parser.add_argument("--cwd", type=Path, default=Path.cwd(), help="folder of the ranks")
    parser.add_argument("--describe", action="store_true", help="print this host's versions")
    arguments = parser.parse_args()
    if arguments.describe:
        print(json.dumps(description()))
        return 0
    if arguments.hostfile is None:
        parser.error("give a hostfile")
    try:
        hosts = list(read_hostfile(arguments.hostfile))
    except (OSError, ValueError) as error:
        print(f"zods: error: {error}", file=sys.stderr)
        return 2
    here = {"localhost", "127.0.0.1", socket.gethostname()}
    found = [] if {*hosts} <= here else mistakes(hosts, arguments.cwd)
    for message in found:
        print(f"zods: error: {message}", file=sys.stderr)
    if not found:
        print(hosts[0])
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
