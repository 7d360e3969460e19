"""SPSA and SVRG as terms: limit cases from the papers, the dense reference, the table of variances,
the annealing rule.
"""

import math
import random
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.reference.dense import DenseReference, loss_of_module, named_parameters_of
from tests.reference.variance import (
    BATCH,
    NUM_EXAMPLES,
    NUM_PARAMETERS,
    LogisticRegression,
    errors_at_equal_forwards,
    errors_of_refresh,
)
from zods.core.annealing import WINDOW, Annealing, back_off, end_epoch, record_loss
from zods.core.directions import derive_seed
from zods.core.estimators import Term, descend, projected_grads, spsa, svrg
from zods.kernels import DISTRIBUTIONS, direction

D = 50


def z(seed: int, numel: int = D, distribution: str = "gaussian") -> Tensor:
    return direction(numel, seed=seed, distribution=distribution, parameter=0, offset=0).double()


def dense(terms) -> Tensor:
    """The vector that a list of terms stands for."""
    return sum(
        (coefficient * z(seed) for seed, coefficient in terms), torch.zeros(D, dtype=torch.float64)
    )


def numbers(seed: int, count: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.uniform(-2, 2) for _ in range(count)]


# --- SPSA ---


def test_projected_grads_of_a_quadratic_are_its_directional_derivatives():
    """The two-sided difference has no second-order error."""
    matrix = torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = torch.randn(D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(at: Tensor) -> float:
        return (at @ matrix @ at).item()

    seeds, eps = [1, 2, 3], 1e-2
    got = projected_grads([loss(theta + eps * z(s)) - loss(theta - eps * z(s)) for s in seeds], eps)
    grad = (matrix + matrix.T) @ theta
    assert got == pytest.approx([(grad @ z(s)).item() for s in seeds], rel=1e-9)


def test_spsa_is_the_mean_over_its_directions():
    seeds, c = [5, 6, 7], numbers(0, 3)
    torch.testing.assert_close(dense(spsa(seeds, c)), sum(c[k] * z(seeds[k]) for k in range(3)) / 3)


def test_spsa_of_one_direction_is_that_of_mezo():
    assert spsa([9], [0.3]) == [Term(9, 0.3)]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_spsa_is_unbiased(distribution):
    """The mean of (g.z) z over 4,000 directions is g; each element's error has a deviation of |g| /
    sqrt(4,000).
    """
    grad = torch.randn(D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grad /= grad.norm()
    directions = torch.stack(
        [z(derive_seed(0, "step", k), distribution=distribution) for k in range(4000)]
    )
    terms = spsa(range(4000), (directions @ grad).tolist())
    mean = torch.tensor([t.coefficient for t in terms], dtype=torch.float64) @ directions
    assert (mean - grad).norm() < 1.3 * math.sqrt(D / 4000)


@pytest.mark.parametrize(("seeds", "coefficients"), [([1], []), ([1], [0.1, 0.2]), ([], [1.0])])
def test_a_direction_without_its_coefficient_is_an_error(seeds, coefficients):
    with pytest.raises(ValueError, match="zip"):
        spsa(seeds, coefficients)


# --- SVRG: Gautam et al. 2024, algorithm 2 ---


@pytest.mark.parametrize("anchor_seeds", [[1, 2, 3], [4, 5, 6], [3, 1, 2], [1, 5, 6]])
def test_svrg_is_the_difference_of_two_estimates_whatever_the_directions(anchor_seeds):
    seeds, c, a = [1, 2, 3], numbers(1, 3), numbers(2, 3)
    torch.testing.assert_close(
        dense(svrg(seeds, c, anchor_seeds, a)), dense(spsa(seeds, c)) - dense(spsa(anchor_seeds, a))
    )


def test_svrg_without_a_loss_difference_at_the_anchor_is_mezo():
    seeds, c = [1, 2, 3], numbers(1, 3)
    assert svrg(seeds, c, seeds, [0.0] * 3) == spsa(seeds, c)
    assert descend(svrg(seeds, c, [4, 5, 6], [0.0] * 3), 0.1) == descend(spsa(seeds, c), 0.1)


def test_svrg_at_the_anchor_is_no_correction_at_all():
    """theta = anchor with a shared direction: no term is left, the update is -lr * g alone."""
    seeds, c = [1, 2, 3], numbers(1, 3)
    assert descend(svrg(seeds, c, seeds, c), 0.1) == ()


def test_svrg_with_independent_directions_is_not_nothing_at_the_anchor():
    c = numbers(1, 3)
    assert len(descend(svrg([1, 2, 3], c, [4, 5, 6], c), 0.1)) == 6


def test_a_shared_direction_is_one_term():
    """A sweep over the shard costs by its terms."""
    assert len(svrg([1, 2], [0.1, 0.2], [1, 2], [0.3, 0.4])) == 2
    assert len(svrg([1, 2], [0.1, 0.2], [3, 4], [0.3, 0.4])) == 4


# --- descend ---


def test_descend_goes_against_the_estimate_by_lr():
    terms = spsa([1, 2], [0.5, -3.0])
    torch.testing.assert_close(dense(descend(terms, 0.01)), -0.01 * dense(terms))


def test_descend_leaves_out_only_what_is_zero():
    terms = [Term(1, 0.0), Term(2, 1e-300), Term(3, -0.0), Term(4, math.inf), Term(5, 1e-20)]
    assert [t.seed for t in descend(terms, 1e-6)] == [2, 4, 5]
    assert descend([Term(1, 0.0), Term(2, 3.0)], 0.0) == ()
    assert [t.seed for t in descend([Term(6, math.nan)], 1.0)] == [6]  # not hidden


# --- against the dense reference ---


def classifier() -> torch.nn.Module:
    torch.manual_seed(3)
    module = torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    ).double()
    module[0].bias.requires_grad_(False)
    return module


def reference(**settings) -> tuple[DenseReference, list[dict]]:
    """A dense run with its ten global batches."""
    module = classifier()
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (40,), generator=generator)

    def mean_loss(outputs, batch):
        return functional.cross_entropy(outputs, batch["labels"])

    class WithLabels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, input, labels):
            return self.inner(input)

    whole = WithLabels()
    trainable = {name for name, param in whole.named_parameters() if param.requires_grad}
    batches = [
        {"input": inputs[4 * k : 4 * k + 4], "labels": labels[4 * k : 4 * k + 4]} for k in range(10)
    ]
    settings = {"eps": 1e-3, "lr": 0.02, "anchor_interval": 4, **settings}
    run = DenseReference(
        named_parameters_of(whole), loss_of_module(whole, mean_loss),
        {"input": inputs, "labels": labels}, trainable, **settings,
    )  # fmt: skip
    return run, batches


def run_by_terms(run: DenseReference, batches: list[dict]) -> dict[str, Tensor]:
    """The steps of `run`, computed with zods.core.estimators.

    Only the loss and the settings of `run` are used.
    """
    theta = {name: value.clone() for name, value in run.params.items()}
    whole = run.whole_set
    anchor, g = theta, []

    def move(terms, decay=1.0):
        moved = dict(theta)
        for name, value in theta.items():
            if name in run.trainable:
                moved[name] = value * (decay if value.dim() >= 2 else 1.0)
                moved[name] = moved[name] + sum(t.coefficient * run.z(t.seed)[name] for t in terms)
        return moved

    def coefficients(at, seeds, batch):
        sides = [
            [
                run.loss(
                    {n: v + sign * run.eps * run.z(s).get(n, 0.0) for n, v in at.items()}, batch
                )
                for s in seeds
            ]
            for sign in (1, -1)
        ]
        plus, minus = sides
        return projected_grads([a - b for a, b in zip(plus, minus, strict=True)], run.eps)

    def seeds(purpose, step, number):
        return [derive_seed(run.seed, purpose, step, k) for k in range(number)]

    for step, batch in enumerate(batches):
        if run.method == "mezo_svrg" and step % run.anchor_interval == 0:
            anchor, of_g = theta, seeds("anchor", step, run.anchor_directions)
            g = spsa(of_g, coefficients(anchor, of_g, whole))
            theta = move(descend(g, run.lr if run.anchor_lr is None else run.anchor_lr))
        own = seeds("step", step, run.num_directions)
        estimate = spsa(own, c := coefficients(theta, own, batch))
        if run.method == "mezo_svrg":
            other = own if run.share_direction else seeds("step_anchor", step, run.num_directions)
            estimate = svrg(own, c, other, coefficients(anchor, other, batch)) + g
        theta = move(descend(estimate, run.lr), 1 - run.lr * run.weight_decay)
    return theta


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "mezo"},
        {"method": "mezo", "num_directions": 3, "weight_decay": 0.5, "direction": "rademacher"},
        {"method": "mezo_svrg"},
        {"method": "mezo_svrg", "share_direction": False, "num_directions": 2},
        {
            "method": "mezo_svrg",
            "anchor_directions": 5,
            "num_directions": 2,
            "weight_decay": 0.5,
            "anchor_lr": 0.1,
        },
        {"method": "mezo_svrg", "anchor_interval": 1, "anchor_lr": 0.0, "direction": "rademacher"},
    ],
    ids=str,
)
def test_steps_by_terms_are_those_of_the_dense_reference(settings):
    """Ten steps in float64.

    Sums are taken in another order: 1e-16 per loss, by 1 / (2 eps), grows to 1e-12.
    """
    run, batches = reference(**settings)
    by_terms = run_by_terms(run, batches)
    start = {name: value.clone() for name, value in run.params.items()}
    for batch in batches:
        run.step(batch)
    for name, value in run.params.items():
        torch.testing.assert_close(by_terms[name], value, rtol=0, atol=1e-10)
        assert torch.equal(value, start[name]) == (name not in run.trainable)


def test_the_dense_reference_at_its_anchor_follows_the_anchor_gradient_alone():
    run, batches = reference(anchor_interval=1, anchor_lr=0.0, anchor_directions=3)
    before = {name: value.clone() for name, value in run.params.items()}
    run.step(batches[0])
    for name, grad in run.anchor_grad.items():
        torch.testing.assert_close(
            run.params[name], before[name] - run.lr * grad, rtol=0, atol=1e-15
        )


def test_the_dense_anchor_is_a_copy():
    run, batches = reference(anchor_interval=100)
    start = {name: value.clone() for name, value in run.params.items()}
    for batch in batches:
        run.step(batch)
    assert all(torch.equal(run.anchor[name], value) for name, value in start.items())


def test_dense_mezo_descends():
    run, batches = reference(method="mezo", num_directions=4, lr=0.05)
    before = run.loss(run.params, run.whole_set)
    for _ in range(4):
        for batch in batches:
            run.step(batch)
    assert run.loss(run.params, run.whole_set) < 0.9 * before


# --- the table of variances ---

DRAWS, ANCHOR_DIRECTIONS = 600, 16


def mean_squared_errors() -> dict[str, float]:
    """The mean of |estimate - gradient|^2 / |gradient|^2 of five estimates.

    The mean is over DRAWS draws of a batch and of directions.
    """
    problem = LogisticRegression()
    anchor = torch.zeros(NUM_PARAMETERS, dtype=torch.float64)
    theta = anchor - 0.01 * problem.grad(anchor)
    grad = problem.grad(theta)
    at_theta, at_anchor = problem.x @ theta, problem.x @ anchor
    generator = torch.Generator().manual_seed(1)
    sums: dict[str, float] = {}
    for draw in range(DRAWS):
        own, other = derive_seed(0, "step", draw), derive_seed(0, "step_anchor", draw)
        of_g = [derive_seed(0, "anchor", draw, k) for k in range(ANCHOR_DIRECTIONS)]
        rows = {seed: row for row, seed in enumerate([own, other, *of_g])}
        directions = torch.stack([z(seed, NUM_PARAMETERS) for seed in rows])
        x_dot_z = directions @ problem.x.T
        batch = torch.randperm(NUM_EXAMPLES, generator=generator)[None, :BATCH]
        c = problem.projected(at_theta, x_dot_z[:1], batch)
        a = problem.projected(at_anchor, x_dot_z[:1], batch)
        a_other = problem.projected(at_anchor, x_dot_z[1:2], batch)
        c_g = problem.projected(at_anchor, x_dot_z[2:], None)
        estimates = {
            "mezo": spsa([own], c),
            "shared, 1": svrg([own], c, [own], a) + spsa(of_g[:1], c_g[:1]),
            "shared, 16": svrg([own], c, [own], a) + spsa(of_g, c_g),
            "independent, 1": svrg([own], c, [other], a_other) + spsa(of_g[:1], c_g[:1]),
            "independent, 16": svrg([own], c, [other], a_other) + spsa(of_g, c_g),
        }
        for name, terms in estimates.items():
            weights = torch.zeros(len(rows), dtype=torch.float64)
            for seed, coefficient in terms:
                weights[rows[seed]] += coefficient
            error = (weights @ directions - grad).square().sum() / grad.square().sum()
            sums[name] = sums.get(name, 0.0) + error.item() / DRAWS
    return sums


def test_a_shared_direction_with_a_true_anchor_reduces_the_variance_and_independent_ones_do_not():
    """The design's table: MeZO 14,225; independent 30,043; shared 1,806, and 124 with 16 anchor
    directions.

    In theory d + 2 times the squared norm of the gradient whose direction is drawn: of the batch
    (7.4 times that of all examples here), of the difference of two batches' (nearly none), of all
    examples, over K. 600 draws of a squared Gaussian are within 6% of it, one standard deviation.
    """
    mse = mean_squared_errors()
    assert mse["mezo"] == pytest.approx(14_225, rel=0.25)
    assert mse["mezo"] >= 5 * mse["shared, 1"]
    assert mse["shared, 1"] >= 10 * mse["shared, 16"]
    assert mse["shared, 16"] == pytest.approx(2002 / 16, rel=0.25)
    assert mse["independent, 1"] >= mse["mezo"]
    assert mse["independent, 16"] >= mse["mezo"]


@pytest.mark.parametrize("number", [4, 16])
def test_split_directions_of_a_refresh_add_the_noise_of_their_examples(number):
    """The error over |g|^2 is d / K for K directions on the whole set of n examples each.

    With each on its own K-th of the set it is d (1 / K + N / n), with N the variance of examples'
    gradients over the squared norm of their mean: 465 here, where labels are noisy, so that more
    than one direction gains little. On prompted language models N is 2 to 8.
    """
    found = errors_of_refresh(number, draws=100)
    assert found["noise"] == pytest.approx(465, abs=1)
    assert found["whole passes"] == pytest.approx(NUM_PARAMETERS / number, rel=0.2)
    expected = NUM_PARAMETERS * (1 / number + found["noise"] / NUM_EXAMPLES)
    assert found["one pass"] == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(("descents", "times"), [(0, 5), (300, 100)], ids=["far", "near"])
def test_svrg_with_a_direction_per_example_has_a_fraction_of_the_error_of_mezo(descents, times):
    """20 steps after a refresh, at equal forwards. Seen: 6,758 and 754 far from the optimum, 9,892
    and 31 near it. The error of 64 anchor directions alone is 2,000 / 64 = 31.
    """
    errors = errors_at_equal_forwards(descents)
    assert errors["svrg, per example"] * times <= errors["mezo"]
    assert errors["svrg, per example"] >= 0.8 * NUM_PARAMETERS / 64


# --- annealing ---


def after(*means: float, alpha: float = 5.0, threshold: float = 1.05) -> float:
    """The divisor after epochs of these mean losses."""
    state = Annealing()
    for mean in means:
        for loss in (mean - 0.1, mean + 0.1):
            state = record_loss(state, loss)
        state = end_epoch(state, alpha=alpha, threshold=threshold)
    return state.divisor


def test_the_first_epoch_never_divides_the_step_sizes():
    assert after(100.0) == 1.0


def test_an_epoch_that_is_worse_by_the_threshold_divides_the_step_sizes_by_alpha():
    assert after(1.0, 1.06) == 5.0
    assert after(1.0, 1.06, alpha=2.0) == 2.0
    assert after(1.0, 1.2, threshold=1.25) == 1.0
    assert after(1.0, 1.5, threshold=1.5) == 1.0  # exceeded, not reached


@pytest.mark.parametrize("mean", [0.2, 1.0, 1.04])
def test_an_epoch_that_is_better_equal_or_hardly_worse_does_not_divide(mean):
    assert after(1.0, mean) == 1.0


def test_an_epoch_is_compared_with_the_one_before_it_and_not_with_the_best():
    assert after(1.0, 2.0, 2.0, 2.0) == 5.0
    assert after(1.0, 0.5, 0.9) == 5.0


def test_the_step_sizes_are_divided_again_and_again_without_a_floor():
    assert after(*(2.0**k for k in range(41)), alpha=4.0) == 4.0**40


def test_a_mean_is_over_the_losses_of_its_epoch_alone():
    state = Annealing()
    for losses in ([1.0], [1.0, 1.0, 1.0, 1.3], [1.0, 1.1]):  # means 1, 1.075, 1.05
        for loss in losses:
            state = record_loss(state, loss)
        state = end_epoch(state, alpha=5.0, threshold=1.05)
    assert state == Annealing(divisor=5.0, previous_mean=1.05)


def test_an_epoch_without_a_loss_changes_nothing():
    """All of its steps were skipped."""
    state = end_epoch(record_loss(Annealing(), 1.0), alpha=5.0, threshold=1.05)
    assert end_epoch(state, alpha=5.0, threshold=1.05) == state


def test_the_running_epoch_does_not_touch_the_divisor():
    state = end_epoch(record_loss(Annealing(), 1.0), alpha=5.0, threshold=1.05)
    assert record_loss(state, 1e9).divisor == 1.0


def after_steps(losses: Iterable[float]) -> list[float]:
    """The divisor after each step with these losses, where the step size is measured."""
    state, found = Annealing(), []
    for loss in losses:
        state = back_off(record_loss(state, loss))
        found.append(state.divisor)
    return found


def noise(size: float, number: int) -> list[float]:
    generator = torch.Generator().manual_seed(5)
    return (size * torch.randn(number, generator=generator)).tolist()


def test_noise_and_a_falling_loss_do_not_back_off():
    assert after_steps(1.0 + value for value in noise(0.3, 400))[-1] == 1.0
    assert after_steps(math.exp(-k / 100) + v for k, v in enumerate(noise(0.2, 400)))[-1] == 1.0


def test_the_noise_of_a_long_run_does_not_back_off():
    assert after_steps(1.0 + value for value in noise(0.3, 20_000))[-1] == 1.0


def test_one_step_with_a_high_loss_does_not_back_off():
    losses = [1.0 + value for value in noise(0.1, 60)]
    losses[50] = 1e6
    assert after_steps(losses)[-1] == 1.0


def test_a_loss_that_has_risen_backs_off_once_until_it_rises_further():
    level = [0.5] * WINDOW + [1.0] * (4 * WINDOW) + [2.0] * (3 * WINDOW)
    found = after_steps(a + b for a, b in zip(level, noise(0.2, len(level)), strict=True))
    assert found[WINDOW - 1 :: WINDOW] == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 4.0]


def test_the_rise_that_backs_off_is_above_the_lowest_window_and_not_the_last_one():
    levels = [
        1.0,
        0.5,
        0.6,
        0.7,
        0.8,
        0.9,
        1.0,
    ]  # no window is above the one before it by its noise
    level = [value for value in levels for _ in range(WINDOW)]
    found = after_steps(a + b for a, b in zip(level, noise(0.2, len(level)), strict=True))
    assert found[-1] == 2.0
