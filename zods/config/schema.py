"""The section "zeroth_order" of the configuration, as frozen pydantic models, and its checks.

Types, bounds and choices stand in the declaration of each key. Every mistake is one line: the key,
what was found and what is allowed. All mistakes are raised at once (`zods.config.mistakes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    field_validator,
    model_validator,
)

from zods.config.mistakes import AUTO, Mistakes, read_model

SECTION = "zeroth_order"
Method = Literal["mezo", "mezo_svrg"]
Distribution = Literal["gaussian", "rademacher", "low_rank"]
LossMean = Literal["tokens", "examples"]
Storage = Literal["device", "cpu", "nvme", "terms"]
Strategy = Literal[
    "greedy",
    "stochastic_greedy",
    "greedi",
    "random",
    "structured_random",
    "longest",
    "highest_loss",
]
Metric = Literal["l1", "l2", "cosine"]
METHODS: tuple[str, ...] = get_args(Method)
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)
STORAGES: tuple[str, ...] = get_args(Storage)
STRATEGIES: tuple[str, ...] = get_args(Strategy)
BY_SOURCE = (*STRATEGIES[:3], "structured_random")
METRICS: tuple[str, ...] = get_args(Metric)


def _not_auto(value: str) -> str:
    """Refuse "auto", which the other types refuse by themselves."""
    if value == "auto":
        raise ValueError(AUTO)
    return value


Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, AfterValidator(_not_auto)]


class Section(BaseModel):
    """A section. No value is converted to its declared type, but for a whole number to a float."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class AnchorConfig(Section):
    """Storage of the anchor of MeZO-SVRG.

    point: the parameters at the last refresh. gradient: the full-batch estimate there. Each is a
    copy on the `device`, on `cpu` or in `nvme` files, or is made when needed from its `terms` (no
    bytes).
    """

    point: Storage = "cpu"
    gradient: Storage = "cpu"
    nvme_path: Text | None = None  # a folder on the drive; needed for nvme
    buffer_count: Count = 3  # nvme: buffers of the point and of the gradient; 2 or more overlap I/O
    buffer_size: Count = 1 << 22  # nvme: elements per buffer
    pin_memory: bool = True  # cpu: page-locked where there is a GPU

    def storages(self) -> tuple[str, str]:
        return (self.point, self.gradient)

    @model_validator(mode="after")
    def _check_nvme_path(self) -> Self:
        if "nvme" in self.storages() and not self.nvme_path:
            raise ValueError(
                "nvme_path: missing; point or gradient is nvme. Give a folder on the drive."
            )
        if self.nvme_path is not None and "nvme" not in self.storages():
            raise ValueError(
                f"nvme_path: given, but neither point ({self.point}) nor gradient "
                f"({self.gradient}) is nvme. Set one of them to nvme, or remove the path."
            )
        return self


class DirectionConfig(Section):
    """Distribution of a direction z: each element Gaussian or +-1, or each matrix U V^T /
    sqrt(rank) and the rest Gaussian.
    """

    distribution: Distribution = "gaussian"
    rank: Count = 1  # of low_rank

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, values: Any) -> Any:
        return {"distribution": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _check_rank(self) -> Self:
        if self.rank != 1 and self.distribution != "low_rank":
            raise ValueError(
                f'rank: belongs to "low_rank", but distribution is "{self.distribution}".'
            )
        return self


class AnnealConfig(Section):
    """Divide the step sizes by `alpha` when an epoch's mean loss exceeds `threshold` times the one
    before.
    """

    alpha: Annotated[float, Field(gt=1.0)] = 5.0
    threshold: PositiveFloat = 1.05


class SelectorConfig(Section):
    """Small sub-batches that stand for large ones (Nguyen et al. 2024, arXiv:2407.19580v1).

    See `zods.selection`.
    """

    candidates: Count  # examples of a large batch, from which train_batch_size are chosen
    strategy: Strategy = "greedy"  # facility location; or a baseline
    # of the data; without one, clusters of features are the sources
    source_column: Text | None = None
    num_clusters: Count = 8  # where there is no column; 1 makes no difference between examples
    # number chosen of each source; None: small sources whole, the others in proportion
    quotas: Annotated[
        dict[str, NonNegativeInt] | None,
        Field(min_length=1, description="{source: number of examples, ...}"),
    ] = None
    # of the chosen in the loss; or cluster: how many each stands for
    weights: Literal["uniform", "cluster"] = "uniform"
    # steps with random sub-batches, small sources whole, before the first choice
    warmup_steps: NonNegativeInt = 0
    interval: Count = 1  # steps that are made with a sub-batch before the next is chosen
    metric: Metric = "l2"  # between features
    # derivatives of a loss along directions of a matrix; or by differences: zo, paper
    features: Literal["exact", "zo", "paper"] = "exact"
    num_directions: Count = 64
    rank: Count = 4  # of a direction
    # a regular expression found in the matrix's name; None: the last value projection
    pattern: Text | None = None
    eps: PositiveFloat = 1e-3  # zo, paper: distance of the points
    two_sided: bool = True  # zo: differences of two points, or of one and the parameters
    top: Count = 2560  # paper: elements of the gradient that count

    @field_validator("quotas", mode="before")
    @classmethod
    def _name_sources(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {str(source): number for source, number in values.items()}


class ReplicasConfig(Section):
    """Several DeepSpeed worlds that train one model together. See `zods.training.replicas`."""

    store: Text  # "host:port", which replica 0 keeps and the others reach
    index: NonNegativeInt = 0  # this replica's, one of its own; 0 leads
    # seconds without a sign of life after which a replica is left out
    silence_timeout: PositiveFloat = 30.0


class ZerothOrderConfig(Section):
    """The section "zeroth_order".

    Symbols in brackets are those of Gautam et al. 2024 (arXiv:2404.08080).
    """

    method: Method = "mezo_svrg"
    eps: PositiveFloat = 1e-3  # perturbation scale [mu]
    lr: NonNegativeFloat = 1e-6  # step size of a mini-batch step [eta_2]
    # step size of the full-batch step at a refresh [eta_1]; None: as lr
    anchor_lr: Annotated[float | None, Field(ge=0.0)] = None
    anchor_interval: Count = 100  # steps between two refreshes [q]
    num_directions: Count = 1  # per step
    anchor_directions: Count = 1  # per refresh (K)
    share_direction: bool = True  # a step's two estimates use the same directions
    direction: DirectionConfig = DirectionConfig()  # or the distribution's name alone
    # by all ranks; or per_rank: each evaluates its own on its part of the batch
    directions: Literal["shared", "per_rank"] = "shared"
    # over the global batch: of its label tokens' losses, or of its examples' means
    loss_mean: LossMean = "tokens"
    # of a step's points: in one stacked forward, in lockstep, or one after the other
    evaluation: Literal["auto", "stacked", "lockstep", "sequential"] = "auto"
    # for the points of one forward; None: half of what is free
    stream_memory_gb: Annotated[float | None, Field(gt=0.0)] = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    # decoupled: lr * weight_decay per step, on parameters of two or more dimensions
    weight_decay: NonNegativeFloat = 0.0
    anneal: AnnealConfig | None = None
    stochastic_rounding: bool = True  # of updates to 16-bit parameters
    agreement_interval: Count = 10  # steps between two checks that all ranks applied the same
    # steps in a row that may be skipped for a non-finite loss
    max_nonfinite_steps: NonNegativeInt = 10
    # seconds that one forward, or what follows it, may take; then who hangs is named
    hang_timeout: PositiveFloat = 600.0
    anchor: AnchorConfig = AnchorConfig()
    selector: SelectorConfig | None = None
    replicas: ReplicasConfig | None = None

    @property
    def is_svrg(self) -> bool:
        return self.method == "mezo_svrg"

    @property
    def most_points(self) -> int:
        """The most points evaluated on one batch: that of a step, or that of a refresh."""
        if not self.is_svrg:
            return 2 * self.num_directions
        return 2 * max(2 * self.num_directions, self.anchor_directions)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump()


SVRG_ONLY = ("anchor_lr", "anchor_interval", "anchor_directions", "share_direction", "anchor")


def check_loss_mean(value: str) -> None:
    """Raise ValueError unless `value` is what `loss_mean` may be."""
    found: list[str] = []
    read_model(ZerothOrderConfig, {"loss_mean": value}, "", found)
    if found:
        raise Mistakes(found)


def parse_selector(values: Any, path: str) -> SelectorConfig:
    """A section of a selector (a dict), checked by itself. Raises ValueError, naming the keys."""
    found: list[str] = []
    config = read_model(SelectorConfig, values, path, found)
    if found or config is None:
        raise Mistakes(found)
    return config


def check_selector(
    config: SelectorConfig, path: str, budget: int, num_examples: int | None = None
) -> None:
    """Raise ValueError where `config` does not fit the number to choose, or that of the examples
    there are.
    """
    found = list(_selector_mistakes(config, path, budget, num_examples))
    if found:
        raise Mistakes(found)


def _selector_mistakes(
    config: SelectorConfig, path: str, budget: int, num_examples: int | None
) -> Iterator[str]:
    if budget < 1 or budget > config.candidates:
        yield (
            f"{path}.candidates: found {config.candidates}, of which {budget} (train_batch_size) "
            f"are to be chosen. Give "
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
    """Yield messages about keys that exclude each other. given: the section as it was written."""
    unused = [key for key in SVRG_ONLY if key in given]
    if not config.is_svrg and unused:
        yield (
            f'{SECTION}: {", ".join(unused)} belong to method "mezo_svrg", but method is '
            f'"{config.method}". '
            "Remove them, or change the method."
        )
    if config.replicas is not None:
        yield from _replicas_mistakes(config, config.replicas)


def read_section(values: Any, found: list[str]) -> ZerothOrderConfig | None:
    """The section with the defaults in place of what is refused; None where it is no section.

    What is refused is appended to `found`, so that the rest of a configuration can be checked all
    the same.
    """
    config = read_model(ZerothOrderConfig, values, SECTION, found)
    if config is None:
        return None
    for message in _mistakes_between_keys(config, values):
        section = message.split(":")[0].rpartition(".")[0]
        follows = section != SECTION and any(other.startswith(f"{section}.") for other in found)
        if not follows:  # from another mistake in that section, whose key has its default here
            found.append(message)
    return config


def parse_section(values: Any) -> ZerothOrderConfig:
    """The section "zeroth_order" (a dict) as a checked `ZerothOrderConfig`.

    Raises ValueError, naming every wrong key.
    """
    found: list[str] = []
    config = read_section(values, found)
    if found or config is None:
        raise Mistakes(found)
    return config
