"""Helpers of tests about files: missing syncs, small file systems, and waits that never end."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Syncs:
    """The states in which files and folders were last synced, from now on.

    The calls of `os` in this process are recorded and made. A state is the time of the last change
    and the size: the kernel's clock for changes is coarse, so that two changes may have one time.
    """

    def __init__(self) -> None:
        self._synced: dict[tuple[int, int], tuple[int, int]] = {}  # by (device, inode)
        self._originals = {name: getattr(os, name) for name in ("fsync", "fdatasync")}
        for name, original in self._originals.items():
            setattr(os, name, self._recorded(original))

    def _recorded(self, original: Any) -> Any:
        def sync(descriptor: int) -> None:
            original(descriptor)
            of = os.fstat(descriptor)
            self._synced[of.st_dev, of.st_ino] = of.st_mtime_ns, of.st_size

        return sync

    def close(self) -> None:
        for name, original in self._originals.items():
            setattr(os, name, original)

    def unsynced(self, folder: Path) -> list[str]:
        """The files and folders in a folder, and the folder's parent, that were not synced after
        their last change. A new folder's name is an entry of its parent, and so a change of it.
        """
        found = [folder.parent, folder, *folder.rglob("*")]
        return sorted(
            str(path.relative_to(folder.parent))
            for path in found
            if self._synced.get(((of := path.stat()).st_dev, of.st_ino))
            != (of.st_mtime_ns, of.st_size)
        )


@contextmanager
def small_disk(path: Path, kib: int) -> Iterator[Path]:
    """Mount a file system of this size. The test is skipped where this process may not mount."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path, pages: int) -> None:
    """Fill a file system, up to this number of free pages."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    free = os.statvfs(disk)
    filler.write_bytes(bytes(max(0, free.f_bavail - pages) * free.f_bsize))


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise TimeoutError where the block waits for longer."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
