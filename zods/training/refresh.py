"""A refresh of the anchor: the losses of its pairs of points over the training set, as a record.

With `anchor_split` the examples are divided into as many parts as there are directions, and each
direction is evaluated on its own part: one pass. Otherwise all directions are evaluated on all
examples. Called by the engine.
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise
from typing import Any

from zods.config.schema import ZerothOrderConfig
from zods.core.example_groups import Group, part_starts
from zods.core.noise_scale import NoiseScale, Spread, measure
from zods.core.points import Point, pair
from zods.core.step_scale import StepScale, record_estimate
from zods.core.update_rule import StepRule
from zods.data.loader import TrainingLoader
from zods.data.order import anchor_order
from zods.forward.evaluator import Evaluator
from zods.selection.loaders import SelectingLoader
from zods.trajectory.records import Refresh


def measure_refresh(
    config: ZerothOrderConfig,
    evaluator: Evaluator,
    loader: TrainingLoader | SelectingLoader,
    step: int,
    lr: float,
    **how: Any,
) -> tuple[Refresh, NoiseScale]:
    """Evaluate the losses of a refresh before `step`. Returns its record, and the noise measured.

    lr: step size of the step along the gradient. how: the keyword arguments of
    `Evaluator.differences_over` from `micro_batch` on.
    """
    rule = StepRule(config)
    seeds = rule.seeds("anchor", step, config.anchor_directions)
    parts = len(seeds) if config.anchor_split else 1
    sets = len(seeds) // parts  # pairs of points of each part
    order = anchor_order(
        len(loader.dataset),
        examples=config.anchor_examples,
        shuffled=parts > 1,
        seed=rule.seeds("anchor_examples", step, 1)[0],
        mixture=loader.mixture,
    )

    def pair_of(group: Group, k: int) -> list[Point]:
        return pair(seeds[group.index * sets + k], config.eps, rows=group.rows)

    starts = part_starts(len(order), parts)
    differences = evaluator.differences_over(
        loader.dataset,
        order,
        starts,
        [functools.partial(pair_of, k=k) for k in range(sets)],
        loader.collate_fn,
        title=f"anchor at step {step}",
        **how,
    )
    gradient = rule.estimate_at_anchor(seeds, differences.values)
    coefficients = tuple(term.coefficient for term in gradient)
    # divided by the size of this gradient alone
    rms = record_estimate(StepScale(), coefficients).rms if config.normalize else None
    record = Refresh(step, lr, coefficients, rms, in_16_bits=rule.logs_16_bits)
    noise = NoiseScale()
    if coefficients:
        n, values = len(order), differences.values
        noise = measure(
            [[n * value for value in values[k : k + sets]] for k in range(0, len(values), sets)],
            [end - start for start, end in pairwise([*starts, n])],
            Spread(n**2 * math.fsum(differences.squares), differences.units),
            len(loader.dataset),
        )
    return record, noise
