"""The records of a trajectory log: frozen dataclasses, and their JSON.

    header      the model: names, shapes, dtypes and fingerprints of the base weights;
                the version of the definition of directions
    run         the configuration in force from this step on; written whenever it changes
    evaluation  the form of evaluation from this step on, so that a restarted run computes the same
                bits
    step_size   the step size that was measured, with `"lr": "auto"`
    refresh     a new anchor: the coefficients of its full-batch gradient, along which a step was
                made
    step        the coefficients of a step's estimate, its loss and step size, the loader's position
                and the selector's choice

Seeds are not stored: they follow from the base seed and the step (`zods.core.update_rule`).
Coefficients are float32 or bfloat16, in base64. `zods.trajectory.record_parser` reads records.
Called by the log, the replay and `zods.training`.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zods.config.schema import SVRG_ONLY, ZerothOrderConfig
from zods.core.anchor_weight import AnchorWeight

FORMAT = 1
# Identifies the meaning of a log's numbers. It changes when the same log would give other weights.
DEFINITION = (
    "philox4x32-10, blake2b seeds, float32 fused multiply-add, bfloat16 rounded stochastically; 1"
)
# Keys of the section "zeroth_order" that first-order training uses.
FIRST_ORDER = ("seed", "selector", "loss_mean", "group_by_length", "mixture")
# Keys that logs of earlier versions do not have, with what they meant there. Most are no longer the
# defaults.
EARLIER = {
    "normalize": False,
    "examples_per_direction": "all",
    "anchor_weight": 1.0,
    "anchor_split": False,
    "anchor_examples": None,
    "objective": "loss",
    "group_by_length": False,
    "mixture": None,
    "generate": None,
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
    version of each package that computes, and digests of zods's own files, of the model's and of
    the tokenizer; None in logs of earlier versions. updates: with an optimizer, DeepSpeed's other
    keys that change the updates; None in logs of earlier versions.
    """

    step: int
    section: ZerothOrderConfig
    batch: int
    world_size: int
    about: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    code: dict[str, str] | None = None
    updates: dict[str, Any] | None = None

    def describes(self) -> dict[str, Any]:
        """The JSON without step and code: equal for two records of the same configuration."""
        return {**self.to_json(), "run": None, "code": None}

    def to_json(self) -> dict[str, Any]:
        section = self.section.to_dict()
        # no bit depends on them, or they are recorded with the code
        for key in ("replicas", "load_timeout", "comm", "fused_norm", "dataloader_num_workers"):
            del section[key]
        for key, value in EARLIER.items():
            if section[key] == value:
                del section[key]
        section["anchor"] = {
            key: value for key, value in section["anchor"].items() if key not in NOT_RECORDED
        }
        if not self.section.is_svrg:
            section = {key: value for key, value in section.items() if key not in SVRG_ONLY}
        if self.optimizer is not None:
            section = {key: section[key] for key in FIRST_ORDER if key in section}
        return {
            "run": self.step,
            "batch": self.batch,
            "world_size": self.world_size,
            "about": self.about,
            **({} if self.optimizer is None else {"optimizer": self.optimizer}),
            **({} if self.updates is None else {"updates": self.updates}),
            **({} if self.code is None else {"code": self.code}),
            "zeroth_order": section,
        }


@dataclass(frozen=True)
class Evaluation:
    """The form of evaluation from a step on.

    form: see `Evaluator`. streams: points per forward. from_logits: whether separate forwards give
    logits, of which losses are made, and not the model's own loss. A stack always does, without this
    entry; earlier versions never did.
    """

    step: int
    form: str
    streams: int
    from_logits: bool = False

    def to_json(self) -> dict[str, Any]:
        made = {"from_logits": True} if self.from_logits else {}
        return {"evaluation": self.step, "form": self.form, "streams": self.streams, **made}


@dataclass(frozen=True)
class StepSize:
    """The step size from a step on, where it is measured.

    The schedule and annealing multiply it. loss, distance, trace, size, share: what it follows
    from, see `zods.training.step_size` and `zods.core.step_size`. factor: by which lr was reduced
    where it was tried.
    """

    step: int
    lr: float
    loss: float
    distance: float
    trace: float
    size: float
    share: float
    factor: float = 1.0

    def to_json(self) -> dict[str, Any]:
        return {
            "step_size": self.step,
            "lr": self.lr,
            "loss": self.loss,
            "distance": self.distance,
            "trace": self.trace,
            "size": self.size,
            "share": self.share,
            **({} if self.factor == 1.0 else {"factor": self.factor}),
        }


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


Record = RunRecord | Evaluation | StepSize | Refresh | Step


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
