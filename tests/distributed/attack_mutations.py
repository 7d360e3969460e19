"""Mutations of files, and the rules of their formats, for part C of `benchmarks/attack.py`."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import re
import sys
from collections.abc import Callable

from tests.mutation import mutated

LONG = 50_000_000  # characters of a long line

# --- mutations ------------------------------------------------------------------------------------


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _block(rng: random.Random, data: bytes, new: Callable[[bytes], bytes]) -> bytes:
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 16, 512, 8192)))
    return data[:start] + new(data[start:end]) + data[end:]


def _flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        # half of the flips in the first kilobyte, where headers are
        changed[rng.randrange(min(len(data), rng.choice((1024, 1 << 40))))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _number(rng: random.Random, data: bytes) -> bytes:
    """Replace a number by one that no float holds."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data[:100_000]))
    new = rng.choice((b"1e999", b"9" * 400, b"-1", b"1e400", b"NaN", b"9" * 5000, b"0.1e-9999"))
    if not found:
        return new
    at = rng.choice(found)
    return data[: at.start()] + new + data[at.end() :]


def _value(rng: random.Random, data: bytes, new: bytes) -> bytes:
    """Put `new` in the place of a JSON value, or of the whole file."""
    found = list(re.finditer(rb'(?<=[:,])\s*("[^"]*"|-?\d+)', data[:100_000]))
    if not found or rng.random() < 0.2:
        return new
    at = rng.choice(found)
    return data[: at.start()] + new + data[at.end() :]


def _nested(rng: random.Random, data: bytes) -> bytes:
    depth = rng.choice((200, 100_000))
    return _value(rng, data, rng.choice((b"[" * depth + b"]" * depth, b'{"a":' * depth)))


def _json(rng: random.Random, data: bytes) -> bytes:
    """Change the JSON of the file or of one of its lines."""
    lines = data.splitlines(keepends=True)
    with contextlib.suppress(ValueError):
        return json.dumps(mutated(rng, json.loads(data))).encode()
    at = rng.randrange(len(lines))
    head = re.match(rb"[0-9a-f]{16} ", lines[at])
    start = head.end() if head else 0
    with contextlib.suppress(ValueError):
        changed = json.dumps(mutated(rng, json.loads(lines[at][start:]))).encode() + b"\n"
        lines[at] = lines[at][:start] + changed
        return b"".join(lines)
    return _block(rng, data, lambda _: rng.randbytes(4))


MUTATIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "cut": _cut,
    "other JSON": _json,
    "bits flipped": _flip,
    "a block zeroed": lambda rng, data: _block(rng, data, lambda old: bytes(len(old))),
    "bytes inserted": lambda rng, data: _block(rng, data, lambda old: rng.randbytes(5) + old),
    "huge number": _number,
    "deep nesting": _nested,
    "a block removed": lambda rng, data: _block(rng, data, lambda old: b""),
    "a block twice": lambda rng, data: _block(rng, data, lambda old: old + old),
    "a NUL": lambda rng, data: _block(rng, data, lambda old: b"\0" + old),
    "empty": lambda rng, data: b"",
    "UTF-16": lambda rng, data: data.decode("latin-1").encode("utf-16"),
    "Latin-1": lambda rng, data: _block(rng, data, lambda old: "é".encode("latin-1") + old),
    "a byte order mark": lambda rng, data: b"\xef\xbb\xbf" + data,
    "a long line": lambda rng, data: _value(rng, data, b'"' + b"x" * LONG + b'"'),
    "other bytes": lambda rng, data: rng.randbytes(rng.choice((1, 100, 10_000))),
    "half a character": lambda rng, data: _value(rng, data, rb'"\ud800"'),
    "a folder": lambda rng, data: b"",
    "a named pipe": lambda rng, data: b"",
}


# --- rules of the formats -------------------------------------------------------------------------


def is_no_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return True
    return False


def is_no_json(data: bytes) -> bool:
    try:
        json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return True
    return False


def is_no_json_lines(data: bytes) -> bool:
    """Whether a line is no JSON. White space at a line's ends is left out as zods does."""
    if is_no_text(data):
        return True
    lines = data.decode("utf-8-sig").split("\n")
    return any(is_no_json(line.encode()) for line in lines if line.strip())


def is_no_csv(data: bytes) -> bool:
    if is_no_text(data):
        return True
    csv.field_size_limit(sys.maxsize)
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except csv.Error:
        return True
    return len({len(row) for row in rows if row}) > 1


def is_no_safetensors(data: bytes) -> bool:
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        ends = [value["data_offsets"][1] for key, value in header.items() if key[:2] != "__"]
        return 8 + size + max(ends) != len(data)
    except (ValueError, KeyError, TypeError, RecursionError):
        return True
