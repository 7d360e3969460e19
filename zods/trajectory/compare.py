"""Comparison of two logs: their differences, and whether one log continues the other.

Called by `python -m zods.trajectory` (diff and merge).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zods.trajectory.log import Log
from zods.trajectory.records import Refresh, RunRecord, Step


def differences(left: Log, right: Log) -> Iterator[str]:
    """Yield one line per difference: in the headers, the first differing record, the lengths."""
    yield from _field_differences("header", left.header.to_json(), right.header.to_json())
    for one, other in zip(left.records, right.records, strict=False):
        if one != other:
            yield from _field_differences(f"after {one.step} steps", one.to_json(), other.to_json())
            break
    if left.num_steps != right.num_steps:
        yield f"steps: {left.num_steps} and {right.num_steps}"


def _field_differences(where: str, one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    """Yield one line per differing field of two records. where: the start of each line."""
    if next(iter(one)) != next(iter(other)):
        yield f"{where}: a record of kind {next(iter(one))!r} and one of kind {next(iter(other))!r}"
        return
    for key in sorted(one.keys() | other.keys()):
        left, right = one.get(key), other.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _field_differences(
                f"{where}: {key}", {"": None, **left}, {"": None, **right}
            )
        elif isinstance(left, list) and isinstance(right, list) and left != right:
            odd = [pair for pair in zip(left, right, strict=False) if pair[0] != pair[1]]
            yield f"{where}: {key}: " + (
                f"{odd[0][0]} and {odd[0][1]}" if odd else f"{len(left)} and {len(right)} of them"
            )
        elif left != right:
            yield f"{where}: {key}: {left} and {right}"


def longer(left: Log, right: Log) -> Log:
    """The longer log, which must continue the other.

    Raises ValueError, with the reason, if each log has steps that are not in the other, because
    steps do not commute.
    """
    first, second = sorted((left, right), key=lambda log: len(log.records))
    if second.heads[: len(first.heads)] == first.heads:
        return second
    if left.header != right.header:
        what = next(_field_differences("", left.header.to_json(), right.header.to_json()))
        raise ValueError(
            f"{left.path} and {right.path} do not start from the same model or data{what}."
        )
    common = next(
        k
        for k, (one, other) in enumerate(zip(left.heads, right.heads, strict=True))
        if one != other
    )
    raise ValueError(
        f"{left.path} and {right.path} have {left.records[common - 1].step} steps in common, then "
        f"each its own. These do not commute: {_reasons(left, right)}. Replay one of them."
    )


def _reasons(left: Log, right: Log) -> str:
    """The reasons why the steps of two logs do not commute, for an error message."""
    records = [*left.records, *right.records]
    sections = [record.section for record in records if isinstance(record, RunRecord)]
    reasons = []
    if any(section.weight_decay for section in sections):
        reasons.append("weight decay multiplies what came before it")
    if any(isinstance(record, Refresh) for record in records):
        reasons.append("a step takes the anchor of its own past")
    if any(isinstance(record, Step) for record in records):
        dtypes = {parameter.dtype for parameter in left.header.parameters if parameter.trained}
        reasons.append(
            f"every step rounds the weights to {' or '.join(sorted(dtypes))}, so that their order "
            "shows in the bits"
        )
    return "; ".join(reasons) or "their configurations differ"
