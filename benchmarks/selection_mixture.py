"""The error of a chosen mini-batch's mean gradient on synthetic mixtures: a part of
`benchmarks/selection.py`.
"""

from __future__ import annotations

import itertools
import statistics

import torch
from selection_models import BUDGET, CANDIDATES, Row
from torch import Tensor

from zods.selection import facility_location as fl
from zods.selection.mean_matching import balanced_start, mean_matching, narrowed

SOURCES, ELEMENTS, DIRECTIONS = 6, 4096, 64
NOISE = (0.7, 2.0)  # of an example's gradient, where the centres have deviation 1


def mixture(num_mixtures: int) -> list[Row]:
    """Choose 64 of 128 gradients of six sources: the relative error of their mean, by choice.

    All choices but the last see 64 random projections of the gradients.
    """
    errors: dict[tuple[float, str], list[float]] = {}
    for noise, seed in itertools.product(NOISE, range(num_mixtures)):
        gradients, generator = gradients_of(seed, noise)
        mean = gradients.mean(0)
        for name, ids in choices(gradients, generator).items():
            error = (gradients[ids].mean(0) - mean).norm() / mean.norm()
            errors.setdefault((noise, name), []).append(float(error))
    return [
        {
            "part": "mixture",
            "noise": noise,
            "choice": name,
            "relative_error": statistics.mean(of_choice),
            "relative_errors": of_choice,
        }
        for (noise, name), of_choice in errors.items()
    ]


def gradients_of(seed: int, noise: float) -> tuple[Tensor, torch.Generator]:
    """Gradients (128, 4096): a centre of their source and noise, times a log-normal length."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(SOURCES, ELEMENTS, generator=generator)
    shares = torch.rand(SOURCES, generator=generator) + 0.2
    source = torch.multinomial(shares, CANDIDATES, True, generator=generator)
    of_examples = torch.randn(CANDIDATES, ELEMENTS, generator=generator)
    lengths = (0.3 * torch.randn(CANDIDATES, 1, generator=generator)).exp()
    return (centres[source] + noise * of_examples) * lengths, generator


def choices(gradients: Tensor, generator: torch.Generator) -> dict[str, list[int]]:
    """The ids that each way of choosing finds, with one source for all candidates."""
    features = gradients @ torch.randn(ELEMENTS, DIRECTIONS, generator=generator)
    values = fl.quantised(features, float(features.abs().max()))
    whole = fl.quantised(gradients, float(gradients.abs().max()))
    return {
        "random": torch.randperm(CANDIDATES, generator=generator)[:BUDGET].tolist(),
        "facility location": fl.lazy_greedy(fl.from_features(features), BUDGET).ids,
        "mean matching, start only": balanced_start(narrowed(values), BUDGET),
        "mean matching": mean_matching(values, BUDGET),
        "mean matching, whole gradients": mean_matching(whole, BUDGET),
    }
