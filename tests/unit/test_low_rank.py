"""Low-rank directions: z = U V^T / sqrt(r) for a matrix, Gaussian for a vector, and what that adds
to a module's output.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zods import kernels
from zods.core.directions import Direction
from zods.forward import low_rank
from zods.forward.matrix_forwards import OutputPerturbations


class Named(NamedTuple):
    shape: tuple[int, ...]
    ordinal: int = 0


def z(direction: Direction, parameter: Named, seed: int) -> Tensor:
    out = torch.empty(parameter.shape)
    return direction.combine_(out, parameter, seeds=[seed], coefficients=[1.0])


def gaussian(numel: int, seed: int, ordinal: int) -> Tensor:
    return kernels.direction(numel, seed=seed, distribution="gaussian", parameter=ordinal, offset=0)


def side(seed: int, which: int) -> int:
    """The seed of U (0) or V (1), written out here again: a trajectory of seeds is replayed by
    later versions.
    """
    message = struct.pack("<QI", seed, which)
    return int.from_bytes(
        hashlib.blake2b(message, digest_size=8, person=b"zods-seed").digest(), "little"
    )


# --- what z is ---


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
@pytest.mark.parametrize(("shape", "rank"), [((7, 5), 1), ((5, 9), 3), ((6, 6), 6)])
def test_z_of_a_matrix_is_the_product_of_two_gaussian_factors_over_the_root_of_the_rank(
    shape, rank, seed
):
    """The tolerance covers the rounding of `rank` products and of the root.

    The products are of numbers below 7, each rounded twice by 2^-24.
    """
    parameter = Named(shape, 3)
    left = gaussian(shape[0] * rank, side(seed, 0), 3).view(-1, rank).double()
    right = gaussian(rank * shape[1], side(seed, 1), 3).view(rank, -1).double()
    made = z(Direction("low_rank", rank), parameter, seed)
    bound = 4 * 2.0**-24 * (left.abs() @ right.abs()) / math.sqrt(rank)
    assert ((made - left @ right / math.sqrt(rank)).abs() <= bound).all()
    assert torch.linalg.matrix_rank(made) == rank


@pytest.mark.parametrize("shape", [(11,), (3, 4, 5), ()])
def test_what_is_no_matrix_gets_the_bits_of_a_gaussian_direction(shape):
    for rank in (1, 4):
        assert torch.equal(
            z(Direction("low_rank", rank), Named(shape, 2), 9), z(Direction(), Named(shape, 2), 9)
        )


@pytest.mark.parametrize("shape", [(2, 9), (9, 2)])
def test_a_rank_above_the_smaller_side_is_that_side(shape):
    parameter = Named(shape)
    assert torch.equal(
        z(Direction("low_rank", 50), parameter, 4), z(Direction("low_rank", 2), parameter, 4)
    )
    left, right = Direction("low_rank", 50).factors(parameter, [4], [1.0], range(shape[0]), "cpu")
    assert (left.shape, right.shape) == ((shape[0], 2), (2, shape[1]))


@pytest.mark.parametrize("num_seeds", [4000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rank", [1, 2])
def test_second_moments_are_those_of_independent_standard_elements(rank, num_seeds):
    """E[z z^T] = I over the elements of a 2 x 3 matrix.

    Bound. With z_ij = sum_k u_ik v_jk / sqrt(r): Var(z_ij^2) = 2 + 6/r, and for two elements E[(z_a
    z_b)^2] is at most 1 + 2/r (of one row or column), so a mean over n seeds has a standard error
    below sqrt((2 + 6/r) / n). Of 21 moments none passes five, for a fixed set of seeds: they pass
    always or never.
    """
    direction, parameter = Direction("low_rank", rank), Named((2, 3))
    samples = torch.stack(
        [z(direction, parameter, seed).flatten() for seed in range(num_seeds)]
    ).double()
    moments = samples.T @ samples / num_seeds
    bound = 5 * math.sqrt((2 + 6 / rank) / num_seeds)
    assert (moments - torch.eye(6)).abs().max() < bound < 0.25
    assert samples.mean(0).abs().max() < 5 / num_seeds**0.5


def test_directions_of_other_seeds_parameters_and_sides_are_uncorrelated():
    """A rank-1 z is u v^T, so the cosine of two is that of their u times that of their v. Each of
    2,000 elements: a cosine of independent ones has a standard error of 1 / sqrt(2000); five of
    these."""
    direction = Direction("low_rank", 1)
    names = [(1, 0), (2, 0), (1, 1), (2**32 + 1, 0), (2**63 + 1, 5)]
    vectors = {}
    for seed, ordinal in names:
        left, right = direction.factors(
            Named((2000, 2000), ordinal), [seed], [1.0], range(2000), "cpu"
        )
        vectors |= {(seed, ordinal, "u"): left[:, 0], (seed, ordinal, "v"): right[0]}
    for (a, x), (b, y) in itertools.combinations(vectors.items(), 2):
        assert torch.cosine_similarity(x, y, dim=0).abs() < 5 / 2000**0.5, (a, b)


# --- slices ---

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (3, 130), (23,), (2, 3, 4)])
def test_slices_of_any_cut_are_the_whole_to_the_bit(shape, dtype):
    """With a weight, a scale, several terms, a dense part and stochastic rounding, as updates have
    them.
    """
    direction, parameter, numel = Direction("low_rank", 2), Named(shape, 1), math.prod(shape)
    weight, dense = torch.randn(2, numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    terms = {"scale": 0.9, "seeds": [3, 4, 5], "coefficients": [0.1, -0.2, 0.3]}
    others = {"dense_coefficient": 0.5, "rounding_seed": 8}
    whole = direction.combine_(
        torch.empty_like(weight), parameter, weight=weight, dense=dense, **terms, **others
    )
    for begin, end in (
        itertools.combinations(range(numel + 1), 2)
        if numel < 40
        else [(0, 1), (129, 131), (7, 390)]
    ):
        cut = slice(begin, end)
        part = torch.empty(end - begin, dtype=dtype)
        direction.combine_(
            part, parameter, begin, weight=weight[cut], dense=dense[cut], **terms, **others
        )
        assert torch.equal(part, whole[cut]), (begin, end)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 13])
def test_a_mirror_is_the_same_with_the_last_coefficient_negated(offset, dtype):
    direction, parameter = Direction("low_rank", 2), Named((6, 5))
    weight = torch.randn(17, generator=torch.Generator().manual_seed(0)).to(dtype)
    arguments = {"weight": weight, "scale": 0.9, "seeds": [1, 2]}
    both = [torch.empty_like(weight) for _ in range(2)]
    direction.combine_(
        both[0], parameter, offset, coefficients=[0.3, 0.1], mirror=both[1], **arguments
    )
    for got, last in zip(both, (0.1, -0.1), strict=True):
        alone = direction.combine_(
            torch.empty_like(weight), parameter, offset, coefficients=[0.3, last], **arguments
        )
        assert torch.equal(got, alone)


# --- in a module's output ---

MODULES = {
    "linear": lambda: nn.Linear(6, 5),
    "conv1d": lambda: Conv1D(5, 6),
    "embedding": lambda: nn.Embedding(9, 5, padding_idx=2),
}


def inputs(form: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if form == "embedding":
        return torch.randint(0, 9, (4, 3), generator=generator)
    return torch.randn(4, 3, 6, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("form", MODULES)
def test_factors_added_to_an_output_are_the_module_with_the_perturbed_weight(form, rank, mirrored):
    """At 0.9 times the weight with two terms; mirrored: the second half of the batch with the last
    one negated.

    Bound: outputs are sums of at most 6 + 2 r products below 40 in all, rounded by 2^-24 each and
    twice.
    """
    torch.manual_seed(0)
    module, x = MODULES[form](), inputs(form)
    assert low_rank.product_of(module) == form
    direction, parameter = Direction("low_rank", rank), Named(tuple(module.weight.shape), 4)
    rows = range(parameter.shape[0])
    added = OutputPerturbations(
        0.9,
        direction.factors(parameter, [1], [0.3], rows, "cpu"),
        direction.factor_stack(parameter, [2], [0.2], rows, "cpu"),
        biases=None,
        bias_drift=None,
    )
    bias = getattr(module, "bias", None)
    if bias is not None:
        nn.init.normal_(bias)
    output = module(x)
    added.add_each(output, x, form, [len(x)], [mirrored])
    weight = module.weight.clone()
    halves = []
    for half, last in zip(x.chunk(2), (0.2, -0.2 if mirrored else 0.2), strict=True):
        direction.combine_(
            module.weight.data,
            parameter,
            weight=weight,
            scale=0.9,
            seeds=[1, 2],
            coefficients=[0.3, last],
        )
        halves.append(module(half) - (0 if bias is None else 0.1 * bias))
    assert (output - torch.cat(halves)).abs().max() < 2 * (6 + 2 * rank) * 40 * 2.0**-24
    assert (output[:2] - output[2:]).abs().max() > 0.1


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("form", MODULES)
def test_perturbations_of_several_pairs_are_the_same_together_each_and_one_by_one(form, mirrored):
    """Together, the sums are of the same numbers in another order."""
    module, x = MODULES[form](), inputs(form)
    pairs = 2
    x = torch.cat([x, x.flip(0)])
    parameter, direction = Named(tuple(module.weight.shape), 3), Direction("low_rank", 2)
    rows, seeds = range(module.weight.shape[0]), [5, 6]
    generator = torch.Generator().manual_seed(1)
    outputs = module(x).detach()
    width = outputs.shape[-1]
    added = OutputPerturbations(
        0.9,
        direction.factors(parameter, [1, 2], [0.1, -0.2], rows, "cpu"),
        direction.factor_stack(parameter, seeds, [0.3, 0.4], rows, "cpu"),
        torch.randn(pairs, width, generator=generator),
        torch.randn(width, generator=generator),
    )
    together, each, one_by_one = (outputs.clone() for _ in range(3))
    product = low_rank.product_of(module)
    added.add_together(together, x, product, pairs, mirrored)
    added.add_each(each, x, product, [len(x) // pairs] * pairs, [mirrored] * pairs)
    for k, (out, part) in enumerate(zip(one_by_one.chunk(pairs), x.chunk(pairs), strict=True)):
        of_pair = replace(
            added,
            factors=tuple(of_side[k : k + 1] for of_side in added.factors),
            biases=added.biases[k : k + 1],
        )
        of_pair.add_each(out, part, product, [len(part)], [mirrored])
    assert not torch.allclose(outputs, together)
    torch.testing.assert_close(together, each, rtol=1e-5, atol=1e-5)
    if form == "embedding":  # the others' drift is a product of all rows at once
        assert one_by_one.equal(each)
    torch.testing.assert_close(one_by_one, each, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", MODULES)
def test_pairs_of_different_sizes_with_and_without_a_mirror_are_added_as_each_alone(form):
    module, x = MODULES[form](), inputs(form)[:, :1]
    x = torch.cat([x, x[:1]])  # one row of a stream, and two of each stream of a pair
    rows_of_pairs, mirrored = [1, 4], [False, True]
    parameter, direction = Named(tuple(module.weight.shape), 3), Direction("low_rank", 2)
    factors = direction.factor_stack(
        parameter, [5, 6], [0.3, 0.4], range(parameter.shape[0]), "cpu"
    )
    added = OutputPerturbations(1.0, None, factors, None, None)
    output = module(x).detach()
    begin, expected = 0, []
    for k, (number, two) in enumerate(zip(rows_of_pairs, mirrored, strict=True)):
        part = slice(begin, begin + number)
        of_pair = replace(added, factors=tuple(of_side[k : k + 1] for of_side in factors))
        expected.append(output[part].clone())
        of_pair.add_each(expected[-1], x[part], form, [number], [two])
        begin += number
    added.add_each(output, x, form, rows_of_pairs, mirrored)
    assert output.equal(torch.cat(expected))


def test_a_subclass_with_another_forward_has_no_product():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Another(nn.Linear):
        """Only its name differs."""

    assert low_rank.product_of(Scaled(2, 2)) is None
    assert low_rank.product_of(Another(2, 2)) == "linear"
    assert low_rank.product_of(nn.Embedding(3, 2, max_norm=1.0)) is None, (
        "its forward changes the weight"
    )
    assert low_rank.product_of(nn.LayerNorm(2)) is None
