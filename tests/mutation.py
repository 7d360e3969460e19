"""Random changes for fuzz tests: of JSON values, and of the records of a trajectory log."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from zods.trajectory.log import START, chained

KINDS = [
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    -0.0,
    "",
    "x",
    "auto",
    "nvme",
    [],
    {},
    [[]],
    {"a": 1},
    "AAAA",
    2**53,
    1e308,
]


def mutated(rng: random.Random, value: Any) -> Any:
    """`value` with something in it replaced, left out, doubled or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        others = {k: v for k, v in value.items() if k != key}
        chance = rng.random()
        if chance < 0.1:
            return others
        name = key if chance < 0.9 else rng.choice(["other", key + "s", key[:-1], ""])
        return {**others, name: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        k = rng.randrange(len(value))
        return rng.choice(
            [
                value[:k] + value[k + 1 :],
                [*value, value[k]],
                [*value[:k], mutated(rng, value[k]), *value[k + 1 :]],
            ]
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.3:
        return rng.choice([-value, value * 1e18, value + 1, value / 3])
    return rng.choice(KINDS)


def rechained(texts: Sequence[str]) -> bytes:
    """A log of these records, with the checksums that belong to them."""
    head, lines = START, []
    for text in texts:
        head = chained(head, text)
        lines.append(f"{head} {text}\n")
    return "".join(lines).encode()


def with_a_record_mutated(rng: random.Random, data: bytes) -> bytes:
    """A log with one record changed, and with the right checksums."""
    texts = [line.split(b" ", 1)[1].decode() for line in data.splitlines()]
    k = rng.randrange(len(texts))
    texts[k] = json.dumps(mutated(rng, json.loads(texts[k])))
    return rechained(texts)
