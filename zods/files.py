"""Durable files: the only module of the package that renames and syncs.

After a crash or a power cut a file is there whole or not at all. So it is written under a temporary
name, synced, renamed, and then its folder is synced. Callers: logs, checkpoints and run folders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file so that it is whole, and on the disk, from the moment that it has its name.

    Yields a temporary path in the same folder, to write to. At the end of the block that file takes
    the place of `path`. Where the block fails, what stood at `path` stays; the temporary file stays
    too, and the next write replaces it.
    """
    temporary = path.with_name(f".{path.name}.partial")
    yield temporary
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder within a folder, which the caller syncs for the name to be durable."""
    os.rename(source, target)


def sync(file: Path | int) -> None:
    """Sync the content of a file, or the names in a folder, to the disk.

    file: a path, or the descriptor of an open file.
    """
    if isinstance(file, int):
        os.fsync(file)
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
