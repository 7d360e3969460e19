"""Find stale locks of torch's extension loader, with which DeepSpeed builds its operators.

torch guards a build with a lock file that exists while the build runs. A build that is killed
leaves the file, and every later run waits for it without a message. The builder keeps the file
open, so a lock that no process has open is stale. Used by `zods.comm.process` and
launch/build_ops.py. `python -m zods.comm.build_locks` removes the stale locks that
are older than any build.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

from torch.utils import cpp_extension

SECONDS = 1800  # more than a build takes


def holder(lock: Path) -> int | None:
    """The process on this machine that has `lock` open, or None.

    Only root sees the open files of other users' processes. Raises FileNotFoundError where the lock
    is released while the processes are looked at, which takes seconds on a busy machine.
    """
    wanted = lock.stat()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # closed meanwhile, or another user's
            found = descriptor.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return int(descriptor.parts[2])
    if lock.stat().st_ctime_ns != wanted.st_ctime_ns:  # taken again, maybe with the same inode
        raise FileNotFoundError(lock)
    return None


def holders(folder: Path | None = None) -> dict[Path, int | None]:
    """The locks below `folder`, each with the process on this machine that holds it.

    folder: default: where torch builds extensions.
    """
    if folder is None:
        folder = Path(
            os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
        )
    found = {}
    for lock in folder.glob("**/lock"):
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            found[lock] = holder(lock)
    return found


def stale_locks() -> list[Path]:
    """The locks where torch builds extensions that no process on this machine holds."""
    return [lock for lock, process in holders().items() if process is None]


def age(lock: Path) -> float:
    """Seconds since `lock` was taken, by the clock of its file system, which other machines share."""
    with tempfile.NamedTemporaryFile(dir=lock.parent) as now:
        return os.fstat(now.fileno()).st_mtime - lock.stat().st_mtime


if __name__ == "__main__":
    for stale in stale_locks():
        # released meanwhile, or another user's
        with contextlib.suppress(FileNotFoundError, PermissionError):
            # a younger one may be of another machine that shares the folder
            if age(stale) > SECONDS:
                print(f"zods: removing {stale}, the lock of a killed build", file=sys.stderr)
                stale.unlink()
