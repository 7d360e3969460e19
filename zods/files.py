"""Write files durably, and refuse what is no regular file. No other module of the package renames or
syncs files.

After a crash or a power cut a file is complete or absent. To guarantee this, a file is written
under a temporary name, synced and renamed, and then its folder is synced. Callers: logs,
checkpoints and run folders.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import save_file

KINDS = {  # of files from which a reader could wait for ever, or read without end
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(*paths: Path) -> None:
    """Raise OSError where a path is a named pipe, a socket or a device.

    Call it before a file of a user is opened. A path that is missing, or a folder, passes: opening
    it raises an error of its own.
    """
    for path in paths:
        try:
            kind = KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
        except (OSError, ValueError):  # ValueError: a zero byte in the name
            continue
        if kind is not None:
            raise OSError(
                f"{path}: it is {kind}, and a regular file is needed. Give one, or remove it"
            )


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
    Where the block fails, the old content of `path` stays, and the temporary file is removed, so
    that a full disk does not stay full. An OSError that names no file names `path`.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with write_errors(path):
        if os.path.lexists(temporary):  # a link of that name is not written through
            temporary.unlink()
        try:
            yield temporary
            sync(temporary)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and str(temporary) in (error.filename, error.filename2):
                error.filename = str(path)
                del error.filename2
            raise
        os.replace(temporary, path)
        sync(path.parent)


@contextmanager
def atomic_files(folder: Path, *kinds: type[Exception]) -> Iterator[Path]:
    """Write several files into a folder, each atomically and durably. The folder is made where it is
    missing.

    Yields a temporary folder, for a library that chooses the names of its files. At the end of the
    block the files are synced and moved to `folder`. Where the block fails, no file in `folder`
    changes. Raises OSError that names `folder`. kinds: as for `write_errors`.
    """
    temporary = folder / ".partial"  # in the folder, which may be the root of a file system
    with write_errors(folder, *kinds):
        make_folder(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            sync_tree(temporary)
            for parent, _, names in os.walk(temporary):
                target = folder / Path(parent).relative_to(temporary)
                make_folder(target)
                for name in names:
                    os.replace(Path(parent) / name, target / name)
                sync(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync(folder)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content atomically and durably."""
    check_regular(source)
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def atomic_create(path: Path) -> Iterator[Path]:
    """Create a file atomically and durably. Raises FileExistsError where `path` exists by the end.

    Yields a temporary path in the same folder, to write to. Of several processes that create the
    file at once, one succeeds.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with write_errors(path):
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


def try_lock(file: IO[Any] | int) -> bool:
    """Lock an open file until it is closed. Returns False where another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def allocate(file: IO[Any], size: int) -> int | None:
    """Allocate the first `size` bytes of an open file on the disk.

    Returns None, or the free bytes of the disk where they are too few. Raises OSError where the
    allocation fails for another reason.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        return shutil.disk_usage(Path(file.name).parent).free
    return None


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
            if stat.S_ISREG(os.lstat(Path(parent) / name).st_mode):  # a named pipe would wait
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
