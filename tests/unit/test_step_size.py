"""The step size for `"lr": "auto"`, on quadratic losses whose gradient and Hessian are known."""

from __future__ import annotations

import math

import pytest
import torch

from zods.core.step_size import NOISE_SCALES, Surroundings, curvature, suggest, tried

DIMENSION, EXAMPLES, DIRECTIONS = 400, 32, 400


class Quadratic:
    """Losses (theta - a)^T diag(h) (theta - a) / 2 of examples with random a, at theta = 0.

    gradients: -h a of some examples. gradient: its mean over all that could be drawn.
    """

    def __init__(self, noise_scale: float) -> None:
        generator = torch.Generator().manual_seed(3)
        self.h = torch.rand(DIMENSION, generator=generator, dtype=torch.float64)
        mean = torch.randn(DIMENSION, generator=generator, dtype=torch.float64)
        noise = torch.randn(EXAMPLES, DIMENSION, generator=generator, dtype=torch.float64)
        self.gradient = -self.h * mean
        of_noise = (self.h * noise).square().sum(1).mean()
        noise *= (noise_scale * self.gradient.square().sum() / of_noise).sqrt()
        self.gradients = -self.h * (mean + noise)
        self.z = torch.randn(DIRECTIONS, DIMENSION, generator=generator, dtype=torch.float64)

    def surroundings(self, units: int) -> Surroundings:
        along = self.z @ self.gradients.T
        of_units = along.view(DIRECTIONS, units, -1).sum(2)
        return Surroundings(
            self.h.sum().item(),
            along.mean(1).tolist(),
            (of_units.square().sum(1) * units / EXAMPLES**2).tolist(),
            units,
            EXAMPLES,
        )

    def best_change(self, groups: int) -> float:
        """The change of a weight, of a grid, with the lowest mean loss after a step."""
        parts = self.gradients.view(groups, -1, DIMENSION).mean(1)
        steps, squares = [], []
        for z in self.z.split(groups)[: DIRECTIONS // groups]:
            coefficients = (z * parts).sum(1, keepdim=True) / groups
            steps.append((coefficients * z).sum(0))
            squares.append(coefficients.square().sum())
        estimates = torch.stack(steps) / torch.stack(squares).mean().sqrt()
        falls = (estimates @ self.gradient).mean()
        curved = (estimates.square() @ self.h).mean()
        changes = torch.logspace(-4, 0, 400, dtype=torch.float64)
        return changes[(changes**2 / 2 * curved - changes * falls).argmin()].item()


@pytest.mark.parametrize("units", [EXAMPLES, 8])
@pytest.mark.parametrize("noise_scale", [16.0, 48.0])
def test_the_share_of_the_gradient_is_found_from_examples_or_from_parts_of_them(noise_scale, units):
    around = Quadratic(noise_scale).surroundings(units)
    # The estimate is low by a standard error, which 400 directions make small.
    assert 1.0 / around.share - 1.0 == pytest.approx(noise_scale, rel=0.6)
    assert around.share <= 1.2 / (1.0 + noise_scale)


@pytest.mark.parametrize("groups", [1, 8, EXAMPLES])
def test_the_change_of_a_step_is_the_best_one_of_a_quadratic_loss(groups):
    problem = Quadratic(noise_scale=16.0)
    found = suggest(problem.surroundings(EXAMPLES), groups, EXAMPLES / groups, normalize=True)
    assert found == pytest.approx(problem.best_change(groups), rel=0.5)


def test_a_step_size_is_halved_until_several_steps_stay_below_the_lowest_point_of_a_quadratic():
    problem, groups = Quadratic(noise_scale=16.0), 32
    parts = problem.gradients.view(groups, -1, DIMENSION).mean(1)
    z = problem.z[:groups]
    estimate = ((z * parts).sum(1, keepdim=True) * z).sum(0)
    estimate /= estimate.square().mean().sqrt()

    def rise(change: float) -> float:
        moved = -change * estimate
        return (problem.gradient @ moved + problem.h @ moved.square() / 2).item()

    best = problem.best_change(groups)
    for change in (best, 4.0 * best, 1000.0 * best):
        moved = 4.0 * change * tried(rise, change, 0.0)
        assert rise(moved / 2.0) > 0.75 * rise(moved)  # below the lowest point
        assert moved == 4.0 * change or rise(moved) <= min(0.0, 0.75 * rise(2.0 * moved))
    with pytest.raises(RuntimeError, match="raise the loss of other examples"):
        tried(lambda _: math.nan, best, 1.0)


def test_steps_with_and_without_normalization_have_one_length():
    around = Quadratic(noise_scale=16.0).surroundings(EXAMPLES)
    q, n = around.share, EXAMPLES
    of_estimate = around.size * math.sqrt((q + (1.0 - q) / n) / 1)
    normalized = suggest(around, 1, n, normalize=True)
    assert suggest(around, 1, n, normalize=False) * of_estimate == pytest.approx(normalized)


def test_a_change_of_the_losses_scale_leaves_normalized_steps_as_they_are():
    around = Quadratic(noise_scale=16.0).surroundings(EXAMPLES)
    scaled = Surroundings(
        7.0 * around.trace,
        [7.0 * value for value in around.means],
        [49.0 * value for value in around.mean_squares],
        around.units,
        around.examples,
    )
    assert suggest(scaled, 4, 2, normalize=True) == pytest.approx(
        suggest(around, 4, 2, normalize=True)
    )


@pytest.mark.parametrize(("units", "means"), [(1, [1.0, 2.0]), (4, [0.0, 0.0]), (4, [1e-9, -1e-9])])
def test_a_share_that_cannot_be_told_is_the_smallest_one(units, means):
    around = Surroundings(1.0, means, [1.0, 4.0], units, 8)
    assert around.share == 1.0 / (1.0 + NOISE_SCALES[1])


def test_a_share_near_one_is_not_assumed():
    around = Surroundings(1.0, [1.0, 2.0], [1.0, 4.0], 4, 8)
    assert around.share == 1.0 / (1.0 + NOISE_SCALES[0])


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_curvature_follows_from_the_distance_of_a_given_rise(power):
    wanted, distance = 0.02, 0.5  # the rise is `wanted` at this distance
    rises = [wanted * (d / distance) ** power for d in (0.1, 0.2, 0.4, 0.8)]
    assert curvature(wanted, 0.8, rises) == pytest.approx(2.0 * wanted / distance**2)


def test_curvature_of_a_loss_that_falls_and_then_rises_steeply_is_bounded():
    assert curvature(0.02, 0.8, [-0.1, -0.3, 50.0]) == pytest.approx(2.0 * 0.02 / 0.64)
    assert curvature(0.02, 0.8, [0.01, math.inf]) == pytest.approx(2.0 * 0.02 / 0.64)
    assert curvature(0.02, 0.001, [3.0]) == pytest.approx(2.0 * 3.0 / 1e-6)  # at eps already
