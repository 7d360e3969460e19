"""Digests of examples. Ranks and restarted runs compare them to detect that their data differ."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import datetime
import decimal
import enum
import fractions
import hashlib
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import torch

SECONDS = 20.0  # that a start may take to read all examples of a dataset that is not in memory
SAMPLE = 64  # examples by which the time is measured
ROWS = 1000  # rows of a table that are digested together
# types whose values are shown whole by `repr`
SHOWN = (
    *(datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, fractions.Fraction),
    *(complex, bytearray, uuid.UUID, enum.Enum, range),
)


class ExampleDigests:
    """Digests of a map-style dataset, and of the examples of a selector's target, if any.

    repeatable: whether examples are the same when they are read again. They are not where they are
    augmented at random. affordable: the number of examples to digest. It is all of them where the
    dataset is a table of Arrow, or where they are read within SECONDS.
    """

    def __init__(self, dataset: Any, target_data: Any = None) -> None:
        self._dataset = dataset
        self._of_target: str | None = None  # digest of the target's examples
        if target_data is not None:
            self._of_target = digest_of(_rows(target_data))
        self._digests: dict[int, str] = {}  # number of examples -> digest
        sample = min(SAMPLE, len(dataset))
        first = self._of_rows(sample)
        began = time.perf_counter()
        self.repeatable = self._of_rows(sample) == first
        seconds = (time.perf_counter() - began) / sample
        if target_data is not None:
            self.repeatable &= digest_of(_rows(target_data)) == self._of_target
        self.affordable = len(dataset)
        if not _is_table(dataset) and seconds * len(dataset) > SECONDS:
            self.affordable = max(sample, int(SECONDS / seconds))

    def limit(self) -> str | None:
        """In one line, which examples no digest covers; None where all are covered."""
        if not self.repeatable:
            return (
                "training data: an example differs when it is read again, as after random "
                "augmentation, so that ranks and restarts do not compare their examples"
            )
        if self.affordable < len(self):
            return (
                f"training data: reading all {len(self)} examples would take more than "
                f"{SECONDS:.0f} s, so that ranks and restarts compare {self.affordable} of them"
            )
        return None

    def __len__(self) -> int:
        return len(self._dataset)

    def digest(self, count: int) -> str | None:
        """A digest of `count` examples, evenly spread: "`count`:16 hexadecimal digits".

        None where the examples are not repeatable.
        """
        if not self.repeatable:
            return None
        count = min(max(count, 1), len(self))
        if count not in self._digests:
            whole = count == len(self) and _is_table(self._dataset)
            digest = _of_table(self._dataset) if whole else self._of_rows(count)
            if self._of_target is not None:
                digest = digest_of([digest, self._of_target])
            self._digests[count] = f"{count}:{digest}"
        return self._digests[count]

    def _of_rows(self, count: int) -> str:
        size = len(self._dataset)
        return digest_of(self._dataset[k * size // count] for k in range(count))


def _rows(dataset: Any) -> Iterator[Any]:
    return (dataset[i] for i in range(len(dataset)))


def digest_of(rows: Iterable[Any]) -> str:
    """A digest of examples, 16 hexadecimal digits.

    It covers tensors, arrays, images, strings, numbers, dates, and dataclasses and containers of
    these. For a value of another type it covers the type's name only.
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
        if set(map(type, value)) == {int}:
            with contextlib.suppress(OverflowError):
                hasher.update(array.array("q", value).tobytes())  # token ids: ten times as fast
                return
        for item in value:
            _update(hasher, item)
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        hasher.update(f"{type(value).__name__} {value!r};".encode())
    elif hasattr(value, "tobytes") and hasattr(value, "dtype"):  # an array or scalar of numpy
        if value.dtype.hasobject:  # its bytes are addresses
            _update(hasher, value.tolist())
            return
        hasher.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    else:
        hasher.update(type(value).__name__.encode())
        _update_other(hasher, value)


def _update_other(hasher: Any, value: Any) -> None:
    """Update with the content of a value of a less common type, where it is known how to read it."""
    if hasattr(value, "tobytes"):  # an image of PIL, an array of Python
        form = [getattr(value, name, None) for name in ("mode", "size", "typecode")]
        hasher.update(repr(form).encode() + value.tobytes())
    elif isinstance(value, (set, frozenset)):
        hasher.update("".join(sorted(digest_of([item]) for item in value)).encode())
    elif dataclasses.is_dataclass(value):
        _update(hasher, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif isinstance(value, SHOWN):
        hasher.update(repr(value).encode())


# --- tables of Arrow ------------------------------------------------------------------------------


def _is_table(dataset: Any) -> bool:
    """Whether a dataset is one of the library datasets whose examples are the rows of its table."""
    form = getattr(dataset, "format", None)
    return (
        type(dataset).__module__ == "datasets.arrow_dataset"
        and isinstance(form, Mapping)
        and form.get("type") != "custom"  # a function computes the examples
    )


def _of_table(dataset: Any) -> str:
    """A digest of all rows of a table, by columns, without making Python objects of the values."""
    hasher = hashlib.blake2b(digest_size=8)
    names = sorted(dataset.column_names)
    hasher.update(repr((len(dataset), names)).encode())
    for batch in dataset.with_format("arrow").iter(batch_size=ROWS):
        for name in names:
            _update_column(hasher, batch[name].combine_chunks())
    return hasher.hexdigest()


def _update_column(hasher: Any, column: pa.Array) -> None:
    """Update with a column's type, with which values are null, and with the values."""
    kind, types = column.type, pa.types
    hasher.update(f"{kind} {len(column)} {column.null_count};".encode())
    if column.null_count:
        hasher.update(column.is_null().to_numpy(zero_copy_only=False).tobytes())
    if types.is_list(kind) or types.is_large_list(kind):
        lengths = column.value_lengths().fill_null(0)
        hasher.update(lengths.to_numpy(zero_copy_only=False).tobytes())
        _update_column(hasher, column.flatten())
    elif types.is_string(kind) or types.is_large_string(kind):
        texts = column.fill_null("").to_pylist()
        hasher.update(array.array("q", map(len, texts)).tobytes())
        hasher.update("".join(texts).encode())
    elif types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        filled = column.fill_null(False if types.is_boolean(kind) else 0)
        hasher.update(filled.to_numpy(zero_copy_only=False).tobytes())
    else:
        _update(hasher, column.to_pylist())
