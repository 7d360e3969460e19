"""The trajectory log: one line per record, `<16 hexadecimal digits> <JSON>`, appended and flushed
to the disk.

The digits are a BLAKE2b digest of the line before's digits and of the JSON: a chain. A changed,
lost, doubled or moved line breaks it, and the last digits, the head, stand for all that was
applied: ranks compare it, checkpoints bear it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from zods.files import sync
from zods.trajectory.records import Header, Record, RunRecord, Step, header_of, record_of

logger = logging.getLogger(__name__)

START = "0" * 16  # the head before the first line
LOCK_SECONDS = 60.0  # that a run started again waits for the ranks of the one before to end


def chained(head: str, text: str) -> str:
    """The head after a record."""
    return hashlib.blake2b(f"{head}{text}".encode(), digest_size=8, person=b"zods-log").hexdigest()


def text_of(record: Header | Record) -> str:
    return json.dumps(record.to_json(), separators=(",", ":"))


@dataclass(frozen=True)
class Log:
    """The content of a log. heads, ends: the head, and the end in bytes, after the header and after
    each record.

    torn: bytes of a last line that is not whole; the log ends before it.
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
        """The configuration in force."""
        return next(
            (record for record in reversed(self.records) if isinstance(record, RunRecord)), None
        )

    def until(self, num_steps: int) -> tuple[Record, ...]:
        """The records that lead to the parameters after `num_steps` steps.

        Raises ValueError where there are fewer.
        """
        if not 0 <= num_steps <= self.num_steps:
            raise ValueError(f"{self.path}: holds {self.num_steps} steps, asked for {num_steps}.")
        return tuple(record for record in self.records if record.step < num_steps)

    def say_torn(self) -> None:
        if self.torn:
            logger.warning(
                "%s: the last record is torn (%d bytes at byte %d): cut off; %d steps are whole",
                *(self.path, self.torn, self.ends[-1], self.num_steps),
            )


def _steps(records: Sequence[Record]) -> int:
    """Steps made after `records`."""
    return records[-1].step + isinstance(records[-1], Step) if records else 0


def read_log(path: str | Path) -> Log:
    """Read a log file, every line checked. Raises OSError or ValueError, with the place."""
    return parse_log(Path(path).read_bytes(), path)


def parse_log(data: bytes, path: str | Path) -> Log:
    """The log in `data`; `path` names it in errors.

    A last line that is not whole is left out: what a crash in the middle of a write leaves. Raises
    ValueError, with the line and byte, where anything else is damaged.
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
                and not _runs_on(line, heads[-1])
            ):
                return Log(
                    str(path), header, tuple(records), tuple(heads), tuple(ends), torn=len(line)
                )
            _refuse(
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
                records.append(_following(records, record_of(values)))
        except (ValueError, RecursionError) as error:
            _refuse(path, number, start, f"not a record of this version of zods: {error}")
        heads.append(head.decode())
        ends.append(start + len(line))
    if header is None:
        raise ValueError(f"{path}: empty; it is no trajectory log.")
    return Log(str(path), header, tuple(records), tuple(heads), tuple(ends), torn=0)


def _lines(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(number, start, line with its end) of each line."""
    start = 0
    for number, line in enumerate(data.split(b"\n"), start=1):
        whole = line + b"\n" if start + len(line) < len(data) else line
        if whole:
            yield number, start, whole
        start += len(whole)


def _runs_on(line: bytes, head: str) -> bool:
    """Whether a last line begins with a whole record and goes on: it is not torn, its end was
    damaged.
    """
    try:
        text = line.decode("latin-1")
        end = json.JSONDecoder().raw_decode(text, 17)[1]
    except (ValueError, RecursionError):
        return False
    return end < len(text) and text[:17] == f"{chained(head, text[17:end])} "


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _refuse(path: str | Path, number: int, start: int, what: str) -> NoReturn:
    raise ValueError(
        f"{path}, line {number} (byte {start}): {what}. What comes before it is intact."
    )


def _following(records: list[Record], record: Record) -> Record:
    """`record`, if it may come after `records`."""
    expected = _steps(records)
    if record.step != expected:
        raise ValueError(f"a record of step {record.step} where step {expected} is due")
    if not records and not isinstance(record, RunRecord):
        raise ValueError("the first record after the header must be a run's")
    return record


class Trajectory:
    """The chain of what was applied, on every rank, and the file that rank 0 keeps of it.

    head: stands for all records so far; START where there are none. file: None where no log is
    written. publish: where others wait for the records, is given the JSON of each.
    """

    def __init__(self) -> None:
        self.head = START
        self.file: LogFile | None = None
        self.publish: Callable[[str], None] = lambda _: None
        # where the file ended, and the steps in it, when all ranks last agreed
        self._agreed = (
            0,
            0,
        )

    def add(self, record: Header | Record) -> None:
        """Chain a record; where this rank keeps the file it is on its way to the disk until `wait`."""
        text = text_of(record)
        self.head = chained(self.head, text)
        if self.file is not None:
            self.file.begin_append(f"{self.head} {text}\n".encode())
        self.publish(text)

    def wait(self) -> None:
        """Block until all records are on the disk. Raises OSError where that failed; the file then
        ends before the first that is not."""
        if self.file is not None:
            self.file.wait()

    def agree(self, num_steps: int) -> None:
        """Mark that all ranks have applied the same updates so far.

        What they do from here on counts for good when they agree again.
        """
        if self.file is not None:
            self._agreed = (self.file.length(), num_steps)

    def cut_to_agreement(self) -> None:
        """Ranks have applied different things: leave in the file what they agreed on, from where a
        restart goes on.
        """
        if self.file is not None:
            length, num_steps = self._agreed
            self.file.cut(length)
            logger.error(
                "%s: cut back to step %d, up to which all ranks agreed", self.file.path, num_steps
            )


class LogFile:
    """The file of a log, locked while it is open: no second run can append to it."""

    def __init__(self, path: str | Path) -> None:
        """Open or create it. Raises ValueError where another process holds it for longer than
        LOCK_SECONDS, OSError.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock()
        sync(self.path.parent)  # a new file's name must outlive a power cut, too
        self._worker = ThreadPoolExecutor(1, "zods-log")
        self._pending: list[Future[None]] = []
        self._failed: OSError | None = None

    def _lock(self) -> None:
        deadline, said = time.monotonic() + LOCK_SECONDS, False
        while True:
            try:
                return fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(self._descriptor)
                    raise ValueError(
                        f"{self.path}: another run writes to it. Wait for that one to end, stop "
                        f"it, or give another folder."
                    ) from None
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
        return os.fstat(self._descriptor).st_size

    def cut(self, length: int) -> None:
        """Leave the first `length` bytes."""
        os.ftruncate(self._descriptor, length)
        sync(self._descriptor)

    def begin_append(self, line: bytes) -> None:
        self._pending.append(self._worker.submit(self._append, line))

    def _append(self, line: bytes) -> None:
        if self._failed is not None:
            raise self._failed  # what follows a record that is not there may not be there either
        length = self.length()
        try:
            written = os.write(self._descriptor, line)
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            os.fdatasync(self._descriptor)
        except OSError as error:
            self._failed = error
            os.ftruncate(self._descriptor, length)  # what is whole stays whole
            raise

    def wait(self) -> None:
        pending, self._pending = self._pending, []
        for future in pending:
            try:
                future.result()
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{self.path}: the trajectory log cannot be written ({error.strerror}). All "
                    f"steps before this one are safe "
                    "in it. Make room, and start again with the same command",
                ) from None

    def close(self) -> None:
        self._worker.shutdown(wait=True)
        os.close(self._descriptor)
