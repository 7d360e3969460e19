"""Directions as seeds: which direction a step draws is a function of (base seed, purpose, step, index), never sent.

The direction itself, z(seed, parameter, element), is defined in `zods.kernels`.
"""

from __future__ import annotations

import hashlib
import struct

from zods.kernels import DISTRIBUTIONS

__all__ = ["DISTRIBUTIONS", "PURPOSES", "derive_seed"]

PURPOSES = ("step", "step_anchor", "anchor", "rounding", "anchor_rounding")


def derive_seed(base_seed: int, purpose: str, step: int, index: int = 0) -> int:
    """The 64-bit seed of direction `index` of step `step` for one of `PURPOSES`.

    BLAKE2b of the four numbers: seeds of different purposes, steps and indices are unrelated, whatever the base seed.
    """
    message = struct.pack("<QIQI", base_seed, PURPOSES.index(purpose), step, index)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8, person=b"zods-seed").digest(), "little")
