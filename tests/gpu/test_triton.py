"""The Triton kernel computes what reference.py defines, to the bit.

Where there is no GPU, Triton's interpreter runs it.
"""

import importlib.util
import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.helpers import bits, normal
from zods import kernels
from zods.kernels import DISTRIBUTIONS, reference

# to be set before triton is imported: in its own process
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TERMS = {"seeds": [1, 2**64 - 1, 0xDEADBEEF12345678], "coefficients": [1e-3, -0.7, 2.0]}
# Element 2^34 is where a Gaussian block passes 2^32.
OFFSETS = [13, 2**34 - 500] if INTERPRETED else [0, 13, 2**32 - 500, 2**34 - 500, 2**45 + 2047]
NUMELS = [1, 65, 5003] if INTERPRETED else [0, 1, 63, 64, 65, 1000, 5003]
ROUNDINGS = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 2**64 - 99)]


@pytest.fixture
def gpu():
    if not INTERPRETED and DEVICE == "cpu":
        pytest.skip("no CUDA device, and TRITON_INTERPRET is not 1")
    pytest.importorskip("triton")
    from zods.kernels import gpu

    return gpu


def check(gpu, numel, dtype, *, weight=None, scale=1.0, seeds=(), coefficients=(),
          distribution="gaussian", parameter=3, offset=0, factors=None, dense=None,
          dense_coefficient=0.0, rounding_seed=None, mirror=False, in_place=False,
          same=lambda a, b: torch.equal(bits(a), bits(b))):  # fmt: skip
    """gpu.combine_ and, on the CPU, reference.combine_ write the same to `out` and the mirror."""
    scale, dense_coefficient, *coefficients = torch.tensor(
        [scale, dense_coefficient, *coefficients]
    ).tolist()
    written = []
    for combine, device in ((gpu.combine_, DEVICE), (reference.combine_, "cpu")):
        w, d, left, right = (t if t is None else t.to(device, copy=True)
                             for t in (weight, dense, *(factors or (None, None))))  # fmt: skip
        # no 16-byte boundary
        out = w if in_place else torch.empty(numel + 1, dtype=dtype, device=device)[1:]
        mirrored = torch.empty(numel, dtype=dtype, device=device) if mirror else None
        combine(out, mirrored, w, scale, list(seeds), coefficients, distribution, parameter, offset,
                None if left is None else (left, right), d, dense_coefficient,
                rounding_seed)  # fmt: skip
        written.append([t.cpu() for t in (out, mirrored) if t is not None])
    assert all(same(*pair) for pair in zip(*written, strict=True))


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the tests below run in this process")
def test_the_kernel_in_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip(
            "neither a CUDA device nor the package triton, whose interpreter could run the kernel"
        )
    from triton._C.libtriton import interpreter

    if not hasattr(interpreter, "fma_fp32"):
        pytest.skip(
            "this triton's interpreter rounds a fused multiply-add twice: no CUDA device, no "
            "newer triton"
        )
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert tests.returncode == 0, tests.stdout + tests.stderr


@pytest.mark.parametrize("numel", NUMELS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_triton_and_reference_give_the_same_bits(gpu, distribution, numel):
    for offset, (dtype, rounding_seed) in itertools.product(OFFSETS, ROUNDINGS):
        weight = {"weight": normal(numel, 1, dtype), "scale": 0.99}
        dense = {"dense": normal(numel, 2, dtype), "dense_coefficient": -0.1}
        for arguments in (
            {**weight, **dense, **TERMS},
            {**weight, **TERMS, "in_place": True, "mirror": True},
            {**weight, "seeds": [3], "coefficients": [1e-3]},
            dense,
            TERMS,
            {},
        ):
            place = {"parameter": 2**31 - 1, "offset": offset, "rounding_seed": rounding_seed}
            check(gpu, numel, dtype, distribution=distribution, **arguments, **place)


@pytest.mark.parametrize("numel", NUMELS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_triton_and_reference_make_the_same_directions_of_many_seeds(gpu, distribution, numel):
    for offset in OFFSETS:
        found, expected = (torch.empty(3, numel, device=device) for device in (DEVICE, "cpu"))
        place = (TERMS["seeds"], distribution, 2**31 - 1, offset)
        gpu.directions(found, *place)
        reference.directions(expected, *place)
        assert torch.equal(bits(found.cpu()), bits(expected))


@pytest.mark.parametrize(
    ("numel", "columns"), [(0, 7), (5, 7), (1000, 7), (5003, 1), (5003, 3000), (5003, 6000)]
)
def test_triton_and_reference_add_the_same_low_rank_matrix(gpu, numel, columns):
    for offset, (dtype, rounding_seed), mirror in itertools.product(
        OFFSETS, ROUNDINGS, (False, True)
    ):
        rows = (offset + numel) // columns - offset // columns + 1
        factors = normal(rows * 3, 1).view(rows, 3), normal(3 * columns, 2).view(3, columns)
        check(gpu, numel, dtype, weight=normal(numel, 1, dtype), scale=0.99,
              dense=normal(numel, 2, dtype), dense_coefficient=-0.1, seeds=[4], coefficients=[0.5],
              factors=factors, offset=offset, rounding_seed=rounding_seed,
              mirror=mirror)  # fmt: skip


def test_triton_and_reference_agree_over_many_gaussians(gpu):
    check(
        gpu,
        50_000 if INTERPRETED else 5_000_000,
        torch.float32,
        seeds=[11],
        coefficients=[1.0],
        offset=5,
    )


@pytest.mark.parametrize("rounding_seed", [None, 1])
def test_values_bfloat16_cannot_hold_and_subnormals_are_as_in_the_reference(gpu, rounding_seed):
    largest = torch.finfo(torch.bfloat16).max
    values = torch.tensor(
        [float("inf"), -float("inf"), float("nan"), largest, -largest, 0.0, -0.0, 1e-39, -3e-40]
        * 50
    )
    for scale in (1.0, -1.0, 1 + 2**-10, 1 + 2**-8, 0.3):
        check(
            gpu,
            450,
            torch.bfloat16,
            weight=values.bfloat16(),
            scale=scale,
            rounding_seed=rounding_seed,
        )
        # a NaN of float32 may have any payload
        check(gpu, 450, torch.float32, weight=values, scale=scale,
              same=lambda a, b: torch.equal(
                  bits(a.nan_to_num(1.5)), bits(b.nan_to_num(1.5))))  # fmt: skip
    # any payload, any sign
    nans = torch.tensor([0x7FFF, -1, 0x7F81] * 300, dtype=torch.int16).view(torch.bfloat16)
    check(gpu, 900, torch.bfloat16, weight=nans, rounding_seed=rounding_seed)


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_gpu_tensors_are_served_by_triton(gpu):
    assert kernels._gpu_module() is gpu
    made = [kernels.direction(9001, seed=5, distribution="gaussian", parameter=1, offset=7,
                              device=device)
            for device in ("cpu", DEVICE)]  # fmt: skip
    assert torch.equal(bits(made[0]), bits(made[1].cpu()))


def test_without_triton_the_reference_serves_with_one_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "zods.kernels.gpu", None)
    kernels._gpu_module.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [kernels._gpu_module() for _ in range(2)] == [reference] * 2
    kernels._gpu_module.cache_clear()
    assert len(caught) == 1
    assert "the Triton kernel cannot be used" in str(caught[0].message)
