"""Build the sdist of the checkout in the current folder, and the wheel from the sdist.

    python .ci/package.py FOLDER    leaves both in FOLDER

The sdist has to hold what git tracks, and the wheel what git tracks of zods/: a file that the
package needs at run time and that no pattern names is an error, and so is a file that does not
belong there. Needs setuptools and no other package.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from setuptools import build_meta

MADE = re.compile(r"PKG-INFO|setup\.cfg|zods\.egg-info/.*|[^/]+\.dist-info/.*")  # by setuptools


def check(archive: str, names: list[str], tracked: set[str]) -> None:
    """Compare the files of an archive with those that it has to hold."""
    found = {name for name in names if not name.endswith("/") and not MADE.fullmatch(name)}
    if found != tracked:
        sys.exit(
            f"{archive} lacks {sorted(tracked - found)} and has {sorted(found - tracked)}, which git "
            "does not track: change MANIFEST.in, or package-data in pyproject.toml"
        )


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    listed = subprocess.run(["git", "ls-files"], check=True, capture_output=True, text=True).stdout
    tracked = set(listed.splitlines())
    # setuptools would add what an earlier build has listed there
    Path("zods.egg-info", "SOURCES.txt").unlink(missing_ok=True)
    sdist = build_meta.build_sdist(str(folder))
    with tarfile.open(folder / sdist) as archive:
        members = [member.name for member in archive.getmembers() if not member.isdir()]
    check(sdist, [name.partition("/")[2] for name in members], tracked)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "-w", str(folder), str(folder / sdist)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    check(wheel.name, names, {name for name in tracked if name.startswith("zods/")})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
