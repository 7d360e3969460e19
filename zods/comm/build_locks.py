"""Locks of builds by torch's extension loader: DeepSpeed builds its operators with it at their
first use.

torch guards a build with a file that exists while the build runs. A build that is killed leaves it
behind, and every later run then waits for it in silence. The builder keeps the file open, so a lock
that no process has open is stale. Used by `zods.comm.process` and launch/build_ops.py.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from torch.utils import cpp_extension


def holder(lock: Path) -> int | None:
    """The process on this machine that has `lock` open, or None.

    Processes of other users show it to root only.
    """
    wanted = lock.stat()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # closed meanwhile, or another user's
            found = descriptor.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return int(descriptor.parts[2])
    return None


def holders(folder: Path | None = None) -> dict[Path, int | None]:
    """The locks below `folder`, and the process on this machine that holds each.

    By default where torch builds extensions.
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
    """The locks that killed builds left where torch builds extensions: no process on this machine
    holds them.
    """
    return [lock for lock, process in holders().items() if process is None]
