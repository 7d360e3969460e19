"""The running size of the estimates, by which normalized steps are divided."""

import math

import pytest
import torch

from tests.reference.dense import DenseReference
from zods.core.step_scale import StepScale, record_estimate


def scale_of(estimates: list[list[float]]) -> StepScale:
    state = StepScale()
    for coefficients in estimates:
        state = record_estimate(state, coefficients)
    return state


def test_the_size_of_equal_estimates_is_that_of_each():
    for number in (1, 2, 50, 5000):
        assert scale_of([[3.0, 4.0]] * number).rms == pytest.approx(5.0, rel=1e-12)


def test_the_size_is_the_weighted_mean_of_the_dense_reference():
    reference = DenseReference({}, lambda params, batch: 0.0)
    estimates = [[math.sin(k), math.cos(3 * k)] for k in range(1000)]
    reference.squares = [a * a + b * b for a, b in estimates]
    assert scale_of(estimates).rms == pytest.approx(reference.rms(), rel=1e-12)


def test_the_size_of_estimates_that_are_all_zero_divides_by_one():
    assert StepScale().rms == 1.0
    assert scale_of([[0.0], []]).rms == 1.0


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_the_size_is_proportional_to_the_loss(factor):
    estimates = [[math.sin(k)] for k in range(100)]
    scaled = [[factor * c for c in of] for of in estimates]
    assert scale_of(scaled).rms == pytest.approx(factor * scale_of(estimates).rms, rel=1e-12)


@pytest.mark.parametrize("method", ["mezo", "mezo_svrg"])
def test_normalized_steps_do_not_depend_on_the_scale_of_the_loss(method):
    def run(factor: float) -> torch.Tensor:
        dense = DenseReference(
            {"w": torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).view(2, 3)},
            lambda params, batch: factor * float(((params["w"] - batch) ** 2).sum()),
            whole_set=torch.tensor(0.5, dtype=torch.float64),
            **{"method": method, "normalize": True, "lr": 0.01, "anchor_interval": 4},
            **{"anchor_directions": 2, "weight_decay": 0.1},
        )
        for k in range(10):
            dense.step(torch.tensor(0.1 * k, dtype=torch.float64))
        return dense.params["w"]

    assert torch.allclose(run(1.0), run(1e4), rtol=1e-7, atol=0.0)
