"""Read the lines of a UTF-8 file, which may be compressed as .gz.

The error for a file in another encoding says how to convert it. Callers: `zods.tasks.csv_files`
and `zods.tasks.json_files`.
"""

from __future__ import annotations

import gzip
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from zods.tasks.row_mistakes import listed


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, with their line ends.

    Raises ValueError where the file is not UTF-8, or is a damaged .gz.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file, start=1):
                if "\0" in line:
                    raise ValueError(
                        _with_iconv(
                            path, f"line {number} has a zero byte, as UTF-16 has", "utf-16le"
                        )
                    )
                yield line
    except UnicodeDecodeError:
        raise ValueError(_undecodable(path)) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: damaged or truncated: {error}. Copy or download the file again"
        ) from None


def _undecodable(path: Path) -> str:
    """The error message for a file that is not UTF-8: the lines, and the command to convert it."""
    with _open_binary(path) as file:
        start = file.read(2)
        if start in (b"\xff\xfe", b"\xfe\xff"):
            return _with_iconv(path, "begins with the byte order mark of UTF-16", "utf-16")
        file.seek(0)
        lines, byte = [], 0
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = byte or line[error.start]
                lines.append(number)
    found = (
        f"line {listed(lines)}: not UTF-8 text (the first such byte is 0x{byte:02x}, in line "
        f"{lines[0]})"
    )
    return _with_iconv(path, found, "latin1")


def _with_iconv(path: Path, found: str, encoding: str) -> str:
    name = shlex.quote(str(path))
    command = f"zcat {name} | iconv -f {encoding} -t utf-8" if path.suffix == ".gz" else (
        f"iconv -f {encoding} -t utf-8 {name}"
    )  # fmt: skip
    return f"{path}, {found}. Convert it: {command} > NEW (where its encoding is {encoding})"


def _open_binary(path: Path) -> BinaryIO:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rb")
