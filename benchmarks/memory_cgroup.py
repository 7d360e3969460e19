"""A limit on the memory of processes: a memory cgroup below that of this process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class MemoryCgroup:
    """A cgroup whose processes together may use `limit` bytes, page cache included.

    The kernel first drops page cache, and then kills a process. Use it as a context manager; all
    processes in it must have ended when it is left. Raises OSError where this process may not make a
    cgroup with such a limit.
    """

    def __init__(self, limit: int) -> None:
        groups = dict(line.split(":")[1:] for line in _lines("/proc/self/cgroup"))
        own, self._is_v1 = groups.get("memory"), "memory" in groups
        base = V1 / own.lstrip("/") if own is not None else V2 / groups[""].lstrip("/")
        self._folder = base / f"zods_benchmark_{os.getpid()}"
        self._folder.mkdir()
        try:
            self._file("memory.limit_in_bytes", "memory.max").write_text(str(limit))
        except OSError:
            self._folder.rmdir()
            raise

    def _file(self, v1: str, v2: str) -> Path:
        return self._folder / (v1 if self._is_v1 else v2)

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(self, kind: type | None, error: object, trace: TracebackType | None) -> None:
        self._folder.rmdir()

    def command(self, command: Sequence[str]) -> list[str]:
        """The command, run inside the cgroup with all processes that it starts."""
        script = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", script, str(self._folder / "cgroup.procs"), *command]

    def peak(self) -> int:
        """The most bytes that were used, with page cache."""
        return int(self._file("memory.max_usage_in_bytes", "memory.peak").read_text())

    def kills(self) -> int:
        """The number of processes that the kernel has killed for the limit."""
        events = dict(
            line.split() for line in _lines(self._file("memory.oom_control", "memory.events"))
        )
        return int(events["oom_kill"])


def lacking() -> str | None:
    """Why this process cannot make such a cgroup; None where it can."""
    with contextlib.suppress(FileExistsError):
        try:
            with MemoryCgroup(1 << 30):
                return None
        except OSError as error:
            return f"a memory cgroup cannot be made, which usually needs root: {error}"
    return None


def _lines(path: str | Path) -> list[str]:
    return Path(path).read_text().splitlines()
