"""Seeds of directions: unrelated where they must differ, and fixed where they must agree."""

import itertools
import subprocess
import sys

import pytest
import torch

from zods.core.directions import PURPOSES, derive_seed
from zods.kernels import direction


def test_seeds_differ_between_base_seeds_purposes_steps_and_indices():
    keys = itertools.product((0, 1, 42, 2**63 - 1), PURPOSES, (*range(40), 10**6), range(8))
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)


def test_swapping_step_and_index_gives_another_seed():
    assert derive_seed(0, "step", 1, 2) != derive_seed(0, "step", 2, 1)


def test_seeds_fit_in_64_bits_and_use_all_of_them():
    seeds = [derive_seed(7, "step", step) for step in range(2000)]
    assert all(0 <= seed < 2**64 for seed in seeds)
    for bit in range(64):  # a fair coin lands outside 840..1160 of 2000 once in 10^12
        assert 840 < sum(seed >> bit & 1 for seed in seeds) < 1160


@pytest.mark.parametrize(
    ("key", "seed"),
    [
        ((42, "step", 0, 0), 2864603725240163104),
        ((42, "step_anchor", 0, 0), 291811822654379646),
        ((42, "anchor", 100, 15), 1405124932207265917),
        ((0, "rounding", 7, 0), 16396224544637278037),
        ((2**63 - 1, "anchor_rounding", 2**40, 2**31), 142825469044619836),
    ],
)
def test_seeds_are_those_of_earlier_versions(key, seed):
    """A trajectory of seeds is replayed by later versions: these values may never change."""
    assert derive_seed(*key) == seed


@pytest.mark.launched
def test_seeds_do_not_depend_on_the_process():
    """Nothing of Python's per-process hashing is in them."""
    code = "from zods.core.directions import derive_seed; print(derive_seed(5, 'anchor', 6, 7))"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert int(printed.split()[-1]) == derive_seed(5, "anchor", 6, 7)


def test_an_unknown_purpose_is_an_error():
    with pytest.raises(ValueError, match="tuple"):
        derive_seed(0, "setp", 0)


def test_directions_of_derived_seeds_are_uncorrelated():
    """Neighbouring steps, indices and purposes: |cosine| of two of 20,000 elements is below 6 /
    sqrt(20,000).
    """
    keys = [("step", 0, 0), ("step", 0, 1), ("step", 1, 0), ("step_anchor", 0, 0), ("anchor", 0, 0)]
    z = torch.stack([
        direction(20_000, seed=derive_seed(1, *key), distribution="gaussian", parameter=0, offset=0)
        for key in keys
    ])  # fmt: skip
    cosines = torch.corrcoef(z) - torch.eye(len(keys))
    assert cosines.abs().max() < 6 / 20_000**0.5
