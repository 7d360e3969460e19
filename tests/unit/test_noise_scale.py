"""The noise scale, on models of which it is known, and the advice that follows from it."""

import math

import pytest
import torch
from torch import Tensor

from zods.config.schema import parse_section
from zods.core.estimators import Term
from zods.core.noise_scale import (
    NoiseScale,
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
from zods.data.loader import TrainingLoader
from zods.data.order import Mixture
from zods.training.loss_exchange import ReducedLosses
from zods.training.noise_meter import NoiseMeter
from zods.trajectory.records import Step

DIMENSION, POPULATION = 40, 64


def gradients_with(noise_scale: float, generator: torch.Generator) -> Tensor:
    """Gradients of all examples, (P, d), whose noise scale is `noise_scale`. They are those of the
    quadratic losses |theta - c_i|^2 / 2 at 0.
    """
    noise = torch.randn(POPULATION, DIMENSION, generator=generator, dtype=torch.float64)
    noise -= noise.mean(0)
    mean = torch.ones(DIMENSION, dtype=torch.float64)
    variance = noise.square().sum() / (POPULATION - 1)
    return mean + noise * (noise_scale * mean.square().sum() / variance).sqrt()


def logistic_gradients(generator: torch.Generator) -> tuple[Tensor, float]:
    """Gradients of a logistic regression at a point, (P, d), and their noise scale."""
    x = torch.randn(POPULATION, DIMENSION, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0).double()
    gradients = (torch.sigmoid(0.3 * x[:, 1]) - y)[:, None] * x
    mean = gradients.mean(0)
    variance = (gradients - mean).square().sum() / (POPULATION - 1)
    return gradients, float(variance / mean.square().sum())


def measured(
    gradients: Tensor,
    sizes: list[int],
    directions: int,
    unit: int,
    steps: int,
    generator: torch.Generator,
) -> NoiseScale:
    """Measure steps whose groups of `sizes` examples are known in units of `unit` examples."""
    state = NoiseScale()
    for _ in range(steps):
        chosen = gradients[torch.randperm(POPULATION, generator=generator)[: sum(sizes)]]
        sums, squares, units = [], 0.0, 0
        for group in chosen.split(sizes):
            z = torch.randn(DIMENSION, directions, generator=generator, dtype=torch.float64)
            projected = group @ z
            sums.append(projected.sum(0).tolist())
            for part in projected.split(unit):
                squares += float(part.sum(0).square().sum()) / len(part)
                units += 1
        found = measure(sums, sizes, Spread(squares, units), POPULATION)
        state = record_noise(state, found, decay=1.0)
    return state


# (sizes of a step's groups, directions of each, examples of a unit)
LAYOUTS = {
    "all": ([16], 1, 1),
    "groups of four": ([4] * 4, 1, 1),
    "a smaller last group": ([6, 6, 4], 1, 1),
    "two directions": ([8, 8], 2, 1),
    "micro-batches": ([16], 1, 4),
    "uneven units": ([16], 1, 5),
    "a refresh in parts": ([16] * 4, 1, 1),
    "a whole refresh": ([POPULATION], 4, 1),
    "a whole refresh by micro-batches": ([POPULATION], 4, 8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("noise_scale", [0.5, 8.0])
def test_the_noise_scale_of_a_quadratic_is_found_whatever_shares_a_direction(layout, noise_scale):
    """The relative error of |g|^2 after D directions is sqrt(2 / D) (1 + N / m); the tolerance is
    four times this, and as much for a variance from few units.
    """
    sizes, directions, unit = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(1)
    steps = 4000
    state = measured(
        gradients_with(noise_scale, generator), sizes, directions, unit, steps, generator
    )
    number = steps * len(sizes) * directions
    error = math.sqrt(2 / number) * (1 + noise_scale * len(sizes) / sum(sizes))
    units = sum(math.ceil(size / unit) for size in sizes) - len(sizes)
    error += math.sqrt(2 / (steps * units)) * (1 + 1 / noise_scale / min(sizes))
    assert state.value == pytest.approx(noise_scale, rel=4 * error)
    assert 4 * error < 0.5


def test_the_noise_scale_of_a_logistic_regression_is_found():
    generator = torch.Generator().manual_seed(2)
    gradients, expected = logistic_gradients(generator)
    assert 1.0 < expected < 60.0
    state = measured(gradients, [16], 1, 1, 8000, generator)
    tolerance = 4 * math.sqrt(2 / 8000) * (1 + expected / 16)
    assert state.value == pytest.approx(expected, rel=tolerance)


def test_the_measure_does_not_depend_on_the_unit_of_losses_or_the_scale_of_one_step():
    step = measure([[4.0]], [2], Spread(10.0, 2), None)
    scaled = measure([[400.0]], [2], Spread(100_000.0, 2), None)
    assert scaled.value == pytest.approx(step.value)


def test_nothing_is_measured_where_no_two_units_share_a_direction():
    assert measure([[1.0], [2.0]], [1, 1], Spread(5.0, 2), None) == NoiseScale()
    assert measure([[3.0]], [8], Spread(9 / 8, 1), None) == NoiseScale()
    assert NoiseScale().value is None


def test_the_noise_scale_is_unknown_where_the_gradient_is_lost_in_noise():
    found = measure([[0.0]], [2], Spread(2.0, 2), None)  # the examples 1 and -1
    assert found.noise == 2.0
    assert found.value is None


@pytest.mark.parametrize("squares", [math.inf, math.nan])
def test_sums_that_are_not_finite_leave_no_trace(squares):
    assert measure([[1.0]], [2], Spread(squares, 2), None) == NoiseScale()


def test_measurements_of_two_layouts_are_added_without_bias_and_the_better_one_counts_more():
    """Whole refreshes beside steps of four examples, at a noise scale of 50.

    A step's direction has an error 1 + 50 / 4 times larger. With equal weights that of 400 steps
    would dominate: sqrt(2 * 400) * 13 / 600 = 0.6. The tolerance is four times the error of 200
    directions of refreshes, sqrt(2 / 200) = 0.1.
    """
    generator = torch.Generator().manual_seed(4)
    gradients = gradients_with(50.0, generator)
    steps = measured(gradients, [4], 1, 1, 400, generator)
    refreshes = measured(gradients, [POPULATION], 4, 1, 50, generator)
    state = record_noise(NoiseScale(), steps, weight=precision(4, POPULATION))
    state = record_noise(state, refreshes, weight=precision(POPULATION, POPULATION))
    assert state.value == pytest.approx(50.0, rel=0.4)
    assert precision(POPULATION, POPULATION) == 1.0


def test_shares_add_up_to_one_and_are_those_of_a_simulated_estimate():
    """The second moment of an estimate against the one with the mean gradient in every group.

    2,000 estimates of 40 parameters: relative errors near 2 / sqrt(2,000 * 8) = 1.6%.
    """
    generator = torch.Generator().manual_seed(3)
    gradients = gradients_with(8.0, generator)
    with_noise = without = 0.0
    for _ in range(2000):
        chosen = gradients[torch.randperm(POPULATION, generator=generator)[:32]]
        z = torch.randn(8, DIMENSION, generator=generator, dtype=torch.float64)
        of_groups = (z * chosen.view(8, 4, DIMENSION).mean(1)).sum(1)
        of_mean = z @ gradients.mean(0)
        with_noise += float((of_groups[:, None] * z).square().sum())
        without += float((of_mean[:, None] * z).square().sum())
    found = shares(8.0, 4, POPULATION)
    assert sum(found) == pytest.approx(1.0)
    assert found.direction == pytest.approx(without / with_noise, rel=0.08)
    assert shares(8.0, POPULATION, POPULATION).batch == 0.0


def test_staleness_is_the_share_of_corrections_in_sums_over_steps():
    assert Staleness().value == 0.0
    state = record_staleness(record_staleness(Staleness(), 0.0, 3.0), 2.0, 3.0)
    assert state.value == pytest.approx(2.0 / 8.0, rel=1e-2)


@pytest.mark.parametrize(
    ("noise_scale", "examples", "begins"),
    [
        (None, 16, "none: the noise scale is not known"),
        (None, 1, "larger batch"),
        (2.0, 1, "larger batch"),
        (2.0, 16, "more directions: examples_per_direction 1 has 6.0 times less noise"),
        (38.0, 16, "larger batch"),
        (38.0, 64, "more directions: examples_per_direction 1 has 2.6 times"),
    ],
)
def test_the_advice_for_mezo(noise_scale, examples, begins):
    assert advise(noise_scale, examples).startswith(begins)


@pytest.mark.parametrize(
    ("staleness", "refresh_share", "batch", "begins"),
    [
        (0.0, 0.5, None, "fewer refreshes"),
        (1e-320, 0.5, None, "fewer refreshes"),
        (0.5, 0.5, 0.3, "more directions"),
        (0.4, 0.5, 0.55, "larger batch: most noise is that of the examples"),
        (0.6, 0.5, 0.1, "larger batch: most noise is that of the corrections"),
        (0.9, 0.5, None, "more refreshes: anchor_interval near 33"),
        (1.0, 0.5, None, "more refreshes: anchor_interval near 1"),
        (0.1, 0.5, None, "fewer refreshes: anchor_interval near 300"),
        (0.5, 0.1, None, "more refreshes: anchor_interval near 33"),
    ],
)
def test_the_advice_for_svrg(staleness, refresh_share, batch, begins):
    assert advise_svrg(staleness, 100, refresh_share, batch).startswith(begins)


def test_directions_that_cost_nothing_or_are_shared_are_advised_for_svrg():
    assert "anchor_directions costs no forwards" in advise_svrg(0.1, 100, 0.5, 0.1, splits=True)
    said = advise_svrg(0.6, 100, 0.5, 0.1, examples=16.0)
    assert said.startswith("more directions")
    assert "examples_per_direction 1" in said


def test_a_step_with_fewer_examples_than_configured_measures_nothing():
    meter = meter_of(method="mezo", examples_per_direction="all")
    spread = Spread(squares=10.0, units=4)
    for examples, measured in ((3, False), (4, True)):
        reduced = ReducedLosses([[1.0]], 0.5, spread, examples, False, False)
        meter.add_step(reduced, Step(0, 0.5, 1e-3, (1.0,), None), ())
        assert (meter.noise.noise != 0.0) == measured


def test_the_advised_interval_has_the_least_noise_times_forwards():
    """Noise A + q c and forwards f + r / q, at an interval of 100."""
    a, c, f, r = 3.0, 0.2, 64.0, 512.0
    stale, refresh = 100 * c / (a + 100 * c), r / (100 * f + r)
    said = advise_svrg(stale, 100, refresh, None)
    best = min(range(1, 1000), key=lambda q: (a + q * c) * (f + r / q))
    assert said == f"more refreshes: anchor_interval near {best}"


def meter_of(**keys: object) -> NoiseMeter:
    return NoiseMeter(parse_section(keys), batch_size=4, loader=None, selects=False)


def loader_of(examples: list[float], mixture: Mixture | None = None) -> TrainingLoader:
    return TrainingLoader(
        examples,  # type: ignore[arg-type]
        **{"micro_batch": 4, "accumulation": 1, "rank": 0, "world_size": 1, "seed": 1},
        mixture=mixture,
    )


def test_batch_noise_of_a_mixture_is_that_of_its_effective_size():
    sources = ["a"] * 60 + ["b"] * 4
    mixture = Mixture.of(sources, {"a": 1, "b": 3}, "weights")
    figures = []
    for drawn_from in (None, mixture):
        meter = NoiseMeter(
            parse_section({"method": "mezo", "examples_per_direction": "all"}),
            batch_size=4,
            loader=loader_of([0.0] * 64, drawn_from),
            selects=False,
        )
        meter.add_step(reduced([[2.0]], Spread(20.0 / 16, 4)), step_of(2.0), ())
        figures.append(meter.figures())
    whole, mixed = figures
    # few examples make most of the draws, so that a batch of 4 has half of what there is
    assert mixture.effective_size == 7
    assert mixed["batch_noise"] < 0.6 * whole["batch_noise"]


def reduced(differences: list[list[float]], spread: Spread) -> ReducedLosses:
    return ReducedLosses(differences, 1.0, spread, 4, False, False)


def step_of(*coefficients: float, weight: float = 1.0) -> Step:
    return Step(0, 1.0, 0.1, coefficients, weight=weight)


def test_a_step_of_mezo_has_the_noise_scale_and_two_shares():
    meter = meter_of(method="mezo", examples_per_direction="all")
    # the examples 1, 1, 3, 3: mean 2, squares 1 + 1 + 9 + 9
    meter.add_step(reduced([[2.0]], Spread(20.0 / 16, 4)), step_of(2.0), ())
    # in the unit of `differences`, a row is a quarter of an example
    variance = 4 / 3
    signal = 4.0 - variance / 4
    figures = meter.figures()
    assert figures["noise_scale"] == pytest.approx(variance / signal, rel=1e-3)
    assert figures["batch_noise"] == pytest.approx(
        variance / signal / 4 / (1 + variance / signal / 4), rel=1e-3
    )
    assert list(figures) == ["noise_scale", "direction_noise", "batch_noise"]


def test_a_direction_per_example_says_nothing_of_the_noise_scale_and_still_gives_advice():
    meter = meter_of(method="mezo", examples_per_direction=1)
    meter.add_step(reduced([[2.0]] * 4, Spread(16.0, 4)), step_of(*[2.0] * 4), ())
    assert meter.summary() == {
        "advice": "larger batch: a step's noise falls in proportion to train_batch_size"
    }


def test_a_step_of_svrg_has_the_staleness_of_its_correction_at_the_weight_it_used():
    svrg = {"method": "mezo_svrg", "anchor_weight": 0.5, "examples_per_direction": "all"}
    loader = loader_of([0.0] * 64)
    meter = NoiseMeter(parse_section(svrg), batch_size=4, loader=loader, selects=False)
    meter.add_step(
        reduced([[2.0, 1.0]], Spread(1.0, 1)),
        step_of(3.0, weight=0.5),
        [Term(1, 4.0), Term(2, 2.0)],
    )
    assert meter.figures() == {"staleness": round(9.0 / (9.0 + 0.25 * 20.0), 3)}
