"""Greedy choice by facility location, compared with brute force."""

import math

import pytest
import torch

from tests.reference import selection as reference
from zods.kernels import summed_excess
from zods.selection import facility_location as fl
from zods.selection.baselines import greedi, stochastic_greedy


def random_features(seed: int, n: int, m: int) -> torch.Tensor:
    """Clustered features.

    An odd seed puts them on a coarse grid, which makes many ties. A seed that is a multiple of 3
    adds duplicates.
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, m, generator=generator) + 3 * torch.randint(
        0, 3, (n, 1), generator=generator
    )
    if seed % 2:
        features = features.round()
    if seed % 3 == 0:
        features = features[torch.randint(0, n, (n,), generator=generator)]
    return features


def similarities_of(problem: fl.Problem) -> list[list[int]]:
    """D - d as plain integers, a row for each item."""
    distances = problem.distances(torch.arange(problem.num_candidates))
    return (problem.largest - distances.T).long().tolist()


@pytest.mark.parametrize("metric", fl.METRICS)
@pytest.mark.parametrize(
    "block", [*range(3), *(pytest.param(block, marks=pytest.mark.slow) for block in range(3, 10))]
)
def test_greedy_lazy_and_brute_force_choose_the_same(metric: str, block: int):
    """Instances with ties and duplicates among them: 20 for each block and metric.

    60 for a metric by default, which have all the sizes; 200 with the slow ones.
    """
    for seed in range(20 * block, 20 * block + 20):
        n, m = 2 + seed % 23, 1 + seed % 5
        problem = fl.from_features(random_features(seed, n, m), metric)
        k = 1 + seed % n
        expected = reference.greedy(similarities_of(problem), k)
        assert reference.eager_greedy(problem, k).ids == expected
        assert fl.lazy_greedy(problem, k).ids == expected


@pytest.mark.parametrize("seed", range(6))  # all forms of `random_features`
def test_lazy_chooses_what_greedy_does_where_several_looks_are_needed(seed: int):
    for metric in fl.METRICS:
        problem = fl.from_features(random_features(seed, 700, 3), metric)
        assert fl.lazy_greedy(problem, 150) == reference.eager_greedy(problem, 150)


@pytest.mark.parametrize("seed", range(30))
def test_greedy_stays_above_its_bound(seed: int):
    problem = fl.from_features(random_features(seed, 9, 2))
    similarities = similarities_of(problem)
    for k in (1, 2, 4):
        chosen = fl.lazy_greedy(problem, k)
        expected = reference.objective(similarities, chosen.ids) * problem.unit
        assert math.isclose(chosen.objective, expected)
        best = reference.optimum(similarities, k) * problem.unit
        assert (1 - 1 / math.e) * best <= chosen.objective <= best * (1 + 1e-12)


def test_distances_are_those_of_the_features():
    features = random_features(2, 40, 6)
    expected = {
        "l1": torch.cdist(features, features, p=1),
        "l2": torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist"),
        "cosine": 1
        - torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=2),
    }
    for metric, wanted in expected.items():
        problem = fl.from_features(features, metric)
        found = problem.distances(torch.arange(40)) * problem.unit
        # 6 features, each off by half of largest / 32767; distances floored to 2^-23 of the bound
        tolerance = 6 * float(features.abs().max()) / 32767 + 1e-5
        torch.testing.assert_close(found, wanted.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("m", [255, 256, 4096])
@pytest.mark.parametrize("metric", fl.METRICS)
def test_distances_are_exact_integers_in_any_order_of_the_features(metric: str, m: int):
    """Rounding would show when the terms of a distance are added in another order."""
    features = torch.randn(30, m, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(m, generator=torch.Generator().manual_seed(1))
    everyone = torch.arange(30)
    here, there = fl.from_features(features, metric), fl.from_features(features[:, order], metric)
    assert torch.equal(here.distances(everyone), there.distances(everyone))
    assert torch.equal(here.distances(everyone), here.distances(everyone).round())
    assert float(here.distances(everyone).max()) <= here.largest < 1 << 24


def test_weights_are_the_sizes_of_the_clusters_and_gains_add_up():
    features = random_features(5, 60, 2)
    problem = fl.from_features(features)
    chosen = fl.lazy_greedy(problem, 7)
    nearest = problem.distances(torch.tensor(chosen.ids)).argmin(0)
    assert sum(chosen.weights) == 60
    assert chosen.weights == torch.bincount(nearest, minlength=7).tolist()
    assert chosen.gains == sorted(chosen.gains, reverse=True)
    assert math.isclose(sum(chosen.gains), chosen.objective)


@pytest.mark.parametrize(
    "choose", [reference.eager_greedy, fl.lazy_greedy, lambda p, k: stochastic_greedy(p, k, seed=1)]
)
def test_limit_cases(choose):
    problem = fl.from_features(random_features(4, 8, 2))
    assert choose(problem, 0) == fl.Chosen([], [], 0.0, [])
    assert sorted(choose(problem, 8).ids) == list(range(8))
    assert sorted(choose(problem, 99).ids) == list(range(8))
    alone = choose(fl.from_features(torch.ones(1, 3)), 1)
    assert (alone.ids, alone.weights) == ([0], [1])
    same = choose(fl.from_features(torch.ones(5, 3)), 3)
    assert len(set(same.ids)) == 3
    assert sum(same.weights) == 5
    nothing = choose(fl.from_features(torch.empty(0, 3)), 2)
    assert nothing.ids == []


def test_identical_candidates_go_by_id():
    for choose in (reference.eager_greedy, fl.lazy_greedy):
        assert choose(fl.from_features(torch.ones(40, 3)), 30).ids == list(range(30))
        assert choose(fl.from_features(torch.zeros(40, 1), "cosine"), 30).ids == list(range(30))


def test_stochastic_greedy_is_near_greedy_and_follows_from_its_seed():
    problem = fl.from_features(random_features(7, 400, 4))
    best = reference.eager_greedy(problem, 40).objective
    chosen = [stochastic_greedy(problem, 40, seed=seed) for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0].ids)) == 40
    # in expectation above (1 - 1/e - 0.01); on such data it is close to greedy
    assert chosen[0].objective > 0.97 * best
    # draws all
    assert (
        stochastic_greedy(problem, 40, seed=1, epsilon=1e-30).ids
        == reference.eager_greedy(problem, 40).ids
    )


def test_greedi_of_one_part_is_greedy_and_of_more_is_near():
    problem = fl.from_features(random_features(8, 300, 4))
    best = reference.eager_greedy(problem, 30)
    assert greedi(problem, 30, [range(300)], [30]).ids == best.ids
    parts = [range(0, 100), [], range(100, 300)]
    assert (
        0.9 * best.objective
        < greedi(problem, 30, parts, [30] * 3).objective
        <= best.objective * 1.01
    )


def test_bad_input():
    with pytest.raises(ValueError, match="features of 2 of 4 candidates are not finite"):
        fl.from_features(torch.tensor([[1.0], [math.nan], [2.0], [math.inf]]))
    with pytest.raises(ValueError, match="metric: found 'l3', allowed are l1, l2, cosine"):
        fl.from_features(torch.ones(2, 2), "l3")
    with pytest.raises(ValueError, match=r"features must be \(n, m\)"):
        fl.from_features(torch.ones(2))
    with pytest.raises(ValueError, match="a budget must be 0 or more"):
        fl.lazy_greedy(fl.from_features(torch.ones(2, 2)), -1)
    with pytest.raises(ValueError, match="at most 524,287 candidates"):
        fl.from_features(torch.ones(fl.MAX_CANDIDATES + 1, 1))


@pytest.mark.parametrize("n", [1, 15, 16, 17, 5000])
def test_summed_excess_is_exact(n: int):
    """The largest values and the most items: float32 sums would be off."""
    matrix = torch.full((3, n), 0.0)
    matrix[1] = torch.arange(n) % 2
    matrix[2] = float((1 << 24) - 1)
    nearest = torch.full((n,), float((1 << 24) - 1))
    rows = torch.tensor([2, 1, 0, 1])
    expected = [0, n * ((1 << 24) - 1) - n // 2, n * ((1 << 24) - 1), n * ((1 << 24) - 1) - n // 2]
    assert summed_excess(nearest, matrix, rows).tolist() == expected
    # torch's path
    assert summed_excess(nearest, matrix.T.contiguous().T, rows).tolist() == expected
