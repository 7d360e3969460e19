"""Parse the JSON of a log's records, and check it.

Every value is checked: its type, its range, and whether its key is known. Logs of earlier versions
are read with the meaning that they had. Called by the log, and where records are received or
restored (`zods.training`).
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zods.config.schema import SVRG_ONLY, parse_section
from zods.core.anchor_weight import AnchorWeight
from zods.trajectory.records import (
    DEFINITION,
    EARLIER,
    FORMAT,
    Evaluation,
    Header,
    ParameterRecord,
    Record,
    Refresh,
    RunRecord,
    Step,
    StepSize,
    SubBatch,
)


def header_of(values: Any) -> Header:
    """Parse and check a header's JSON. Raises ValueError where it is not valid."""
    known = ("definition", "model", "parameters", "tied", "data", "config")
    get = _Reader(values, "header", known)
    if get("header", int) != FORMAT:
        raise ValueError(
            f"header: format {values['header']}; this version of zods reads format {FORMAT}"
        )
    if get("definition", str) != DEFINITION:
        raise ValueError(f"header: its numbers mean {values['definition']!r}, here {DEFINITION!r}")
    tied, data = get("tied", dict), get("data", (list, type(None)))
    if not all(isinstance(name, str) for name in tied.values()):
        raise ValueError("header: tied: names are expected")
    if data is not None and [type(value) for value in data] != [int, str]:
        raise ValueError("header: data: a number and a digest are expected")
    parameters = tuple(_parameter(entry) for entry in get("parameters", list))
    names = [parameter.name for parameter in parameters]
    if len(set(names)) < len(names):
        raise ValueError("header: a parameter is named twice")
    examples = None if data is None else (data[0], data[1])
    config = get("config", (dict, type(None)), None)
    return Header(get("model", str), parameters, tied, examples, config)


def record_of(values: Any) -> Record:
    """Parse and check the JSON of a record after the header. Raises ValueError if not valid."""
    if not isinstance(values, dict):
        raise ValueError("a record must be an object")
    for kind, parse in _KINDS.items():
        if kind in values:
            return parse(values)
    raise ValueError(f"a record of no known kind: {', '.join(map(str, values)) or 'empty'}")


class _Reader:
    """Reader of a record's values that checks keys, types and ranges."""

    def __init__(self, values: Any, kind: str, others: Sequence[str]) -> None:
        if not isinstance(values, dict):
            raise ValueError(f"{kind}: an object is expected")
        unknown = sorted(set(values) - {kind, *others})
        if unknown:
            raise ValueError(f"{kind}: unknown key {unknown[0]!r}")
        self._values, self._kind = values, kind

    def __call__(self, key: str, kinds: type | tuple[type, ...], default: Any = ...) -> Any:
        if key not in self._values:
            if default is ...:
                raise ValueError(f"{self._kind}: {key} is missing")
            return default
        value = self._values[key]
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{self._kind}: {key} is {value!r}")
        if (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and not math.isfinite(value)
        ):
            raise ValueError(f"{self._kind}: {key} is {value!r}")
        return value

    def count(self, key: str, at_least: int = 0) -> int:
        value = self(key, int)
        if not at_least <= value < 2**53:
            raise ValueError(f"{self._kind}: {key} is {value}")
        return value

    def number(self, key: str) -> float:
        return float(self(key, (int, float)))

    def scale(self, key: str) -> float | None:
        """A positive number, or None where there is none."""
        if key not in self._values:
            return None
        value = self.number(key)
        if value <= 0.0:
            raise ValueError(f"{self._kind}: {key} is {value!r}")
        return value

    def coefficients(self) -> tuple[tuple[float, ...], bool]:
        """The coefficients, and whether they have 16 bits."""
        in_16_bits = "h" in self._values
        if in_16_bits and "c" in self._values:
            raise ValueError(f"{self._kind}: c and h are given, expected one of them")
        key, size = ("h", 2) if in_16_bits else ("c", 4)
        data = _decoded(self(key, str), f"{self._kind}: {key}")
        if len(data) % size:
            raise ValueError(
                f"{self._kind}: {key} holds {len(data)} bytes, no whole number of coefficients"
            )
        if in_16_bits:  # the upper half of a float32
            data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
        values = struct.unpack(f"<{len(data) // 4}f", data)
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{self._kind}: {key} holds a coefficient that is not finite")
        return values, in_16_bits


def _decoded(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{what}: not base64 ({error})") from None


def _parameter(entry: Any) -> ParameterRecord:
    if not isinstance(entry, list) or len(entry) != 5:
        raise ValueError(
            "header: parameters: [name, shape, dtype, trained, fingerprint] is expected"
        )
    name, shape, dtype, trained, fingerprint = entry
    if not (
        isinstance(name, str)
        and isinstance(dtype, str)
        and isinstance(fingerprint, str)
        and trained in (0, 1)
    ):
        raise ValueError(f"header: parameters: {entry!r}")
    if not isinstance(shape, list) or not all(
        type(size) is int and 0 <= size < 2**53 for size in shape
    ):
        raise ValueError(f"header: the shape of {name} is {shape!r}")
    try:
        return ParameterRecord(name, tuple(shape), dtype, bool(trained), int(fingerprint, 16))
    except ValueError:
        raise ValueError(f"header: the fingerprint of {name} is {fingerprint!r}") from None


def _run(values: dict[str, Any]) -> RunRecord:
    known = ("batch", "world_size", "about", "zeroth_order", "optimizer", "code", "updates")
    get = _Reader(values, "run", known)
    section, optimizer = get("zeroth_order", dict), get("optimizer", dict, None)
    if optimizer is None:
        section = _of_this_version(section, get.count("batch", 1), get.count("world_size", 1))
    anchor = section.get("anchor")
    if isinstance(anchor, Mapping) and "nvme" in (anchor.get("point"), anchor.get("gradient")):
        section = {**section, "anchor": {**anchor, "nvme_path": "(not recorded)"}}
    return RunRecord(
        get.count("run"),
        parse_section(section),
        get.count("batch", 1),
        get.count("world_size", 1),
        get("about", dict),
        optimizer,
        get("code", (dict, type(None)), None),
        get("updates", (dict, type(None)), None),
    )


def _of_this_version(section: dict[str, Any], batch: int, world_size: int) -> dict[str, Any]:
    """The section "zeroth_order" of a log of any version, with the keys of this one."""
    svrg = section.get("method") == "mezo_svrg"
    earlier = {key: value for key, value in EARLIER.items() if svrg or key not in SVRG_ONLY}
    section = {**earlier, **section}
    # each rank had directions of its own
    if section.pop("directions", None) == "per_rank":
        section["examples_per_direction"] = batch // world_size
    return section


def _evaluation(values: dict[str, Any]) -> Evaluation:
    get = _Reader(values, "evaluation", ("form", "streams", "from_logits"))
    return Evaluation(
        get.count("evaluation"),
        get("form", str),
        get.count("streams", 1),
        get("from_logits", bool, False),
    )


STEP_SIZE_FIGURES = ("loss", "distance", "trace", "size", "share")


def _step_size(values: dict[str, Any]) -> StepSize:
    get = _Reader(values, "step_size", ("lr", *STEP_SIZE_FIGURES, "factor"))
    figures = {key: get.number(key) for key in STEP_SIZE_FIGURES}
    figures["factor"] = get.scale("factor") or 1.0
    lr = get.number("lr")
    if not lr > 0.0:
        raise ValueError(f"step_size: lr is {lr!r}")
    return StepSize(get.count("step_size"), lr, **figures)


def _refresh(values: dict[str, Any]) -> Refresh:
    get = _Reader(values, "refresh", ("lr", "rms", "c", "h"))
    coefficients, in_16_bits = get.coefficients()
    lr, rms = get.number("lr"), get.scale("rms")
    return Refresh(get.count("refresh"), lr, coefficients, rms, in_16_bits)


def _step(values: dict[str, Any]) -> Step:
    get = _Reader(values, "step", ("loss", "lr", "rms", "w", "ca", "at", "c", "h", "sub"))
    at = get("at", list, None)
    if at is not None and not (
        len(at) == 2 and all(type(value) is int and 0 <= value < 2**53 for value in at)
    ):
        raise ValueError(f"step: at is {at!r}")
    loss = get("loss", (int, float, type(None)))
    coefficients, in_16_bits = get.coefficients() if {"c", "h"} & set(values) else (None, False)
    return Step(
        get.count("step"),
        None if loss is None else float(loss),
        get.number("lr"),
        coefficients,
        None if at is None else (at[0], at[1]),
        _sub_batch(values["sub"]) if "sub" in values else None,
        get.scale("rms"),
        float(get("w", (int, float), 1.0)),
        _products(get("ca", list, None)),
        in_16_bits,
    )


def _products(values: list[Any] | None) -> AnchorWeight | None:
    if values is None:
        return None
    if len(values) != 2 or not all(
        type(value) in (int, float) and math.isfinite(value) for value in values
    ):
        raise ValueError(f"step: ca is {values!r}")
    return AnchorWeight(*map(float, values))


def _sub_batch(values: Any) -> SubBatch:
    get = _Reader(values, "of", ("bits", "weights", "mean"))
    number = get.count("of", 1)
    data = _decoded(get("bits", str), "sub_batch: bits")
    bits = int.from_bytes(data, "little")
    if len(data) != -(-number // 8) or bits.bit_length() > number:
        raise ValueError(f"sub_batch: {len(data)} bytes of bits for {number} candidates")
    indices = tuple(i for i in range(number) if bits >> i & 1)
    weights, mean = get("weights", list, None), get("mean", (int, float), None)
    if weights is not None and not (
        len(weights) == len(indices)
        and all(type(weight) in (int, float) and math.isfinite(weight) for weight in weights)
    ):
        raise ValueError("sub_batch: one weight per chosen example is expected")
    return SubBatch(
        number,
        indices,
        None if weights is None else tuple(map(float, weights)),
        None if mean is None else float(mean),
    )


_KINDS: dict[str, Callable[[dict[str, Any]], Record]] = {
    "step": _step,
    "refresh": _refresh,
    "evaluation": _evaluation,
    "step_size": _step_size,
    "run": _run,
}
