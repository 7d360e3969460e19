"""The messages between the replicas' leader and the others.

A message is a letter for its kind, and its content. Those of every step are packed numbers, the
others are JSON.
"""

from __future__ import annotations

import json
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


class Member(NamedTuple):
    """A replica that takes part. replica: its index. ranks: its number of ranks."""

    replica: int
    ranks: int


class Sums(NamedTuple):
    """Sums of a replica, or of all. tag: names the sum. head: of the sender's chain of records.
    ends: the replica leaves after this step; from the leader: all replicas do. members: from the
    leader, where they change: those from the next step on.
    """

    tag: str
    head: str
    ends: bool
    values: list[float]
    members: list[Member] | None = None

    def pack(self, kind: bytes) -> bytes:
        tag = self.tag.encode()
        members = b"" if self.members is None else json.dumps(self.members).encode()
        head = struct.pack(
            f"!B{len(tag)}s8s?I", len(tag), tag, bytes.fromhex(self.head), self.ends, len(members)
        )
        return kind + head + members + struct.pack(f"!{len(self.values)}d", *self.values)

    @classmethod
    def unpack(cls, message: bytes) -> Sums:
        length = message[1]
        tag, head, ends, size = struct.unpack_from(f"!{length}s8s?I", message, 2)
        start = 2 + length + 13
        members, values = message[start : start + size], message[start + size :]
        return cls(
            tag.decode(),
            head.hex(),
            ends,
            list(struct.unpack(f"!{len(values) // 8}d", values)),
            [Member(*member) for member in json.loads(members)] if size else None,
        )


def pack_notice(number: int, head: str, text: str) -> bytes:
    """number: of the record, from 0. head: of the chain after it. text: its JSON; empty where the
    replicas that take part make the same record.
    """
    return NOTICE + struct.pack("!I8s", number, bytes.fromhex(head)) + text.encode()


def unpack_notice(message: bytes) -> tuple[int, str, str]:
    number, head = struct.unpack_from("!I8s", message, 1)
    return number, head.hex(), message[13:].decode()


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
