"""The choice by similarity to target examples, compared with the dense reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import selection as reference
from tests.unit.integer_features import CASES, features_of
from zods.selection.facility_location import quantised
from zods.selection.target_similarity import most_similar


@settings(deadline=None)
@given(CASES, st.integers(1, 5), st.data())
def test_the_choice_is_that_of_the_dense_reference(case, num_targets: int, data: st.DataObject):
    features = features_of(*case)
    targets = features_of(case[0] + 1, num_targets, *case[2:])
    k = data.draw(st.integers(0, len(features) + 1))
    expected = reference.most_similar(features.tolist(), targets.tolist(), k)
    assert most_similar(features, targets, k) == expected


def test_each_target_has_its_share_of_the_choice():
    """Three directions; the targets are of the second and third, which few candidates have."""
    axes = torch.eye(3).repeat_interleave(torch.tensor([80, 10, 10]), 0)
    noise = 0.2 * torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    lengths = torch.rand(100, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    features = quantised((axes + noise) * lengths, 2.0)
    targets = torch.eye(3)[1:].mul(1000).to(torch.int16)
    chosen = most_similar(features, targets, 10)
    assert len([i for i in chosen if 80 <= i < 90]) == 5
    assert len([i for i in chosen if i >= 90]) == 5


def test_the_choice_does_not_depend_on_the_lengths_of_the_targets():
    features, targets = features_of(1, 30, 4, False), features_of(2, 3, 4, False)
    shorter = targets // 5 * torch.tensor([[1], [2], [5]], dtype=torch.int16)
    assert most_similar(features, targets // 5, 9) == most_similar(features, shorter, 9)


def test_the_largest_features_do_not_overflow():
    largest = torch.full((3, 4096), -32768, dtype=torch.int16)
    largest[1] = 32767
    assert most_similar(largest, largest[:1], 1) == [0]
    assert most_similar(largest, largest[1:2], 1) == [1]
    with pytest.raises(ValueError, match="a budget must be 0 or more"):
        most_similar(largest, largest, -1)
