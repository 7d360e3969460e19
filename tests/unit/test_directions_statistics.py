"""Directions are distributed as they say, and nothing that must be independent is correlated.

Every case is fixed by its seeds, so a test passes always or never. Bounds are five standard errors
where nothing else is said: for one statistic of an ideal generator that is a chance of 6e-7, and
about 200 are looked at here.
"""

import itertools

import pytest
import torch

from zods.kernels import DISTRIBUTIONS, combine_, direction

NUMEL = 2**22


def z(
    distribution: str, seed: int = 1, parameter: int = 0, offset: int = 0, numel: int = NUMEL
) -> torch.Tensor:
    return direction(
        numel, seed=seed, distribution=distribution, parameter=parameter, offset=offset
    )


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """The correlation of two standardised samples, in units of its standard error."""
    return torch.dot(x, y).item() / x.numel() ** 0.5


@pytest.mark.parametrize(
    ("seed", "parameter", "offset"), [(0, 0, 0), (2**63 + 17, 1000, 12345), (7, 2**31 - 1, 2**40)]
)
def test_gaussian_moments(seed, parameter, offset):
    x = z("gaussian", seed, parameter, offset).double()
    # of x^power: E x^2p - (E x^p)^2
    for power, expected, variance in (
        (1, 0, 1),
        (2, 1, 2),
        (3, 0, 15),
        (4, 3, 96),
    ):
        assert abs((x**power).mean().item() - expected) < 5 * (variance / NUMEL) ** 0.5
    assert abs(((x - x.mean()) ** 3).mean() / x.var() ** 1.5) < 5 * (6 / NUMEL) ** 0.5
    assert abs(((x - x.mean()) ** 4).mean() / x.var() ** 2 - 3) < 5 * (24 / NUMEL) ** 0.5


@pytest.mark.parametrize("row", range(4))
def test_every_gaussian_row_follows_the_normal_distribution(row):
    """Kolmogorov-Smirnov: sqrt(n) D > 2.7 has a chance of 2 exp(-2 * 2.7^2) = 9e-7."""
    x = z("gaussian", seed=3).view(-1, 4, 16)[:, row].flatten().double().sort().values
    cdf, step = torch.special.ndtr(x), torch.arange(x.numel() + 1) / x.numel()
    distance = max((cdf - step[:-1]).abs().max(), (cdf - step[1:]).abs().max())
    assert x.numel() ** 0.5 * distance < 2.7


def test_gaussian_tails():
    counts, total = torch.zeros(3), 0
    thresholds = torch.tensor([3.0, 4.0, 5.0])
    for parameter in range(16):  # 64 M elements: 38 beyond 5 sigma
        x = z("gaussian", seed=11, parameter=parameter).abs_()
        counts += torch.stack([(x > t).sum() for t in thresholds])
        total += x.numel()
    expected = 2 * total * torch.special.ndtr(-thresholds.double())
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all(), (counts, expected)


def test_rademacher_takes_both_signs_equally_often():
    for seed, parameter, offset in ((0, 0, 0), (2**63 + 17, 1000, 12345), (7, 2**31 - 1, 2**40)):
        x = z("rademacher", seed, parameter, offset)
        assert set(x.unique().tolist()) == {-1.0, 1.0}
        assert abs(x.sum().item()) < 5 * NUMEL**0.5


@pytest.mark.parametrize(
    ("distribution", "size"), [("gaussian", 64), ("gaussian", 2048), ("rademacher", 2048)]
)
def test_positions_in_a_group_are_fair_and_uncorrelated(distribution, size):
    """Every bit of every word in every lane.

    Of two million correlations none passes seven standard errors (chance 5e-6).
    """
    positions = z(distribution, seed=5).view(-1, size)
    num_groups = positions.shape[0]
    # of 2048 sums, six standard errors: 4e-6
    assert positions.sum(0).abs().max() < 6 * num_groups**0.5
    gram = positions.T @ positions / num_groups**0.5
    assert gram.fill_diagonal_(0).abs().max() < 7


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_seeds_parameters_and_offsets_are_uncorrelated(distribution):
    names = [
        {"seed": 40},
        {"seed": 41},
        {"seed": 42},
        {"seed": 40 + 2**32},
        {"seed": 40, "parameter": 1},
    ]
    names += [
        {"seed": 40, "offset": NUMEL},
        {"seed": 40, "offset": 2**32},
        {"seed": 40, "offset": 2**34},
    ]
    made = [z(distribution, **name) for name in names]
    for (name_x, x), (name_y, y) in itertools.combinations(zip(names, made, strict=True), 2):
        assert abs(correlation(x, y)) < 5, (name_x, name_y)
    assert abs(correlation(z("gaussian", 40), z("rademacher", 40))) < 5


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_neighbours_are_uncorrelated(distribution):
    """Lag 16 joins the two halves of a Box-Muller pair, lag 512 two words of a Rademacher block."""
    x = z(distribution, seed=6)
    for lag in (1, 2, 15, 16, 17, 32, 48, 64, 128, 512, 2048):
        assert abs(correlation(x[lag:], x[:-lag])) < 5, lag
        # a shared radius or angle would show in the squares and the signs
        if distribution == "gaussian":
            square = (x**2 - 1) / 2**0.5
            assert abs(correlation(square[lag:], square[:-lag])) < 5, lag
            assert abs(correlation(x[lag:].sign(), x[:-lag].sign())) < 5, lag


def test_box_muller_pairs_are_independent():
    rows = z("gaussian", seed=9).view(-1, 4, 16).unbind(1)
    for x, y in itertools.combinations((row.flatten() for row in rows), 2):
        quadrant = torch.bincount(
            (x > 0).long() * 4 + (y > 0).long() * 2 + (x.abs() > y.abs()).long(), minlength=8
        )
        expected = x.numel() / 8
        assert (quadrant - expected).abs().max() < 5 * expected**0.5
        for f, g in ((x, y), ((x**2 - 1) / 2**0.5, (y**2 - 1) / 2**0.5), (x, (y**2 - 1) / 2**0.5)):
            assert abs(correlation(f, g)) < 5


def test_rounding_bits_are_fair_and_uncorrelated():
    ones = torch.ones(NUMEL, dtype=torch.bfloat16)
    up = combine_(
        torch.empty_like(ones),
        weight=ones,
        scale=1 + 2**-8,
        parameter=0,
        offset=0,
        rounding_seed=12,
    )
    sign = (up > 1).float() * 2 - 1  # half an ulp above 1: up or down with equal chance
    assert abs(sign.sum().item()) < 5 * NUMEL**0.5
    for lag in (1, 16, 32, 64, 128):
        assert abs(correlation(sign[lag:], sign[:-lag])) < 5, lag


def test_stochastic_rounding_is_unbiased():
    weight = (torch.linspace(-3, 3, 4001) * 0.01).bfloat16()
    arguments = {"scale": 1.0017, "seeds": [1], "coefficients": [1e-5], "parameter": 0, "offset": 0}
    exact = combine_(torch.empty(4001), weight=weight.float(), **arguments).double()
    num_seeds = 1500
    rounded = torch.stack(
        [
            combine_(torch.empty_like(weight), weight=weight, rounding_seed=s, **arguments)
            for s in range(num_seeds)
        ]
    ).double()
    ulp = 2.0 ** (exact.abs().log2().floor() - 7)
    assert ((rounded - exact).abs() < ulp).all()  # always one of the two neighbours
    error = (rounded - exact) / ulp
    # A rounding has a standard deviation of at most ulp / 2. Of 4001 elements one may well pass
    # four standard errors, none six.
    assert error.mean(0).abs().max() < 6 * 0.5 / num_seeds**0.5
    assert abs(error.mean().item()) < 5 * 0.5 / error.numel() ** 0.5


def test_many_small_updates_arrive_in_bfloat16_by_stochastic_rounding_only():
    """500 updates of 1e-6 on weights of size 0.02, whose neighbours are 1e-4 apart.

    The noise of all roundings moves the projection by 0.002 (one standard deviation).
    """
    before = (torch.randn(2**16, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    intent = 500 * 1e-6 * z("rademacher", seed=2, numel=2**16)
    arrived = {}
    for stochastic in (True, False):
        weight = before.clone()
        for step in range(500):
            combine_(weight, weight=weight, seeds=[2], coefficients=[1e-6],
                     distribution="rademacher", parameter=0, offset=0,
                     rounding_seed=step if stochastic else None)  # fmt: skip
        arrived[stochastic] = (
            torch.dot(weight.float() - before.float(), intent) / intent.square().sum()
        ).item()
    assert 0.99 < arrived[True] < 1.01
    assert arrived[False] < 0.1
