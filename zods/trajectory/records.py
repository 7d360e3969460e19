"""The records of a trajectory log: frozen dataclasses, their JSON, and the checks of a read record.

    header      the model: names, shapes, dtypes and fingerprints of the base weights;
                the version of the definition of directions
    run         the configuration in force from this step on; written whenever it changes
    evaluation  the form of evaluation from this step on, so that a restarted run computes the same
                bits
    refresh     a new anchor: the coefficients of its full-batch gradient, along which a step was
                made
    step        the coefficients of a step's estimate, its loss and step size, the loader's position
                and the selector's choice

Seeds are not stored: they follow from the base seed and the step (`zods.core.update_rule`).
Coefficients are in base64, of float32 or bfloat16 numbers. Called by the log, the replay and `zods.training`.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zods.config.schema import SVRG_ONLY, ZerothOrderConfig, parse_section
from zods.core.anchor_weight import AnchorWeight

FORMAT = 1
# Identifies the meaning of a log's numbers. It changes when the same log would give other weights.
DEFINITION = (
    "philox4x32-10, blake2b seeds, float32 fused multiply-add, bfloat16 rounded stochastically; 1"
)
# Keys of the section "zeroth_order" that first-order training uses.
FIRST_ORDER = ("seed", "selector", "loss_mean")
# Keys that logs of earlier versions do not have, with what they meant there.
EARLIER = {
    "normalize": False,
    "examples_per_direction": "all",
    "anchor_weight": 1.0,
    "anchor_split": False,
    "anchor_examples": None,
}
# Keys of the subsection "anchor" that are not written: no bit depends on them.
NOT_RECORDED = ("nvme_path", "buffer_count", "buffer_size", "pin_memory")


@dataclass(frozen=True)
class ParameterRecord:
    """One parameter of the header, in the order of `named_parameters()`.

    fingerprint: of the parameter's base weights, see `zods.kernels`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  # such as "bfloat16"
    trained: bool
    fingerprint: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def to_json(self) -> list[Any]:
        return [
            self.name,
            list(self.shape),
            self.dtype,
            int(self.trained),
            f"{self.fingerprint:016x}",
        ]


@dataclass(frozen=True)
class Header:
    """The first record.

    model: name of the model's class. tied: other name of a tied parameter -> its name in
    `parameters`. data: number of training examples, and their digest (`zods.data.digest`). config:
    the model's configuration, as JSON; None where the model has none.
    """

    model: str
    parameters: tuple[ParameterRecord, ...]
    tied: dict[str, str] = field(default_factory=dict)
    data: tuple[int, str] | None = None
    config: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "header": FORMAT,
            "definition": DEFINITION,
            "model": self.model,
            "parameters": [parameter.to_json() for parameter in self.parameters],
            "tied": self.tied,
            "data": None if self.data is None else list(self.data),
            **({} if self.config is None else {"config": self.config}),
        }


@dataclass(frozen=True)
class RunRecord:
    """The configuration in force from a step on.

    section: the section "zeroth_order". batch: train_batch_size. about: other information, for
    human readers. optimizer: DeepSpeed's section "optimizer" with first-order training, otherwise
    None. With an optimizer, only the keys FIRST_ORDER of `section` are used and written. code: the
    version of each package that computes, and a digest of zods's own files; None in logs of earlier
    versions.
    """

    step: int
    section: ZerothOrderConfig
    batch: int
    world_size: int
    about: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    code: dict[str, str] | None = None

    def describes(self) -> dict[str, Any]:
        """The JSON without step and code: equal for two records of the same configuration."""
        return {**self.to_json(), "run": None, "code": None}

    def to_json(self) -> dict[str, Any]:
        section = self.section.to_dict()
        del section["replicas"], section["load_timeout"]  # no bit depends on them
        for key, value in EARLIER.items():
            if section[key] == value:
                del section[key]
        section["anchor"] = {
            key: value for key, value in section["anchor"].items() if key not in NOT_RECORDED
        }
        if not self.section.is_svrg:
            section = {key: value for key, value in section.items() if key not in SVRG_ONLY}
        if self.optimizer is not None:
            section = {key: section[key] for key in FIRST_ORDER}
        return {
            "run": self.step,
            "batch": self.batch,
            "world_size": self.world_size,
            "about": self.about,
            **({} if self.optimizer is None else {"optimizer": self.optimizer}),
            **({} if self.code is None else {"code": self.code}),
            "zeroth_order": section,
        }


@dataclass(frozen=True)
class Evaluation:
    """The form of evaluation from a step on. form: see `Evaluator`. streams: points per forward."""

    step: int
    form: str
    streams: int

    def to_json(self) -> dict[str, Any]:
        return {"evaluation": self.step, "form": self.form, "streams": self.streams}


@dataclass(frozen=True)
class Refresh:
    """A refresh of the anchor.

    coefficients: of the full-batch gradient. Empty if its losses were not finite: the previous
    anchor then stays in force. rms: the gradient is divided by it for its step; None: it is not.
    in_16_bits: the coefficients are rounded to bfloat16.
    """

    step: int
    lr: float
    coefficients: tuple[float, ...]
    rms: float | None = None
    in_16_bits: bool = False

    @property
    def step_size(self) -> float:
        """The factor of the gradient in the update."""
        return self.lr if self.rms is None else self.lr / self.rms

    def to_json(self) -> dict[str, Any]:
        return {
            "refresh": self.step,
            "lr": self.lr,
            **({} if self.rms is None else {"rms": self.rms}),
            **_coefficients(self.coefficients, self.in_16_bits),
        }


@dataclass(frozen=True)
class SubBatch:
    """The examples that a selector chose for the steps from this one on.

    indices: positions of the chosen examples among the candidates, in the order of their ids.
    weights: None if all weights are 1. mean: mean of the derivatives of the chosen examples; the
    paper's features of the next selection depend on it.
    """

    num_candidates: int
    indices: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    mean: float | None = None

    def to_json(self) -> dict[str, Any]:
        bits = sum(1 << i for i in self.indices).to_bytes(-(-self.num_candidates // 8), "little")
        optional = {
            "weights": None
            if self.weights is None
            else [int(weight) if weight.is_integer() else weight for weight in self.weights],
            "mean": self.mean,
        }
        given = {key: value for key, value in optional.items() if value is not None}
        return {"of": self.num_candidates, "bits": base64.b64encode(bits).decode(), **given}


@dataclass(frozen=True)
class Step:
    """One step.

    loss: the mean over the global batch, None if it is not finite. coefficients: of the estimate.
    Empty if the step was skipped; None for a step of first-order training, which cannot be
    replayed. at: (epoch, step in the epoch) of the loader after the step. rms: the estimate is
    divided by it (`zods.core.step_scale`); None: it is not. weight: of the anchor. products: from
    which the weights of later steps follow; None where the weight is a number of the configuration.
    in_16_bits: the coefficients are rounded to bfloat16.
    """

    step: int
    loss: float | None
    lr: float
    coefficients: tuple[float, ...] | None
    at: tuple[int, int] | None = None
    sub_batch: SubBatch | None = None
    rms: float | None = None
    weight: float = 1.0
    products: AnchorWeight | None = None
    in_16_bits: bool = False

    @property
    def step_size(self) -> float:
        """The factor of the estimate in the update."""
        return self.lr if self.rms is None else self.lr / self.rms

    @property
    def measured(self) -> dict[str, float]:
        """What the step measured for its update, by name: "rms" and "anchor_weight", if any."""
        rms = {} if self.rms is None else {"rms": self.rms}
        return rms if self.products is None else {**rms, "anchor_weight": self.weight}

    @property
    def skipped(self) -> bool:
        return self.coefficients == ()

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {"step": self.step, "loss": self.loss, "lr": self.lr}
        if self.rms is not None:
            record["rms"] = self.rms
        if self.weight != 1.0:
            record["w"] = self.weight
        if self.products is not None:
            record["ca"] = [self.products.ca, self.products.aa]
        if self.at is not None:
            record["at"] = list(self.at)
        if self.coefficients is not None:
            record |= _coefficients(self.coefficients, self.in_16_bits)
        if self.sub_batch is not None:
            record["sub"] = self.sub_batch.to_json()
        return record


Record = RunRecord | Evaluation | Refresh | Step


def packed(coefficients: Sequence[float]) -> str:
    """Encode coefficients as little-endian float32 in base64.

    >>> packed([1.0])
    'AACAPw=='
    """
    return base64.b64encode(struct.pack(f"<{len(coefficients)}f", *coefficients)).decode()


def _coefficients(values: Sequence[float], in_16_bits: bool) -> dict[str, str]:
    return {"h": packed_16_bits(values)} if in_16_bits else {"c": packed(values)}


def packed_16_bits(coefficients: Sequence[float]) -> str:
    """Encode coefficients that are bfloat16 numbers as little-endian bfloat16 in base64.

    >>> packed_16_bits([1.0])
    'gD8='
    """
    data = struct.pack(f"<{len(coefficients)}f", *coefficients)
    return base64.b64encode(b"".join(data[i + 2 : i + 4] for i in range(0, len(data), 4))).decode()


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
    known = ("batch", "world_size", "about", "zeroth_order", "optimizer", "code")
    get = _Reader(values, "run", known)
    section, optimizer = get("zeroth_order", dict), get("optimizer", dict, None)
    if optimizer is not None:
        section = {"method": "mezo", **section}
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
    get = _Reader(values, "evaluation", ("form", "streams"))
    return Evaluation(get.count("evaluation"), get("form", str), get.count("streams", 1))


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
    "run": _run,
}
