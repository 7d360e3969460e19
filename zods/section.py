"""The section "zeroth_order" of the configuration, as frozen dataclasses, and its checks.

Every mistake is one line: the key, what was found and what is allowed. All mistakes are raised at once (`Mistakes`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

SECTION = "zeroth_order"
METHODS = ("mezo", "mezo_svrg")
DISTRIBUTIONS = ("gaussian", "rademacher", "low_rank")
LOSS_MEANS = ("tokens", "examples")
EVALUATIONS = ("auto", "stacked", "lockstep", "sequential")
PLACES = ("device", "cpu", "nvme", "terms")
STRATEGIES = ("greedy", "stochastic_greedy", "greedi", "random", "structured_random", "longest", "highest_loss")
BY_SOURCE = (*STRATEGIES[:3], "structured_random")
FEATURES = ("exact", "zo", "paper")
METRICS = ("l1", "l2", "cosine")


@dataclass(frozen=True)
class AnchorConfig:
    """Where the anchor of MeZO-SVRG is kept.

    point: the parameters at the last refresh. gradient: the full-batch estimate there.
    Each is a copy on the `device`, on `cpu` or in `nvme` files, or is made when needed from its `terms` (no bytes).
    """

    point: str = "cpu"
    gradient: str = "cpu"
    nvme_path: str | None = None  # a folder on the drive; needed for nvme
    buffer_count: int = 3  # nvme: buffers of the point and of the gradient; 2 or more overlap I/O
    buffer_size: int = 1 << 22  # nvme: elements per buffer
    pin_memory: bool = True  # cpu: page-locked where there is a GPU

    def places(self) -> tuple[str, str]:
        return (self.point, self.gradient)


@dataclass(frozen=True)
class DirectionConfig:
    """How z is drawn: each element gaussian or +-1, or each matrix U V^T / sqrt(rank) and the rest gaussian."""

    distribution: str = "gaussian"
    rank: int = 1  # of low_rank


@dataclass(frozen=True)
class AnnealConfig:
    """Divide the step sizes by `alpha` when an epoch's mean loss exceeds `threshold` times the one before."""

    alpha: float = 5.0
    threshold: float = 1.05


@dataclass(frozen=True)
class SelectorConfig:
    """Small sub-batches that stand for large ones (Nguyen et al. 2024, arXiv:2407.19580v1). See `zods.selection`."""

    candidates: int  # examples of a large batch, from which train_batch_size are chosen
    strategy: str = "greedy"  # facility location; or a baseline
    source_column: str | None = None  # of the data; without one, clusters of features are the sources
    num_clusters: int = 8  # where there is no column; 1 makes no difference between examples
    quotas: dict[str, int] | None = None  # source: number chosen; None: small sources whole, the others in proportion
    weights: str = "uniform"  # of the chosen in the loss; or cluster: how many each stands for
    warmup_steps: int = 0  # steps with random sub-batches, small sources whole, before the first choice
    interval: int = 1  # steps that are made with a sub-batch before the next is chosen
    metric: str = "l2"  # between features
    features: str = "exact"  # derivatives of a loss along directions of a matrix; or by differences: zo, paper
    num_directions: int = 64
    rank: int = 4  # of a direction
    pattern: str | None = None  # a regular expression found in the matrix's name; None: the last value projection
    eps: float = 1e-3  # zo, paper: distance of the points
    two_sided: bool = True  # zo: differences of two points, or of one and the parameters
    top: int = 2560  # paper: elements of the gradient that count


@dataclass(frozen=True)
class ReplicasConfig:
    """Several DeepSpeed worlds that train one model together. See `zods.replicas`."""

    store: str  # "host:port", which replica 0 keeps and the others reach
    index: int = 0  # this replica's, one of its own; 0 leads
    silence_timeout: float = 30.0  # seconds without a sign of life after which a replica is left out


@dataclass(frozen=True)
class ZerothOrderConfig:
    """The section "zeroth_order". Symbols in brackets are those of Gautam et al. 2024 (arXiv:2404.08080)."""

    method: str = "mezo_svrg"
    eps: float = 1e-3  # perturbation scale [mu]
    lr: float = 1e-6  # step size of a mini-batch step [eta_2]
    anchor_lr: float | None = None  # step size of the full-batch step at a refresh [eta_1]; None: as lr
    anchor_interval: int = 100  # steps between two refreshes [q]
    num_directions: int = 1  # per step
    anchor_directions: int = 1  # per refresh (K)
    share_direction: bool = True  # a step's two estimates use the same directions
    direction: DirectionConfig = field(default_factory=DirectionConfig)  # or the distribution's name alone
    directions: str = "shared"  # by all ranks; or per_rank: each evaluates its own on its part of the batch
    loss_mean: str = "tokens"  # over the global batch: of its label tokens' losses, or of its examples' means
    evaluation: str = "auto"  # of a step's points: in one stacked forward, in lockstep, or one after the other
    stream_memory_gb: float | None = None  # for the points of one forward; None: half of what is free
    seed: int = 42
    weight_decay: float = 0.0  # decoupled: lr * weight_decay per step, on parameters of two or more dimensions
    anneal: AnnealConfig | None = None
    stochastic_rounding: bool = True  # of updates to 16-bit parameters
    agreement_interval: int = 10  # steps between two checks that all ranks applied the same
    max_nonfinite_steps: int = 10  # steps in a row that may be skipped for a non-finite loss
    hang_timeout: float = 600.0  # seconds that one forward, or what follows it, may take; then who hangs is named
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    selector: SelectorConfig | None = None
    replicas: ReplicasConfig | None = None

    @property
    def is_svrg(self) -> bool:
        return self.method == "mezo_svrg"

    @property
    def most_points(self) -> int:
        """That are evaluated on one batch: of a step, or of a refresh."""
        return 2 * max(2 * self.num_directions, self.anchor_directions) if self.is_svrg else 2 * self.num_directions

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SVRG_ONLY = ("anchor_lr", "anchor_interval", "anchor_directions", "share_direction", "anchor")
_NESTED: dict[str, type] = {
    "anchor": AnchorConfig,
    "anneal": AnnealConfig,
    "direction": DirectionConfig,
    "selector": SelectorConfig,
    "replicas": ReplicasConfig,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "distribution": DISTRIBUTIONS,
    "directions": ("shared", "per_rank"),
    "loss_mean": LOSS_MEANS,
    "evaluation": EVALUATIONS,
    "point": PLACES,
    "gradient": PLACES,
    "strategy": STRATEGIES,
    "features": FEATURES,
    "metric": METRICS,
    "weights": ("uniform", "cluster"),
}
_MINIMUM: dict[str, float | tuple[float]] = {  # smallest allowed value; a tuple (x,) means strictly above x
    "eps": (0.0,),
    "lr": 0.0,
    "anchor_lr": 0.0,
    "anchor_interval": 1,
    "num_directions": 1,
    "anchor_directions": 1,
    "rank": 1,
    "stream_memory_gb": (0.0,),
    "seed": 0,
    "weight_decay": 0.0,
    "alpha": (1.0,),
    "threshold": (0.0,),
    "agreement_interval": 1,
    "max_nonfinite_steps": 0,
    "hang_timeout": (0.0,),
    "silence_timeout": (0.0,),
    "index": 0,
    "buffer_count": 1,
    "buffer_size": 1,
    "candidates": 1,
    "num_clusters": 1,
    "warmup_steps": 0,
    "interval": 1,
    "top": 1,
    "quota": 0,
}


class Mistakes(ValueError):
    """Everything that is wrong with a configuration. messages: one line each."""

    def __init__(self, messages: list[str]) -> None:
        self.messages = tuple(messages)
        several = f"{len(messages)} mistakes in the configuration:"
        super().__init__(messages[0] if len(messages) == 1 else "\n  ".join([several, *messages]))


@contextmanager
def collected(found: list[str]) -> Iterator[None]:
    """Append the messages of a ValueError that the block raises to `found`, and go on after the block."""
    try:
        yield
    except ValueError as error:
        found += error.messages if isinstance(error, Mistakes) else [str(error)]


def nearest(key: str, allowed: list[str]) -> str:
    """A hint at the allowed key that is most like `key`, or nothing."""
    close = difflib.get_close_matches(key, allowed, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _checked(path: str, key: str, annotation: str, value: Any) -> float | str | None:
    """`value` of `path` in the type of its field; `annotation` is the field's type as written."""
    if value is None and "None" in annotation:
        return None
    if value == "auto" and "auto" not in _CHOICES.get(key, ()):
        raise ValueError(f'{path}: "auto" is not resolved for this key; give a value or leave it out for the default.')
    kind = annotation.split(" ")[0]
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{path}: found a number of {len(str(value))} digits, expected {kind}.") from None
    if type(value).__name__ != kind:
        raise ValueError(f"{path}: found {value!r} ({type(value).__name__}), expected {kind}.")
    if key in _CHOICES and value not in _CHOICES[key]:
        raise ValueError(
            f"{path}: found {value!r}, allowed are {', '.join(_CHOICES[key])}.{nearest(value, list(_CHOICES[key]))}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}: found {value!r}, expected a finite number.")
    bound = _MINIMUM.get(key)
    if isinstance(bound, tuple) and not value > bound[0]:
        raise ValueError(f"{path}: found {value!r}, must be above {bound[0]}.")
    if isinstance(bound, (int, float)) and not value >= bound:
        raise ValueError(f"{path}: found {value!r}, must be {bound} or more.")
    if key == "seed" and value >= 2**63:
        raise ValueError(f"{path}: found {value!r}, must be below 2**63.")
    return value


def _build(cls: type, values: Any, path: str, found: list[str]) -> Any:
    """An instance of `cls`, with the defaults where a value is refused; None where it cannot be made.

    Mistakes are appended to `found`.
    """
    if not isinstance(values, Mapping):
        found.append(f"{path}: found {values!r}, expected a section {{...}}.")
        return None
    known = {f.name: f for f in fields(cls)}
    built = {}
    for key, value in values.items():
        here = f"{path}.{key}"
        if key not in known:
            found.append(
                f"{here}: unknown key.{nearest(key, list(known))} Allowed keys are {', '.join(sorted(known))}."
            )
            continue
        with collected(found):
            inner = _value(key, str(known[key].type), value, here, found)
            if inner is not None:
                built[key] = inner
    missing = [
        f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING and f.name not in built
    ]
    found += [f"{path}.{name}: missing." for name in missing if name not in values]
    return None if missing else cls(**built)


def _value(key: str, annotation: str, value: Any, here: str, found: list[str]) -> Any:
    """The checked value of one field. Raises ValueError; mistakes inside of a section are appended to `found`."""
    if key in _NESTED:
        if value is None and "None" in annotation:
            return None
        if key == "direction" and isinstance(value, str):
            value = {"distribution": _checked(here, "distribution", "str", value)}
        return _build(_NESTED[key], value, here, found)
    if key == "quotas" and value is not None:
        if not isinstance(value, Mapping) or not value:
            raise ValueError(f"{here}: found {value!r}, expected {{source: number of examples, ...}}.")
        return {str(source): _checked(f"{here}.{source}", "quota", "int", of) for source, of in value.items()}
    return _checked(here, key, annotation, value)


def check_loss_mean(value: str) -> None:
    """Raise ValueError unless `value` is what `loss_mean` may be."""
    _checked("loss_mean", "loss_mean", "str", value)


def parse_selector(values: Any, path: str) -> SelectorConfig:
    """A section of a selector (a dict), checked by itself. Raises ValueError, naming the keys."""
    found: list[str] = []
    config: SelectorConfig = _build(SelectorConfig, values, path, found)
    if found:
        raise Mistakes(found)
    return config


def check_selector(config: SelectorConfig, path: str, budget: int, num_examples: int | None = None) -> None:
    """Raise ValueError where `config` does not fit the number to choose, or that of the examples there are."""
    found = list(_selector_mistakes(config, path, budget, num_examples))
    if found:
        raise Mistakes(found)


def _selector_mistakes(config: SelectorConfig, path: str, budget: int, num_examples: int | None) -> Iterator[str]:
    if budget < 1 or budget > config.candidates:
        yield (
            f"{path}.candidates: found {config.candidates}, of which {budget} (train_batch_size) are to be chosen. Give "
            "as many candidates or more, and choose at least 1."
        )
    if num_examples is not None and num_examples < config.candidates:
        yield f"{path}.candidates: found {config.candidates}, but there are {num_examples} training examples."
    if config.quotas is None:
        return
    if config.source_column is None:
        yield f"{path}.quotas: given without {path}.source_column. Name the column of the sources."
    if config.strategy not in BY_SOURCE:
        yield f"{path}.quotas: {config.strategy} does not choose by source. Allowed are {', '.join(BY_SOURCE)}."
    total = sum(config.quotas.values())
    if total != budget:
        yield f"{path}.quotas: they sum to {total}, must sum to {budget}, the train_batch_size."


def _replicas_mistakes(config: ZerothOrderConfig, replicas: ReplicasConfig) -> Iterator[str]:
    host, _, port = replicas.store.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        yield f'{SECTION}.replicas.store: found {replicas.store!r}, expected "host:port".'
    if config.selector is not None:
        yield f"{SECTION}.replicas: goes without a selector, whose features do not travel between replicas."
    if config.directions == "per_rank":
        yield f'{SECTION}.replicas: goes with directions "shared": a replica may come and go, its direction not.'


def _mistakes_between_keys(config: ZerothOrderConfig, given: Mapping[str, Any]) -> Iterator[str]:
    """What keys that are right by themselves cannot be together. given: the section as it was written."""
    unused = [key for key in SVRG_ONLY if key in given]
    if not config.is_svrg and unused:
        yield (
            f'{SECTION}: {", ".join(unused)} belong to method "mezo_svrg", but method is "{config.method}". '
            "Remove them, or change the method."
        )
    if config.direction.rank != 1 and config.direction.distribution != "low_rank":
        yield f'{SECTION}.direction.rank: belongs to "low_rank", but distribution is "{config.direction.distribution}".'
    if config.replicas is not None:
        yield from _replicas_mistakes(config, config.replicas)
    anchor = config.anchor
    if "nvme" in anchor.places() and not anchor.nvme_path:
        yield f"{SECTION}.anchor.nvme_path: missing; point or gradient is nvme. Give a folder on the drive."
    if anchor.nvme_path is not None and "nvme" not in anchor.places():
        yield (
            f"{SECTION}.anchor.nvme_path: given, but neither point ({anchor.point}) nor gradient ({anchor.gradient}) is "
            "nvme. Set one of them to nvme, or remove the path."
        )


def read_section(values: Any, found: list[str]) -> ZerothOrderConfig | None:
    """The section with the defaults in place of what is refused; None where it is no section.

    What is refused is appended to `found`, so that the rest of a configuration can be checked all the same.
    """
    config: ZerothOrderConfig | None = _build(ZerothOrderConfig, values, SECTION, found)
    if config is None:
        return None
    for message in _mistakes_between_keys(config, values):
        section = message.split(":")[0].rpartition(".")[0]
        follows = section != SECTION and any(other.startswith(f"{section}.") for other in found)
        if not follows:  # from another mistake in that section, whose key has its default here
            found.append(message)
    return config


def parse_section(values: Any) -> ZerothOrderConfig:
    """The section "zeroth_order" (a dict) as a checked `ZerothOrderConfig`. Raises ValueError, naming every wrong key."""
    found: list[str] = []
    config = read_section(values, found)
    if found or config is None:
        raise Mistakes(found)
    return config
