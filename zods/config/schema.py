"""The section "zeroth_order" of the configuration, as frozen pydantic models, and its checks.

The declaration of each key holds its type, bounds and choices. Every mistake is one line: the key,
what was found and what is allowed. All mistakes are raised at once (`zods.config.config_errors`).
The larger sections in it have modules of their own (`anchor_section`, `selector_section`,
`replicas_section`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainValidator,
    PositiveFloat,
    model_validator,
)

from zods.config.anchor_section import AnchorConfig
from zods.config.config_errors import Mistakes, read_model
from zods.config.replicas_section import ReplicasConfig, replicas_mistakes
from zods.config.section import SECTION, Count, NumDirections, Section, Text
from zods.config.selector_section import SelectorConfig

Method = Literal["mezo", "mezo_svrg"]
Distribution = Literal["gaussian", "rademacher", "low_rank"]
LossMean = Literal["tokens", "examples"]
METHODS: tuple[str, ...] = get_args(Method)
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)
# named objectives: of the logits, of which the first ones are smooth, and of generated texts
SMOOTH_OBJECTIVES = ("loss", "candidates")
OF_LOGITS = (*SMOOTH_OBJECTIVES, "accuracy", "token_accuracy")
OF_TEXTS = ("exact_match", "f1")


def _objective(value: str) -> str:
    named = (*OF_LOGITS, *OF_TEXTS)
    if value in named or re.fullmatch(r"\w+(\.\w+)*:\w+", value):
        return value
    raise ValueError(
        f"found {value!r}, expected {', '.join(map(json.dumps, named))} or the name of a function "
        '"package.module:function".'
    )


def _weight(value: Any) -> Any:
    if value == "auto":
        return value
    if type(value) in (int, float) and 0.0 <= value <= 1.0:
        return float(value)
    raise ValueError(f'found {value!r}, expected "auto" or a number from 0 to 1.')


def _step_size(value: Any) -> Any:
    if value == "auto":
        return value
    if type(value) in (int, float) and 0.0 <= value <= sys.float_info.max:
        return float(value)
    raise ValueError(f'found {value!r}, expected "auto" or a number of at least 0.')


def _size_of_group(value: Any) -> Any:
    if value == "all" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f'found {value!r}, expected "all" or a whole number of at least 1.')


def _fused_norm(value: Any) -> Any:
    if value == "auto" or type(value) is bool:
        return value
    raise ValueError(f'found {value!r}, expected "auto", true or false.')


class DirectionConfig(Section):
    """The distribution of the directions z.

    gaussian: each element is standard normal. rademacher: each element is +1 or -1. low_rank: each
    matrix is U V^T / sqrt(rank), and the other parameters are gaussian.
    """

    distribution: Distribution = "low_rank"
    rank: Count = 1  # of a low_rank direction

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, values: Any) -> Any:
        return {"distribution": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _check_rank(self) -> Self:
        if self.rank != 1 and self.distribution != "low_rank":
            raise ValueError(
                f'rank: belongs to "low_rank", but distribution is "{self.distribution}". Remove '
                'rank, or set distribution to "low_rank".'
            )
        return self


class GenerateConfig(Section):
    """Greedy generation of the texts that the objective scores. See `zods.data.text_scores`."""

    max_new_tokens: Count  # most tokens of a text


class AnnealConfig(Section):
    """The rule that lowers the step sizes.

    They are divided by `alpha` when an epoch's mean loss exceeds `threshold` times the mean loss of
    the epoch before.
    """

    alpha: Annotated[float, Field(gt=1.0)] = 5.0
    threshold: PositiveFloat = 1.05


class MixtureConfig(Section):
    """Sampling of the training examples by weights of their sources. See `zods.data.order`."""

    source_column: Text  # column that names an example's source
    # weight of each source in a batch, on average, in any unit
    weights: Annotated[
        dict[str, PositiveFloat],
        Field(min_length=1, description="{source: weight, ...}"),
    ]


class ZerothOrderConfig(Section):
    """The section "zeroth_order".

    Symbols in brackets are from Gautam et al. 2024 (arXiv:2404.08080).
    """

    replaced: ClassVar[dict[str, str]] = {
        "directions": 'Use examples_per_direction: "all" in place of "shared"; the number of '
        'examples of a rank in place of "per_rank".'
    }

    method: Method = "mezo"  # of the steps; mezo_svrg needs the training set for its anchor
    eps: PositiveFloat = 1e-3  # perturbation scale [mu]
    # step size of a mini-batch step [eta_2]; with normalize, the change of a weight in a step; auto:
    # measured before the first step, from the noise of the gradient and the curvature of the loss
    lr: Annotated[float | Literal["auto"], PlainValidator(_step_size)] = "auto"
    # step size of the full-batch step at a refresh [eta_1]; null: the value of lr
    anchor_lr: Annotated[float | None, Field(ge=0.0)] = None
    anchor_interval: Count = 100  # steps between two refreshes [q]
    num_directions: NumDirections = 1  # directions of each group of examples in a step
    anchor_directions: NumDirections = 1  # directions per refresh (K)
    # true: each direction is evaluated on its own K-th of the examples, so that a refresh is one
    # pass; false: each is evaluated on all of them
    anchor_split: bool = True
    # examples per refresh, drawn anew for each; null: the whole training set
    anchor_examples: Annotated[int | None, Field(ge=1)] = None
    share_direction: bool = True  # the two estimates of a step use the same directions
    # factor, 0 to 1, of the anchor's part of an estimate; 0: MeZO; auto: measured, less as the anchor ages
    anchor_weight: Annotated[float | Literal["auto"], PlainValidator(_weight)] = 1.0
    direction: DirectionConfig = DirectionConfig()  # the JSON may give the name alone
    # examples of a step's batch that share a direction, by their positions in it; all: one direction
    # (num_directions of them) for the whole batch
    examples_per_direction: Annotated[int | Literal["all"], PlainValidator(_size_of_group)] = 1
    # mean over the global batch; tokens: of the losses of all label tokens; examples: of the mean
    # losses of the examples
    loss_mean: LossMean = "tokens"
    # loss: the cross entropy, or the model's own loss; candidates: the cross entropy over the label
    # words alone; accuracy, token_accuracy, exact_match, f1, or a function "package.module:name":
    # the score of each example, which training raises on average; loss_mean is used by loss alone
    objective: Annotated[str, AfterValidator(_objective)] = "loss"
    # for exact_match, f1, or a function of texts: how the texts are generated
    generate: GenerateConfig | None = None
    # how the points of a step are evaluated: in one stacked forward, in lockstep, or one by one
    evaluation: Literal["auto", "stacked", "lockstep", "sequential"] = "auto"
    # memory for the points of one forward; null: half of the free memory
    stream_memory_gb: Annotated[float | None, Field(gt=0.0)] = None
    # true: fused functions, of apex or else of torch, compute the norms; auto: so on a GPU
    fused_norm: Annotated[Literal["auto"] | bool, PlainValidator(_fused_norm)] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42  # of directions, data order and rounding
    # a batch has examples of similar length, by the column "length" or the number of "input_ids"
    group_by_length: bool = False
    mixture: MixtureConfig | None = None
    # processes per rank that load batches ahead; 0: the rank loads them itself
    dataloader_num_workers: NonNegativeInt = 0
    # decoupled decay by lr * weight_decay per step, of parameters with two or more dimensions
    weight_decay: NonNegativeFloat = 0.0
    anneal: AnnealConfig | None = None
    # divide each step by the running root mean square of the estimate's elements
    normalize: bool = True
    stochastic_rounding: bool = True  # for updates of 16-bit parameters
    # steps between two checks that all ranks applied the same update
    agreement_interval: Count = 10
    # number of consecutive steps that may be skipped because the loss is not finite
    max_nonfinite_steps: NonNegativeInt = 10
    # what carries the scalars between ranks: torch.distributed (nccl, gloo), or MPI, with ranks that
    # mpirun started
    comm: Literal["torch", "mpi"] = "torch"
    # seconds that one forward, or the work after it, may take; then the watchdog names the ranks
    # that hang
    hang_timeout: PositiveFloat = 600.0
    # seconds that each part of the start may take: reading the data, loading, sharding, resuming
    load_timeout: PositiveFloat = 3600.0
    anchor: AnchorConfig = AnchorConfig()
    selector: SelectorConfig | None = None
    replicas: ReplicasConfig | None = None

    @property
    def is_svrg(self) -> bool:
        return self.method == "mezo_svrg"

    @property
    def averages(self) -> LossMean:
        """What a loss is a mean over: `loss_mean`, or "examples" for scores of examples."""
        return self.loss_mean if self.objective == "loss" else "examples"

    @property
    def peak_lr(self) -> float:
        """The step size that a schedule starts from; 1 where it is measured, and then multiplies."""
        return 1.0 if self.lr == "auto" else self.lr

    @property
    def has_groups(self) -> bool:
        """Whether rows of a micro-batch may have directions of their own, in a step or a refresh."""
        split = self.is_svrg and self.anchor_split and self.anchor_directions > 1
        return split or self.examples_per_direction != "all"

    @property
    def most_points(self) -> int:
        """The largest number of points evaluated on one batch, in a step or in a refresh."""
        if not self.is_svrg:
            return 2 * self.num_directions
        together = 1 if self.anchor_split else self.anchor_directions
        return 2 * max(2 * self.num_directions, together)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump()


SVRG_ONLY = (
    *("anchor_lr", "anchor_interval", "anchor_directions", "anchor_split", "anchor_examples"),
    *("anchor_weight", "share_direction", "anchor"),
)


def check_loss_mean(value: str) -> None:
    """Raise ValueError unless `value` is allowed for `loss_mean`."""
    found: list[str] = []
    read_model(ZerothOrderConfig, {"loss_mean": value}, "", found)
    if found:
        raise Mistakes(found)


def check_group_size(config: ZerothOrderConfig, batch: int) -> None:
    """Raise ValueError where a group of examples is larger than a step's batch."""
    size = config.examples_per_direction
    if size != "all" and int(size) > batch:
        raise ValueError(
            f"{SECTION}.examples_per_direction: found {size}, but train_batch_size is {batch}. "
            'Give as many or fewer, or "all".'
        )


def _mistakes_between_keys(config: ZerothOrderConfig, given: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each set of keys that exclude each other.

    given: the section as it was written.
    """
    unused = [key for key in SVRG_ONLY if key in given]
    if not config.is_svrg and unused:
        yield (
            f'{SECTION}: {", ".join(unused)} belong to method "mezo_svrg", but method is '
            f'"{config.method}". '
            "Remove them, or change the method."
        )
    if config.objective not in SMOOTH_OBJECTIVES and config.lr == "auto":
        yield (
            f'{SECTION}.lr: "auto" measures the curvature of a smooth loss, but objective is '
            f'"{config.objective}". Give a number, such as 1e-3 with normalize.'
        )
    if config.objective not in SMOOTH_OBJECTIVES and config.anneal is not None:
        yield (
            f"{SECTION}.anneal: compares losses that are positive, but objective is "
            f'"{config.objective}", whose losses are minus its scores. Remove anneal, or use a '
            "schedule."
        )
    if config.objective in OF_TEXTS and config.generate is None:
        yield (
            f'{SECTION}.generate: missing; objective "{config.objective}" scores generated texts. '
            'Give {"max_new_tokens": N}.'
        )
    if config.objective in OF_LOGITS and config.generate is not None:
        yield (
            f'{SECTION}.generate: given, but objective "{config.objective}" is computed from '
            f"logits. Remove generate, or use {', '.join(map(json.dumps, OF_TEXTS))} or a function "
            "of texts."
        )
    if config.anchor_weight == "auto" and not config.share_direction:
        yield (
            f'{SECTION}.anchor_weight: "auto" needs share_direction: the weight is measured by the '
            "two estimates along one direction. Give a number, or remove share_direction."
        )
    if config.replicas is not None:
        yield from replicas_mistakes(config.replicas, config.selector)
    if config.selector is not None:
        yield from _loading_mistakes(config)


def _loading_mistakes(config: ZerothOrderConfig) -> Iterator[str]:
    """Yield a message for each key of the loader that a selector has no use for."""
    reasons = {
        "group_by_length": "candidates of similar length do not represent the data",
        "mixture": "it has quotas of its own for the sources",
        "dataloader_num_workers": "the examples of a batch are not known before they are chosen",
    }
    for key, reason in reasons.items():
        if getattr(config, key):
            yield f"{SECTION}.{key}: given with {SECTION}.selector, but {reason}. Remove one of them."


def read_section(values: Any, found: list[str]) -> ZerothOrderConfig | None:
    """Read the section "zeroth_order"; a refused value is replaced by its default.

    Returns None where `values` is no section. The mistakes are appended to `found`, so that the
    rest of a configuration can still be checked.
    """
    config = read_model(ZerothOrderConfig, values, SECTION, found)
    if config is None:
        return None
    for message in _mistakes_between_keys(config, values):
        section = message.split(":")[0].rpartition(".")[0]
        follows = section != SECTION and any(other.startswith(f"{section}.") for other in found)
        # A message may only follow from another mistake in that section, whose key has its
        # default value here.
        if not follows:
            found.append(message)
    return config


def parse_section(values: Any) -> ZerothOrderConfig:
    """Read and check the section "zeroth_order" (a dict).

    Raises ValueError, naming every wrong key.
    """
    found: list[str] = []
    config = read_section(values, found)
    if found or config is None:
        raise Mistakes(found)
    return config
