"""Write files durably. No other module of the package renames or syncs files.

After a crash or a power cut a file is complete or absent. To guarantee this, a file is written
under a temporary name, synced and renamed, and then its folder is synced. Callers: logs,
checkpoints and run folders.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file


@contextmanager
def write_errors(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Have the error of a write that fails inside, as for a full disk, be an OSError that names
    `path`.

    kinds: exceptions by which libraries report such a failure.
    """
    try:
        yield
    except kinds as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Replace a file atomically and durably.

    Yields a temporary path in the same folder, to write to. At the end of the block the temporary
    file is synced and renamed to `path`; a symbolic link of that name is replaced, not followed.
    Where the block fails, the old content of `path` stays. The temporary file stays too, and the
    next write replaces it. An OSError that names no file names `path`.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with write_errors(path):
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


@contextmanager
def atomic_create(path: Path) -> Iterator[Path]:
    """Create a file atomically and durably. Raises FileExistsError where `path` exists by the end.

    Yields a temporary path in the same folder, to write to. Of several processes that create the
    file at once, one succeeds.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        sync(temporary)
        os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def check_still_named(descriptor: int, path: Path) -> None:
    """Raise FileNotFoundError where an open file was removed: what is written to it would be lost."""
    if os.fstat(descriptor).st_nlink == 0:
        raise FileNotFoundError(
            errno.ENOENT,
            f"{path}: it was removed while this run writes to it, so that nothing more can be kept "
            "there. Put the folder back from a copy and start again with the same command, or start "
            "in another folder",
        )


def save_tensors(
    tensors: dict[str, Any], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file. Raises OSError, naming the file, where the library fails."""
    with write_errors(path, SafetensorError):
        save_file(tensors, path, metadata)


def make_folder(path: Path) -> None:
    """Create a folder and its parents where they are missing, durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sync_tree(folder: Path) -> None:
    """Flush a folder, all that is in it, and its name to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent) / name)
        sync(Path(parent))
    sync(folder.parent)


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
