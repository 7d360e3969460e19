"""The section "selector" of the configuration, and its checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator

from zods.config.config_errors import Mistakes, read_model
from zods.config.section import Count, NumDirections, Section, Text

Strategy = Literal[
    "greedy",
    "stochastic_greedy",
    "greedi",
    "mean_matching",
    "target",
    "random",
    "structured_random",
    "longest",
    "highest_loss",
    "lowest_loss",
]
Metric = Literal["l1", "l2", "cosine"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
FACILITY_LOCATION = ("greedy", "stochastic_greedy", "greedi")
BY_SOURCE = (*FACILITY_LOCATION, "mean_matching", "structured_random")
METRICS: tuple[str, ...] = get_args(Metric)


class SelectorConfig(Section):
    """The selection of sub-batches that represent larger batches. See `zods.selection`.

    The method is described in Nguyen et al. 2024 (arXiv:2407.19580v1).
    """

    candidates: Count  # size of a large batch; train_batch_size of them are chosen
    # greedy: facility location; mean_matching: the mean feature is nearest to that of all; target:
    # the most similar to target examples; the others are baselines
    strategy: Strategy = "greedy"
    # target: a file of target examples, of the same form as the training file
    target_file: Text | None = None
    # column that names an example's source; null: clusters of features are the sources
    source_column: Text | None = None
    # facility location without source_column; 1: all examples are one source
    num_clusters: Count = 8
    # number of examples chosen from each source; null: small sources are taken whole, and the
    # other sources in proportion to their size
    quotas: Annotated[
        dict[str, NonNegativeInt] | None,
        Field(min_length=1, description="{source: number of examples, ...}"),
    ] = None
    # weight of a chosen example in the loss; cluster: the number of examples that it represents
    weights: Literal["uniform", "cluster"] = "uniform"
    # steps with random sub-batches before the first selection; small sources are taken whole
    warmup_steps: NonNegativeInt = 0
    interval: Count = 1  # steps made with a sub-batch before the next one is chosen
    metric: Metric = "l2"  # distance between features
    # exact: derivatives of an example's loss along directions of one matrix; zo and paper: the
    # same by finite differences; hidden_states: inputs of the head, for comparison
    features: Literal["exact", "zo", "paper", "hidden_states"] = "exact"
    num_directions: NumDirections = 64  # features of an example
    rank: Count = 4  # of a direction
    # regular expression that is searched in the matrix's name; null: the last value projection
    pattern: Text | None = None
    eps: PositiveFloat = 1e-3  # zo, paper: perturbation scale
    two_sided: bool = True  # zo: two perturbed points; false: one, and the parameters
    top: Count = 2560  # paper: number of gradient elements used

    @field_validator("quotas", mode="before")
    @classmethod
    def _name_sources(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {str(source): number for source, number in values.items()}


def parse_selector(values: Any, path: str) -> SelectorConfig:
    """Read and check a selector's section (a dict). Raises ValueError, naming the keys."""
    found: list[str] = []
    config = read_model(SelectorConfig, values, path, found)
    if found or config is None:
        raise Mistakes(found)
    return config


def check_selector(
    config: SelectorConfig, path: str, budget: int, num_examples: int | None = None
) -> None:
    """Raise ValueError where a selector does not fit the batch size or the number of examples.

    budget: number of examples to choose from the candidates. num_examples: number of training
    examples, where it is known.
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
            "are to be chosen. Give as many candidates or more, and choose at least 1."
        )
    if num_examples is not None and num_examples < config.candidates:
        yield (
            f"{path}.candidates: found {config.candidates}, but there are {num_examples} training "
            "examples. Give as many candidates or fewer."
        )
    if config.target_file is not None and config.strategy != "target":
        yield (
            f"{path}.target_file: given, but strategy is {config.strategy!r}. Set strategy to "
            '"target", or remove the file.'
        )
    if config.strategy == "target" and config.features == "paper":
        yield (
            f'{path}.features: found "paper", but strategy is "target", and along a single '
            "direction all examples are equally similar. Use another kind."
        )
    if config.quotas is None:
        return
    if config.source_column is None:
        yield f"{path}.quotas: given without {path}.source_column. Name the column of the sources."
    if config.strategy not in BY_SOURCE:
        yield (
            f"{path}.quotas: {config.strategy} does not choose by source. Allowed are "
            f"{', '.join(BY_SOURCE)}."
        )
    total = sum(config.quotas.values())
    if total != budget:
        yield (
            f"{path}.quotas: they sum to {total}, must sum to {budget}, the train_batch_size. "
            "Change one of them."
        )
