"""Write files durably. No other module of the package renames or syncs files.

After a crash or a power cut a file is complete or absent. To guarantee this, a file is written
under a temporary name, synced and renamed, and then its folder is synced. Callers: logs,
checkpoints and run folders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Replace a file atomically and durably.

    Yields a temporary path in the same folder, to write to. At the end of the block the temporary
    file is synced and renamed to `path`. Where the block fails, the old content of `path` stays.
    The temporary file stays too, and the next write replaces it.
    """
    temporary = path.with_name(f".{path.name}.partial")
    yield temporary
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder within its folder.

    The rename is durable once the caller has synced the folder.
    """
    os.rename(source, target)


def sync(file: Path | int) -> None:
    """Flush the content of a file, or the names in a folder, to the disk.

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
