"""The lock file `launch/lock.txt`: the packages of constraints.txt, with the hashes of their files.

    python launch/lock.py write            after a change of constraints.txt or pyproject.toml; needs uv
    python launch/lock.py select EXTRAS    prints the part for these extras, such as report,lora

`launch/setup.sh` installs what `select` prints, by `pip install --require-hashes --no-deps`. torch
is not in the lock file: an index for CPUs and one for GPUs serve different files of one version,
and the latter need packages of CUDA. Nor are packages that only they, or other systems, need.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "launch" / "lock.txt"
LEFT_OUT = re.compile(r"(nvidia-|cuda-|triton==|torch==|.*sys_platform == '(win32|emscripten)')")
COMMAND = (
    *("uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-header"),
    *("--annotation-style", "line", "--python-version", "3.11", "--all-extras"),
    *("--constraints", "constraints.txt", "pyproject.toml"),
)


def blocks(text: str) -> list[str]:
    """The lines of each package: its version, the hashes, and which packages need it."""
    return [
        block for block in re.split(r"^(?=\w)", text, flags=re.MULTILINE) if block[:1].isalnum()
    ]


def write() -> None:
    found = subprocess.run(COMMAND, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    kept = [block for block in blocks(found.stdout) if not LEFT_OUT.match(block)]
    LOCK.write_text("# Made by launch/lock.py, which says what it is for.\n" + "".join(kept))


def name_of(requirement: str) -> str:
    """The name at the start of a requirement, as package indices normalise it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def direct(extras: list[str]) -> set[str]:
    """The names of the packages that pyproject.toml lists for these extras, and for zods itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {name_of(requirement) for requirement in project["dependencies"]}
    for extra in extras:
        if extra not in project["optional-dependencies"]:
            known = ", ".join(project["optional-dependencies"])
            sys.exit(f"unknown extra {extra!r}; pyproject.toml has {known}")
        for requirement in project["optional-dependencies"][extra]:
            own = re.match(r"zods\[(.+)\]", requirement)
            names |= direct(own[1].split(",")) if own else {name_of(requirement)}
    return names


def select(extras: list[str]) -> str:
    """The blocks of what these extras need, directly or not."""
    found = {name_of(block): block for block in blocks(LOCK.read_text())}
    needed_by = {
        name: set(re.findall(r"[\w.-]+", block.partition("# via ")[2]))
        for name, block in found.items()
    }
    wanted = direct(extras)
    while more := {n for n, by in needed_by.items() if by & wanted} - wanted:
        wanted |= more
    return "".join(block for name, block in found.items() if name in wanted)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write"]:
            write()
        case ["select", extras]:
            print(select(extras.split(",")), end="")
        case _:
            sys.exit(__doc__)
