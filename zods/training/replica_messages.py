"""The messages between the replicas' leader and the others.

A message is a letter for its kind, and its content. Those of every step are packed numbers, the
others are JSON.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

# from a follower
POST = b"P"  # its sums
ASK = b"R"  # for records
JOIN = b"J"  # it wants to take part
BYE = b"B"  # it has all records that it needs
# from the leader
ANSWER = b"A"  # the sums of all
NOTICE = b"N"  # a record is in the leader's log
RECORDS = b"L"
JOINED = b"W"
OUT = b"O"  # it does not take part any more
OVER = b"E"  # the leader makes no further step
# from both
BEAT = b"."

# Of a head's 16 digits. Two chains that differ have the same ones by chance once in 4 thousand
# million records, and the next record's differ then.
HEAD_DIGITS = 8
MOST_COUNTS = 15
_ENDS, _NAMED, _CHANGES, _WIDE = 0x80, 0x40, 0x20, 0x10


class Member(NamedTuple):
    """A replica that takes part. replica: its index. ranks: its number of ranks."""

    replica: int
    ranks: int


class Sums(NamedTuple):
    """Sums of a replica, or of all. tag: names the sum; the step's number for a step's losses. head:
    of the sender's chain of records; a message has HEAD_DIGITS of it. ends: the replica leaves
    after this step; from the leader: all replicas do. members: from the leader, where they change:
    those from the next step on.

    A step's message is short, because it crosses slow links: a byte each for its kind and flags, 4
    for the tag, 4 for the head, 8 for each value. Counts at the end of the values take 2 or 4.
    """

    tag: str
    head: str
    ends: bool
    values: list[float]
    members: list[Member] | None = None

    def pack(self, kind: bytes) -> bytes:
        is_number = self.tag.isdecimal() and int(self.tag) < 2**32
        counts = _counts_at_end(self.values)
        is_wide = any(count >= 2**16 for count in counts)
        flags = len(counts) | _ENDS * self.ends | _NAMED * (not is_number)
        flags |= _CHANGES * (self.members is not None) | _WIDE * is_wide
        others = self.values[: len(self.values) - len(counts)]
        packed_values = struct.pack(
            f"!{len(others)}d{len(counts)}{'I' if is_wide else 'H'}", *others, *counts
        )
        return b"".join(
            (
                kind,
                bytes([flags]),
                bytes.fromhex(self.head[:HEAD_DIGITS]),
                struct.pack("!I", int(self.tag)) if is_number else _with_size(self.tag),
                b"" if self.members is None else _with_size(json.dumps(self.members)),
                packed_values,
            )
        )

    @classmethod
    def unpack(cls, message: bytes) -> Sums:
        flags = message[1]
        start = 2 + HEAD_DIGITS // 2
        head, members = message[2:start].hex(), None
        if flags & _NAMED:
            tag, start = _sized(message, start)
        else:
            (step,) = struct.unpack_from("!I", message, start)
            tag, start = str(step), start + 4
        if flags & _CHANGES:
            text, start = _sized(message, start)
            members = [Member(*member) for member in json.loads(text)]
        number, letter = flags & MOST_COUNTS, "I" if flags & _WIDE else "H"
        size = number * struct.calcsize(f"!{letter}")
        others = (len(message) - start - size) // 8
        values = struct.unpack(f"!{others}d{number}{letter}", message[start:])
        return cls(tag, head, bool(flags & _ENDS), list(map(float, values)), members)


def _counts_at_end(values: Sequence[float]) -> list[int]:
    """The whole numbers at the end of the values, MOST_COUNTS at most."""
    first = len(values)
    while first > max(0, len(values) - MOST_COUNTS) and _is_count(values[first - 1]):
        first -= 1
    return [int(value) for value in values[first:]]


def _is_count(value: float) -> bool:
    return 0 <= value < 2**32 and value.is_integer() and math.copysign(1.0, value) > 0


def _with_size(text: str) -> bytes:
    return struct.pack("!I", len(text.encode())) + text.encode()


def _sized(message: bytes, start: int) -> tuple[str, int]:
    """(a text that `_with_size` has packed, the position behind it)."""
    (size,) = struct.unpack_from("!I", message, start)
    start += 4
    return message[start : start + size].decode(), start + size


def pack_notice(number: int, head: str, text: str) -> bytes:
    """number: of the record, from 0. head: of the chain after it; the notice has HEAD_DIGITS of it.
    text: its JSON; empty where the replicas that take part make the same record.
    """
    return NOTICE + struct.pack("!I4s", number, bytes.fromhex(head[:HEAD_DIGITS])) + text.encode()


def unpack_notice(message: bytes) -> tuple[int, str, str]:
    number, head = struct.unpack_from("!I4s", message, 1)
    return number, head.hex(), message[9:].decode()


def pack_ask(first: int, waits: bool) -> bytes:
    """Ask for the records from number `first` on. waits: not before there is one."""
    return ASK + struct.pack("!I?", first, waits)


def unpack_ask(message: bytes) -> tuple[int, bool]:
    return struct.unpack("!I?", message[1:])


def pack_records(first: int, texts: Sequence[str]) -> bytes:
    return RECORDS + json.dumps([first, *texts]).encode()


def packed(kind: bytes, **content: Any) -> bytes:
    return kind + json.dumps(content).encode()


def unpacked(message: bytes) -> Any:
    return json.loads(message[1:])
