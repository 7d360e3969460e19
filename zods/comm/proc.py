"""What /proc says of processes on this machine, without rights of root. See proc(5)."""

from __future__ import annotations

from pathlib import Path


def arguments(process: int) -> list[str]:
    """The command line of a process; empty where it is unknown."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def environment(process: int) -> dict[str, str]:
    """The variables with which a process was started; empty where they are unknown, as of another
    user's process.
    """
    try:
        text = Path(f"/proc/{process}/environ").read_text(errors="replace")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


def children(process: int) -> list[int]:
    """The children of a process's main thread; empty where they are unknown."""
    try:
        return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))
    except OSError:
        return []


def parent(process: int) -> int | None:
    """The parent of a process; None where the process is gone, or there is no /proc."""
    return _field(process, 4)


def session(process: int) -> int | None:
    """The session of a process; None as for `parent`."""
    return _field(process, 6)


def ending_signal(process: int) -> int:
    """The signal that ended a process whose parent has not taken its status yet; 0 where there was
    none, or where it is unknown.
    """
    return (_field(process, 52) or 0) & 0x7F


def oom_kills() -> int:
    """The number of processes that the kernel has killed for lack of memory since it was started;
    0 where it is unknown.
    """
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _field(process: int, number: int) -> int | None:
    """A field of /proc/PID/stat, counted from 1 as in proc(5)."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(errors="replace")
    except OSError:
        return None
    # the second field, the name, is in parentheses and may contain any character
    return int(status.rpartition(")")[2].split()[number - 3])
