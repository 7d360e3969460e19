"""Choose examples from a candidate batch, with their weights.

Nguyen et al. 2024, arXiv:2407.19580v1 (later CoLM): small sources are kept whole. From each other
source, the examples are chosen that best represent the rest of the source, or another strategy
chooses. All results are the same on every rank, whichever ranks computed the features. Caller:
`zods.selection.sub_batches`.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zods.config.selector_section import BY_SOURCE, FACILITY_LOCATION, SelectorConfig
from zods.core.directions import Parameter, derive_seed
from zods.core.shares import largest_remainder
from zods.selection.baselines import (
    PaperFeatures,
    by_loss,
    greedi,
    longest_first,
    shuffled,
    stochastic_greedy,
)
from zods.selection.facility_location import (
    Chosen,
    Exchange,
    Problem,
    dequantised,
    distances_fit,
    from_features,
    from_quantised,
    lazy_greedy,
)
from zods.selection.mean_matching import mean_matching
from zods.selection.quotas import capped_quotas, quotas_of
from zods.selection.target_similarity import most_similar

logger = logging.getLogger(__name__)

NEEDS = {  # the measurements of candidates that a strategy needs
    "greedy": "features",
    "stochastic_greedy": "features",
    "greedi": "features",
    "mean_matching": "features",
    "target": "features",
    "random": "nothing",
    "structured_random": "nothing",
    "longest": "nothing",
    "highest_loss": "losses",
    "lowest_loss": "losses",
}


@dataclass(frozen=True)
class CandidateBatch:
    """The candidates of all ranks, in the order of their ids.

    ids: indices in the dataset, ascending. num_tokens: number of tokens of each candidate. sources:
    name of each candidate's source, or None. losses: (n,), not finite for an example that must not
    be chosen; None: not known. features: (n, m) int16, `quantised` by `largest`; or None. targets:
    features (T, m) int16 of target examples, for the strategy "target"; or None. owned: indices of
    the candidates for which this rank evaluates gains; None: all. Candidates that the plan does not
    measure may have any finite losses and features.
    """

    ids: Sequence[int]
    num_tokens: Sequence[int]
    sources: Sequence[str] | None = None
    losses: Tensor | None = None
    features: Tensor | None = None
    largest: float = 0.0
    targets: Tensor | None = None
    owned: Tensor | None = None


@dataclass(frozen=True)
class Report:
    """The report of one selection.

    step: number of selections before this one. unusable: number of candidates without labels, or
    with a loss or features that are not finite. quotas: number of examples of each source that had
    candidates. kept_whole: sources of which every usable candidate was chosen. objective: objective
    of facility location, summed over the sources; 0 for a strategy without it. matrix: name of the
    matrix whose gradients were compared; "" where none were.
    """

    step: int
    candidates: int
    unusable: int
    quotas: dict[str, int] = field(default_factory=dict)
    kept_whole: list[str] = field(default_factory=list)
    objective: float = 0.0
    matrix: str = ""


class Selector:
    """Chooses `budget` examples from each batch of candidates.

    target: the matrix whose gradients the features project; needed for the features of the paper.
    num_parts: number of parts of GreeDi, which is the number of ranks. exchange: exchanges gains
    between ranks, as in `lazy_greedy`; None: every rank evaluates all gains.
    """

    def __init__(
        self,
        config: SelectorConfig,
        budget: int,
        *,
        seed: int,
        target: Parameter | None = None,
        num_parts: int = 1,
        exchange: Exchange | None = None,
    ) -> None:
        self.config, self.budget = config, budget
        self.step = 0  # selections made
        self._seed, self._num_parts, self._exchange = seed, num_parts, exchange
        # Mean derivative of the last chosen examples, for the features of the paper
        self.chosen_mean: float | None = None
        self._warned_of_small_sources = False
        self._paper: PaperFeatures | None = None
        if config.features == "paper" and NEEDS[config.strategy] == "features":
            assert target is not None
            self._paper = PaperFeatures(target, config.top)

    @property
    def strategy(self) -> str:
        """The strategy of the next selection."""
        return (
            "structured_random"
            if self.step * self.config.interval < self.config.warmup_steps
            else self.config.strategy
        )

    def direction_seeds(self) -> list[int]:
        """Seeds of the directions for the features of the next selection."""
        count = 1 if self.config.features == "paper" else self.config.num_directions
        return [derive_seed(self._seed, "selection", self.step, k) for k in range(count)]

    def target_ids(self, number: int) -> list[int]:
        """Indices of the target examples for the next selection, of a number of them.

        A selection takes as many as it chooses candidates; the next selection goes on behind them.
        """
        first = self.step * self.budget
        return [(first + k) % number for k in range(min(number, self.budget))]

    def plan(self, batch: CandidateBatch) -> tuple[dict[str, int] | None, list[int]]:
        """Plan the measurements of a batch whose losses and features are not known.

        Returns (quotas, indices of the candidates to measure). Sources that are kept whole are not
        measured. The quotas are None where they follow from the features.
        """
        usable = self._usable(batch)
        if NEEDS[self.strategy] == "nothing":
            return None, []
        if batch.sources is None or self.strategy not in BY_SOURCE or self._paper is not None:
            return None, usable
        groups = self._groups(batch, usable, None)
        quotas = self._quotas({name: len(members) for name, members in groups.items()})
        return quotas, [
            usable[i]
            for name, members in groups.items()
            if quotas[name] < len(members)
            for i in members
        ]

    def select(
        self, batch: CandidateBatch, quotas: dict[str, int] | None = None
    ) -> tuple[list[int], list[float], Report]:
        """Choose examples from a batch.

        Returns (indices of the chosen examples in `batch`, ascending; their weights; the report).
        Fewer examples than the budget are chosen only where fewer are usable. A weight is 1, or
        with the setting "cluster" the number of usable candidates that an example represents.

        quotas: quotas of the plan. Where a source turned out to have too few usable candidates,
        other sources get larger quotas.
        """
        self.chosen_mean = None
        usable = self._usable(batch)
        by_location = self.strategy in FACILITY_LOCATION and usable
        problem = self._problem(batch, usable) if by_location else None
        groups = self._groups(batch, usable, problem)
        sizes = {name: len(members) for name, members in groups.items()}
        quotas = self._quotas(sizes) if quotas is None else capped_quotas(quotas, sizes)
        chosen: list[tuple[int, float]] = []
        objective = 0.0
        for name, members in groups.items():
            if quotas[name] == len(members):
                chosen += [(usable[i], 1.0) for i in members]
                continue
            found, weights, gained = self._choose(
                batch, usable, problem, members, quotas[name], name
            )
            chosen += zip(found, weights, strict=True)
            objective += gained
        chosen.sort()
        whole = [name for name in groups if quotas[name] == sizes[name]]
        if self._paper is not None and NEEDS[self.strategy] == "features" and chosen:
            derivatives = _derivatives(batch)[[index for index, _ in chosen]]
            self._record_mean(float(derivatives.mean()))
        report = Report(
            self.step, len(batch.ids), len(batch.ids) - len(usable), quotas, whole, objective
        )
        self.step += 1
        weights = [weight if self.config.weights == "cluster" else 1.0 for _, weight in chosen]
        return [index for index, _ in chosen], weights, report

    def _record_mean(self, mean: float) -> None:
        if self._paper is not None:
            self.chosen_mean = mean
            self._paper.record(self.direction_seeds()[0], mean)

    def restore(self, mean: float | None) -> None:
        """Restore a selection that was made before a restart.

        mean: its `chosen_mean`, the only value on which later selections depend.
        """
        if mean is not None:
            self._record_mean(mean)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """The state on which later selections depend, as JSON."""
        history = None if self._paper is None else [list(entry) for entry in self._paper.history]
        return {"step": self.step, "history": history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        if self._paper is not None:
            self._paper.load([(seed, mean) for seed, mean in state["history"] or []])

    def _problem(self, batch: CandidateBatch, usable: list[int]) -> Problem:
        assert batch.features is not None
        if self._paper is not None:
            expanded = self._paper.expand(_derivatives(batch)[usable], self.direction_seeds()[0])
            return from_features(expanded, self.config.metric)
        indices = torch.tensor(usable, device=batch.features.device)
        return from_quantised(batch.features[indices], batch.largest, self.config.metric)

    def _usable(self, batch: CandidateBatch) -> list[int]:
        usable = torch.ones(len(batch.ids), dtype=torch.bool)
        if batch.losses is not None:
            usable &= batch.losses.cpu().isfinite()
        return usable.nonzero().squeeze(1).tolist()

    def _groups(
        self, batch: CandidateBatch, usable: list[int], problem: Problem | None
    ) -> dict[str, list[int]]:
        """Map each source to indices into `usable`, in the order of the sources' names."""
        if self.strategy not in BY_SOURCE:
            names = ["all"] * len(usable)
        elif batch.sources is not None:
            names = [batch.sources[i] for i in usable]
        elif problem is not None and self.config.num_clusters > 1:
            centres = lazy_greedy(problem, self.config.num_clusters).ids
            distances = problem.distances(torch.tensor(centres, device=problem.device))
            names = [f"cluster {k}" for k in distances.argmin(0).tolist()]
        else:
            names = ["all"] * len(usable)
        groups: dict[str, list[int]] = {name: [] for name in sorted(set(names))}
        for i, name in enumerate(names):
            groups[name].append(i)
        return groups

    def _quotas(self, sizes: dict[str, int]) -> dict[str, int]:
        if self.config.quotas is not None and self.strategy in BY_SOURCE:
            return capped_quotas(self.config.quotas, sizes)
        quotas = quotas_of(sizes, self.budget)
        total = sum(sizes.values())
        small = sum(size for size in sizes.values() if size * len(sizes) < total)
        if small >= self.budget and total > self.budget and not self._warned_of_small_sources:
            self._warned_of_small_sources = True
            logger.warning(
                "selector: sources below the mean size have %d of %d candidates, which leaves "
                "nothing of the %d to be chosen: no source is kept whole, all have a share in "
                "proportion",
                small, total, self.budget,
            )  # fmt: skip
        return quotas

    def _choose(
        self,
        batch: CandidateBatch,
        usable: list[int],
        problem: Problem | None,
        members: list[int],
        k: int,
        name: str,
    ) -> tuple[list[int], list[float], float]:
        """Choose k members of a source. Returns (indices in the batch, weights, objective)."""
        indices = [usable[i] for i in members]
        if problem is None:
            kept = (
                self._choose_by_features(batch, indices, k)
                if self.strategy in ("mean_matching", "target")
                else self._ranked(batch, indices, name)[:k]
            )
            return kept, [len(members) / k for _ in kept], 0.0
        whole = len(members) == problem.num_candidates
        part = problem if whole else problem.among(torch.tensor(members, device=problem.device))
        chosen = self._choose_by_facility_location(part, batch, indices, k, name)
        return (
            [indices[i] for i in chosen.ids],
            [float(w) for w in chosen.weights],
            chosen.objective,
        )

    def _choose_by_features(self, batch: CandidateBatch, indices: list[int], k: int) -> list[int]:
        """Choose k of `indices` by mean matching, or by their similarity to the targets.

        Mean matching takes features of the paper as derivatives.
        """
        assert batch.features is not None
        own = batch.features[torch.tensor(indices, device=batch.features.device)]
        if self.strategy == "mean_matching":
            chosen = mean_matching(own, k)
        else:
            assert batch.targets is not None
            chosen = most_similar(own, batch.targets, k)
        return [indices[i] for i in chosen]

    def _choose_by_facility_location(
        self, problem: Problem, batch: CandidateBatch, indices: list[int], k: int, name: str
    ) -> Chosen:
        """Choose by facility location.

        If all distances fit the memory, every rank evaluates all candidates. Otherwise each rank
        evaluates the candidates that it owns, and the ranks exchange gains.
        """
        if self.strategy == "stochastic_greedy":
            return stochastic_greedy(problem, k, seed=self._random_seed(name))
        if self.strategy == "greedi":
            parts = [range(part, len(indices), self._num_parts) for part in range(self._num_parts)]
            return greedi(problem, k, parts, largest_remainder([len(part) for part in parts], k))
        if self._exchange is None or batch.owned is None or distances_fit(len(indices)):
            return lazy_greedy(problem, k)
        owned = torch.isin(torch.tensor(indices), batch.owned.cpu()).nonzero().squeeze(1)
        return lazy_greedy(problem, k, own=owned.to(problem.device), exchange=self._exchange)

    def _ranked(self, batch: CandidateBatch, indices: list[int], name: str) -> list[int]:
        """Sort `indices` into the order in which a baseline chooses them."""
        if self.strategy == "longest":
            return longest_first(indices, batch.num_tokens)
        if self.strategy in ("highest_loss", "lowest_loss"):
            assert batch.losses is not None
            highest = self.strategy == "highest_loss"
            return by_loss(indices, batch.losses.tolist(), highest=highest)
        return shuffled(indices, self._random_seed(name))

    def _random_seed(self, name: str) -> int:
        """The seed for a source in this selection."""
        return derive_seed(self._seed, "selection", self.step, zlib.crc32(name.encode())) % 2**63


def _derivatives(batch: CandidateBatch) -> Tensor:
    """The derivatives (n,) of the candidates, whose features have one number each."""
    assert batch.features is not None
    return dequantised(batch.features, batch.largest)[:, 0].cpu()
