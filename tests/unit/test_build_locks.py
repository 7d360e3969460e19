"""`python -m zods.comm.build_locks` removes the locks of killed builds, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HOUR = 3600


def lock_of(folder: Path, hours: int) -> Path:
    """A lock that was taken some hours ago."""
    folder.mkdir()
    lock = folder / "lock"
    lock.touch()
    taken = lock.stat().st_mtime - hours * HOUR
    os.utime(lock, (taken, taken))
    return lock


def test_locks_are_removed_that_no_process_holds_and_that_are_older_than_any_build(tmp_path: Path):
    old, young = lock_of(tmp_path / "old", hours=2), lock_of(tmp_path / "young", hours=0)
    held = lock_of(tmp_path / "held", hours=2)
    with held.open():
        ended = subprocess.run(
            [sys.executable, "-m", "zods.comm.build_locks"],
            env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
    assert [lock.exists() for lock in (old, young, held)] == [False, True, True]
    assert f"removing {old}" in ended.stderr
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["lock", "lock"]
