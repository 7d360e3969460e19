"""Digests of examples. Ranks and restarted runs compare them to detect that their data differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch


def digest_of(rows: Iterable[Any]) -> str:
    """A digest of examples, 16 hexadecimal digits.

    It covers tensors, arrays, strings, numbers and containers of these. For a value of another type
    it covers the type's name only.
    """
    hasher = hashlib.blake2b(digest_size=8)
    for row in rows:
        _update(hasher, row)
    return hasher.hexdigest()


def _update(hasher: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
        hasher.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            hasher.update(f"{key}:".encode())
            _update(hasher, value[key])
    elif isinstance(value, (list, tuple)):
        hasher.update(f"[{len(value)}".encode())
        for item in value:
            _update(hasher, item)
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        hasher.update(f"{type(value).__name__} {value!r};".encode())
    elif hasattr(value, "tobytes"):  # an array or scalar of numpy
        hasher.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    else:
        hasher.update(type(value).__name__.encode())


def sample_digest(dataset: Any) -> str | None:
    """A digest of up to 64 examples, evenly spread over the dataset.

    None if the first example differs when it is read again, as with random augmentation.
    """
    if digest_of([dataset[0]]) != digest_of([dataset[0]]):
        return None
    size = len(dataset)
    count = min(64, size)
    return digest_of(dataset[k * size // count] for k in range(count))
