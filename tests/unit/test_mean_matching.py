"""Mean matching, compared with brute force and with the dense reference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import selection as reference
from tests.unit.integer_features import CASES, features_of
from zods.selection.facility_location import MAX_CANDIDATES, quantised
from zods.selection.mean_matching import (
    balanced_start,
    feature_bits,
    mean_matching,
    narrowed,
    swapped,
)


def mixture(seed: int) -> torch.Tensor:
    """128 gradients (128, 2048) of six sources of different size and of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 2048, generator=generator)
    share = torch.rand(6, generator=generator) + 0.2
    source = torch.multinomial(share, 128, True, generator=generator)
    gradients = centres[source] + 0.7 * torch.randn(128, 2048, generator=generator)
    return gradients * (0.3 * torch.randn(128, 1, generator=generator)).exp()


@settings(deadline=None)
@given(CASES, st.data())
def test_the_choice_is_that_of_the_dense_reference(case, data: st.DataObject):
    features = features_of(*case)
    k = data.draw(st.integers(1, len(features)))
    assert balanced_start(features.long(), k) == reference.balanced_start(features.tolist(), k)
    assert mean_matching(features, k) == reference.mean_matching(features.tolist(), k)


@settings(deadline=None)
@given(CASES, st.data())
def test_the_error_is_never_above_that_of_the_start_and_no_single_swap_lowers_it(
    case, data: st.DataObject
):
    features = features_of(*case)
    k = data.draw(st.integers(1, len(features)))
    start = balanced_start(features.long(), k)
    chosen = swapped(features.long(), start)
    error = reference.mean_error(features.tolist(), chosen)
    assert error <= reference.mean_error(features.tolist(), start)
    for old, new in itertools.product(chosen, set(range(len(features))) - set(chosen)):
        others = [j for j in chosen if j != old]
        assert reference.mean_error(features.tolist(), [*others, new]) >= error


@settings(deadline=None)
@given(CASES, st.data())
def test_the_best_swap_of_a_single_choice_finds_the_optimum(case, data: st.DataObject):
    """A swap reaches each other choice of one candidate: the result is that of brute force."""
    features = features_of(*case)
    start = data.draw(st.integers(0, len(features) - 1))
    errors = [reference.mean_error(features.tolist(), [j]) for j in range(len(features))]
    (chosen,) = swapped(features.long(), [start])
    assert chosen == (start if errors[start] == min(errors) else errors.index(min(errors)))


def test_all_or_none_are_chosen_where_the_budget_says_so():
    features = features_of(1, 5, 2, False)
    assert mean_matching(features, 0) == []
    assert mean_matching(features, 5) == mean_matching(features, 9) == [0, 1, 2, 3, 4]
    assert mean_matching(features[:0], 3) == []
    with pytest.raises(ValueError, match="a budget must be 0 or more"):
        mean_matching(features, -1)


def test_the_largest_features_do_not_overflow():
    """Features of one sign, then of the other: the start's running sum is as large as it can be."""
    n, k, m = 2048, 1024, 64
    features = torch.full((n, m), 32767, dtype=torch.int16)
    features[n // 2 :] = -32768
    assert torch.equal(narrowed(features), features.long())
    ids = swapped(narrowed(features), list(range(k)))
    assert len(ids) == k and len([i for i in ids if i < k]) == k // 2  # noqa: PT018


@pytest.mark.parametrize(
    ("n", "m", "bits"),
    [(128, 64, 15), (2048, 64, 15), (8192, 64, 13), (100_000, 64, 9), (MAX_CANDIDATES, 1 << 16, 2)],
)
def test_features_keep_as_many_bits_as_fit_int64(n: int, m: int, bits: int):
    assert feature_bits(n, m) == bits
    # the bound of the docstring, and that it is close
    assert 2 ** (2 * bits + 4) * m * n * n < 2**63
    assert bits == 15 or 2 ** (2 * (bits + 2) + 4) * m * n * n > 2**62


def test_narrowed_features_are_rounded_to_their_bits():
    values = torch.tensor([[32767], [-32767], [40], [-40]], dtype=torch.int16).repeat(4096, 1)
    bits = feature_bits(*values.shape)
    assert bits == 15
    wide = values.expand(-1, 16)
    assert feature_bits(*wide.shape) == 13
    assert narrowed(wide)[:4, 0].tolist() == [8192, -8192, 10, -10]


def test_the_mean_gradient_of_a_mixture_is_nearer_than_that_of_a_random_half():
    """Features are 64 projections of gradients with 2,048 elements. Means over ten mixtures."""

    def error(gradients: torch.Tensor, ids: list[int]) -> float:
        mean = gradients.mean(0)
        return float((gradients[ids].mean(0) - mean).norm() / mean.norm())

    errors = []
    for seed in range(10):
        gradients, generator = mixture(seed), torch.Generator().manual_seed(100 + seed)
        features = gradients @ torch.randn(2048, 64, generator=generator)
        values = quantised(features, float(features.abs().max()))
        half = torch.randperm(128, generator=generator)[:64].tolist()
        start = balanced_start(narrowed(values), 64)
        errors.append([error(gradients, ids) for ids in (half, start, mean_matching(values, 64))])
    half, start, matched = torch.tensor(errors).mean(0).tolist()
    assert matched < start < half
    assert matched < 0.75 * half
