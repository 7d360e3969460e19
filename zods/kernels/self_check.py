"""Compare the kernels in use with their definition, to the bit. Caller: `zods.doctor`."""

import itertools

import torch

from zods.kernels import DISTRIBUTIONS, DTYPES, combine_, reference

NUMEL, OFFSET = 5003, 2**33 + 13  # no multiple of a group, and a counter of more than 32 bits
SEEDS, COEFFICIENTS = [1, 2**64 - 99], [0.5, -2.0]


def first_difference(device: torch.device | str) -> str | None:
    """Where `combine_` on a device first differs from reference.py on the CPU; None: nowhere.

    It compares one slice for each distribution and dtype, in 16 bits with stochastic rounding.
    """
    generator = torch.Generator().manual_seed(0)
    for distribution, dtype in itertools.product(DISTRIBUTIONS, DTYPES):
        weight = torch.randn(NUMEL, generator=generator).to(dtype)
        expected = torch.empty_like(weight)
        rounding_seed = 7 if dtype == torch.bfloat16 else None
        reference.combine_(
            *(expected, None, weight, 1.0, SEEDS, COEFFICIENTS, distribution, 3, OFFSET),
            *(None, None, 0.0, rounding_seed),
        )
        found = weight.to(device)
        combine_(
            found,
            weight=found,
            seeds=SEEDS,
            coefficients=COEFFICIENTS,
            distribution=distribution,
            parameter=3,
            offset=OFFSET,
            rounding_seed=rounding_seed,
        )
        differs = (found.cpu().view(torch.uint8) != expected.view(torch.uint8)).nonzero()
        if len(differs):
            element = int(differs[0]) // dtype.itemsize
            return f"{distribution}, {dtype}: element {element} of {NUMEL}"
    return None
