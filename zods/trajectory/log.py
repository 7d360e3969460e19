"""The trajectory log: one line per record, `<16 hexadecimal digits> <JSON>`.

Lines are appended and flushed to the disk. The digits are a BLAKE2b digest of the previous line's
digits and of the JSON, so that the lines form a chain. A changed, lost, doubled or moved line
breaks the chain. The last digits, the head, identify everything that was applied: ranks compare the
head, and checkpoints store it. Called by the modules of `zods.training` and by the replay.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from zods.files import check_regular, check_still_named, make_folder, sync, try_lock
from zods.trajectory.record_parser import header_of, record_of
from zods.trajectory.records import Header, Record, RunRecord, Step

logger = logging.getLogger(__name__)

START = "0" * 16  # the head before the first line
LOCK_SECONDS = 60.0  # a restarted run waits so long for the ranks of the previous run to exit


def chained(head: str, text: str) -> str:
    """The head after a record. head: the head before it. text: the record's JSON."""
    return hashlib.blake2b(f"{head}{text}".encode(), digest_size=8, person=b"zods-log").hexdigest()


def text_of(record: Header | Record) -> str:
    """The record's JSON, as it is written to the log."""
    return json.dumps(record.to_json(), separators=(",", ":"))


@dataclass(frozen=True)
class Log:
    """Content of a log.

    heads, ends: the chain's head and the file offset in bytes, after the header and after each
    record. torn: bytes of an incomplete last line, which is not part of the content.
    """

    path: str
    header: Header
    records: tuple[Record, ...]
    heads: tuple[str, ...]
    ends: tuple[int, ...]
    torn: int

    @property
    def num_steps(self) -> int:
        return _steps(self.records)

    def run_at_end(self) -> RunRecord | None:
        """The configuration in force at the end of the log; None without one."""
        return next(
            (record for record in reversed(self.records) if isinstance(record, RunRecord)), None
        )

    def until(self, num_steps: int) -> tuple[Record, ...]:
        """The records that lead to the parameters after `num_steps` steps.

        Raises ValueError if the log has fewer steps.
        """
        if not 0 <= num_steps <= self.num_steps:
            raise ValueError(
                f"{self.path}: holds {self.num_steps} steps, asked for {num_steps}. Ask for 0 to "
                f"{self.num_steps}."
            )
        return tuple(record for record in self.records if record.step < num_steps)

    def warn_if_torn(self) -> None:
        """Log a warning if the last line is incomplete. The file is not changed."""
        if self.torn:
            logger.warning(
                "%s: the last record is torn (%d bytes at byte %d) and is left out; %d steps are "
                "whole",
                *(self.path, self.torn, self.ends[-1], self.num_steps),
            )


def _steps(records: Sequence[Record]) -> int:
    """The number of steps that are made after `records`."""
    return records[-1].step + isinstance(records[-1], Step) if records else 0


def read_log(path: str | Path) -> Log:
    """Read a log file and check every line. Raises OSError, or ValueError with line and byte."""
    check_regular(Path(path))
    return parse_log(Path(path).read_bytes(), path)


def parse_log(data: bytes, path: str | Path) -> Log:
    """Parse and check the bytes of a log. path: names the log in errors.

    An incomplete last line is ignored: a crash in the middle of a write leaves one. Raises
    ValueError with line and byte if anything else is damaged.
    """
    header: Header | None = None
    records: list[Record] = []
    heads: list[str] = []
    ends: list[int] = []
    for number, start, line in _lines(data):
        head, _, text = line.rstrip(b"\n").partition(b" ")
        whole = (
            line.endswith(b"\n")
            and head == chained(heads[-1] if heads else START, text.decode("latin-1")).encode()
        )
        if not whole:
            if (
                start + len(line) == len(data)
                and header is not None
                and not _continues_after_record(line, heads[-1])
            ):
                return Log(
                    str(path), header, tuple(records), tuple(heads), tuple(ends), torn=len(line)
                )
            _raise_damaged(
                path,
                number,
                start,
                "damaged: its checksum is wrong" if line.endswith(b"\n") else "torn",
            )
        try:
            values = json.loads(text, parse_constant=_no_constant)
            if header is None:
                header = header_of(values)
            else:
                records.append(_checked_order(records, record_of(values)))
        except (ValueError, OverflowError, RecursionError) as error:
            _raise_damaged(path, number, start, f"not a record of this version of zods: {error}")
        heads.append(head.decode())
        ends.append(start + len(line))
    if header is None:
        raise ValueError(f"{path}: empty; it is no trajectory log. Give the log of a run.")
    return Log(str(path), header, tuple(records), tuple(heads), tuple(ends), torn=0)


def _lines(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number from 1, start in bytes, line with its newline) of each line."""
    start = 0
    for number, line in enumerate(data.split(b"\n"), start=1):
        whole = line + b"\n" if start + len(line) < len(data) else line
        if whole:
            yield number, start, whole
        start += len(whole)


def _continues_after_record(line: bytes, head: str) -> bool:
    """Whether a last line starts with a complete record and continues after it.

    Such a line is not torn: its newline was damaged.
    """
    try:
        text = line.decode("latin-1")
        end = json.JSONDecoder().raw_decode(text, 17)[1]
    except (ValueError, RecursionError):
        return False
    return end < len(text) and text[:17] == f"{chained(head, text[17:end])} "


def is_torn_first_line(data: bytes) -> bool:
    """Whether a log without a newline has the beginning of a first line, or nothing."""
    torn = re.fullmatch(rb"[0-9a-f]{0,15}|[0-9a-f]{16}( (\{.*)?)?", data) is not None
    return torn and not _continues_after_record(data, START)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _raise_damaged(path: str | Path, number: int, start: int, what: str) -> NoReturn:
    raise ValueError(
        f"{path}, line {number} (byte {start}): {what}. What comes before it is intact."
    )


def _checked_order(records: list[Record], record: Record) -> Record:
    """Return `record` if it may follow `records`. Raises ValueError otherwise."""
    expected = _steps(records)
    if record.step != expected:
        raise ValueError(f"a record of step {record.step} where step {expected} is due")
    if not records and not isinstance(record, RunRecord):
        raise ValueError("the first record after the header must be a run's")
    return record


class Trajectory:
    """The chain of applied records, on every rank, and the file that rank 0 writes.

    head: identifies all records so far; START before the first. file: None on a rank that writes no
    log. publish: called with the JSON of each record that is on the disk, in the file's thread.
    before_cut: called with the number of steps that stay (-1: not even the header), before the file
    is cut to an agreement or to a checkpoint.
    """

    def __init__(self) -> None:
        self.head = START
        self.file: LogFile | None = None
        self.publish: Callable[[str], None] = lambda _: None
        self.before_cut: Callable[[int], None] = lambda _: None
        # (file length in bytes, number of steps in the file) when all ranks last agreed.
        self._agreed = (0, 0)

    def add(self, record: Header | Record) -> None:
        """Add a record to the chain.

        A rank with a file starts to write the record; `wait` waits until it is on the disk.
        """
        text = text_of(record)
        self.head = chained(self.head, text)
        if self.file is not None:
            self.file.begin_append(
                f"{self.head} {text}\n".encode(), functools.partial(self.publish, text)
            )

    def wait(self) -> None:
        """Block until all records are on the disk.

        Raises OSError if a write failed; the file then ends before the first record that failed.
        """
        if self.file is not None:
            self.file.wait()

    def agree(self, num_steps: int) -> None:
        """Note that all ranks have applied the same records so far.

        Later records can be cut by `cut_to_agreement` until the ranks agree again.
        """
        if self.file is not None:
            self._agreed = (self.file.length(), num_steps)

    def cut_to_agreement(self) -> None:
        """Cut the file back to the last agreement, because ranks have applied different records.

        A restarted run continues from there.
        """
        if self.file is not None:
            length, num_steps = self._agreed
            self.before_cut(num_steps)
            self.file.cut(length)
            logger.error(
                "%s: cut back to step %d, up to which all ranks agreed", self.file.path, num_steps
            )


class LogFile:
    """The file of a log, locked while it is open, so that no second run can append to it."""

    def __init__(self, path: str | Path) -> None:
        """Open or create the file and lock it. A symbolic link is followed: the log may lie elsewhere.

        Raises ValueError if another process holds the lock for longer than LOCK_SECONDS, OSError if
        the file cannot be opened.
        """
        self.path = Path(path)
        make_folder(self.path.parent)
        check_regular(self.path)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock()
        sync(self.path.resolve().parent)  # so that a new file's name survives a power cut
        self._worker = ThreadPoolExecutor(1, "zods-log")
        self._pending: list[Future[None]] = []
        self._failed: OSError | None = None

    def _lock(self) -> None:
        deadline, said = time.monotonic() + LOCK_SECONDS, False
        while not try_lock(self._descriptor):
            if time.monotonic() > deadline:
                os.close(self._descriptor)
                raise ValueError(
                    f"{self.path}: another run writes to it. Wait for that one to end, stop it, or "
                    "give another folder."
                )
            if not said:
                logger.warning(
                    "%s: another run writes to it; waiting up to %.0f s for its end",
                    self.path,
                    LOCK_SECONDS,
                )
                said = True
            time.sleep(0.2)

    def read(self) -> bytes:
        return self.path.read_bytes()

    def length(self) -> int:
        """The file's length in bytes."""
        return os.fstat(self._descriptor).st_size

    def cut(self, length: int) -> None:
        """Truncate the file to its first `length` bytes."""
        os.ftruncate(self._descriptor, length)
        sync(self._descriptor)

    def begin_append(self, line: bytes, then: Callable[[], None]) -> None:
        """Start to append a line in the background; `wait` waits until it is on the disk.

        then: called in the background when the line is on the disk.
        """
        self._pending.append(self._worker.submit(self._append, line, then))

    def _append(self, line: bytes, then: Callable[[], None]) -> None:
        if self._failed is not None:
            raise self._failed  # no record may follow one that could not be written
        length = self.length()
        try:
            check_still_named(self._descriptor, self.path)
            written = os.write(self._descriptor, line)
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            os.fdatasync(self._descriptor)
        except OSError as error:
            self._failed = error
            os.ftruncate(self._descriptor, length)  # remove a partly written record
            raise
        then()

    def wait(self) -> None:
        pending, self._pending = self._pending, []
        for future in pending:
            try:
                future.result()
            except FileNotFoundError:  # the file was removed
                raise
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{self.path}: the trajectory log cannot be written ({error.strerror}). All "
                    "steps before this one are safe in it. Make room, and start again with the "
                    "same command",
                ) from None

    def close(self) -> None:
        self._worker.shutdown(wait=True)
        os.close(self._descriptor)
