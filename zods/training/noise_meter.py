"""Measure the noise of a run's estimates, for its reports. The engine owns one `NoiseMeter`.

The mathematics is that of `zods.core.noise_scale`. No bit of a step depends on it. A resumed run
begins anew: the log holds neither the losses of examples nor their spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from zods.config.schema import ZerothOrderConfig
from zods.core.estimators import Term
from zods.core.example_groups import group_starts
from zods.core.noise_scale import (
    NoiseScale,
    Shares,
    Spread,
    Staleness,
    advise,
    advise_svrg,
    measure,
    precision,
    record_noise,
    record_staleness,
    shares,
)
from zods.data.loader import EpochLoader
from zods.training.loss_exchange import ReducedLosses
from zods.trajectory.records import Step

DIGITS = 3  # of the reported figures, which are known less well
INTERVAL = 10  # steps between two reports: running means change slowly, and lines are kept short


class NoiseMeter:
    """Running measurements, the same on all ranks.

    noise: what the noise scale is computed from. staleness: of the anchor, in the steps so far.
    """

    def __init__(
        self,
        config: ZerothOrderConfig,
        *,
        batch_size: int,
        loader: EpochLoader | None,
        selects: bool,
    ) -> None:
        """loader: of the training examples, where it is known. selects: whether the examples of a
        step are chosen. Then they are no random sample, and steps do not measure the noise.
        """
        self.noise, self.staleness = NoiseScale(), Staleness()
        self._config, self._batch_size = config, batch_size
        self._population = None if loader is None else loader.population
        self._selects = selects
        starts = group_starts(batch_size, config.examples_per_direction)
        self._sizes = [end - start for start, end in pairwise([*starts, batch_size])]
        size = 0 if loader is None else len(loader.dataset)  # a refresh needs a loader
        self._refresh_examples = min(config.anchor_examples or size, size)

    def add_refresh(self, found: NoiseScale) -> None:
        """Add the noise that a refresh has measured."""
        weight = precision(self._refresh_examples / self._parts, self._population)
        self.noise = record_noise(self.noise, found, weight=weight, decay=1.0)

    def add_step(self, reduced: ReducedLosses, record: Step, gradient: Sequence[Term]) -> None:
        """Add a step that is not skipped. gradient: the anchor's, without terms for MeZO."""
        number = self._config.num_directions
        found, weight = NoiseScale(), 0.0
        # with fewer or more examples, as in a user's own batch, the sizes of the groups are unknown
        if not self._selects and reduced.examples == self._batch_size:
            of_example = self._batch_size / len(self._sizes)  # see ReducedLosses.differences
            found = measure(
                [[of_example * c for c in of_group[:number]] for of_group in reduced.differences],
                self._sizes,
                Spread(of_example**2 * reduced.spread.squares, reduced.spread.units),
                self._population,
            )
            weight = precision(of_example, self._population)
        self.noise = record_noise(self.noise, found, weight=weight)
        if self._config.is_svrg:
            correction = math.fsum(c * c for c in record.coefficients or ())
            anchor = record.weight**2 * math.fsum(c * c for _, c in gradient)
            self.staleness = record_staleness(self.staleness, correction, anchor)

    @property
    def shares(self) -> Shares | None:
        """Shares in the estimates' second moment; None where the noise scale is not known."""
        value = self.noise.value
        if value is None:
            return None
        return shares(value, self._examples, self._population, self.staleness.value)

    @property
    def _examples(self) -> float:
        """Number of examples that share a direction; in MeZO-SVRG, at a refresh."""
        if not self._config.is_svrg:
            return self._batch_size / len(self._sizes)
        return self._refresh_examples / self._parts

    @property
    def _parts(self) -> int:
        return self._config.anchor_directions if self._config.anchor_split else 1

    def figures(self) -> dict[str, float]:
        """The figures that are known, by name: the noise scale, and shares that add up to 1."""
        found = self.shares
        if found is None:
            stale = {"staleness": self.staleness.value} if self._config.is_svrg else {}
            return _rounded(stale)
        assert self.noise.value is not None
        known = {
            "noise_scale": self.noise.value,
            "direction_noise": found.direction,
            "batch_noise": found.batch,
            "staleness": found.staleness,
        }
        if not self._config.is_svrg:
            del known["staleness"]
        return _rounded(known)

    def report(self, step: int) -> dict[str, float]:
        """The figures for the report of a step, numbered from 1; none except every INTERVAL steps."""
        return {} if step % INTERVAL else self.figures()

    def advice(self) -> str:
        """One line: what would reduce the noise most."""
        config, found = self._config, self.shares
        if not config.is_svrg:
            return advise(self.noise.value, self._examples)
        of_refresh = 2 * self._refresh_examples * config.anchor_directions // self._parts
        of_steps = 4 * config.num_directions * self._batch_size * config.anchor_interval
        return advise_svrg(
            self.staleness.value,
            config.anchor_interval,
            of_refresh / (of_refresh + of_steps),
            None if found is None or config.anchor_examples is None else found.batch,
            examples=self._batch_size / len(self._sizes),
            splits=config.anchor_split
            and found is not None
            and 2.0 * found.batch < found.direction,
        )

    def summary(self) -> dict[str, Any]:
        """The figures and the advice."""
        return {**self.figures(), "advice": self.advice()}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.{DIGITS}g}") for name, value in values.items()}
