"""Directions and their application to tensors. Only this package converts terms to numbers.

A term is (seed, coefficient). `reference.py` defines the elements z of a direction. `cpu.cpp`
computes the same bits for CPU tensors, if a C++ compiler is available, and `gpu.py` for GPU
tensors, if Triton is available. Called by `zods.core.directions`; fingerprints also by others.
`grouped_products.py` is of the forwards.
"""

import ctypes
import functools
import importlib
import itertools
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from zods.kernels import reference
from zods.kernels.build import cpu_module
from zods.kernels.checks import (
    DISTRIBUTIONS,
    DTYPES,
    check_contiguous,
    check_factors,
    check_offset,
    check_tensors,
    check_terms,
)

__all__ = [
    "DISTRIBUTIONS",
    "DTYPES",
    "Sweep",
    "backend",
    "combine_",
    "direction",
    "directions",
    "fingerprint",
    "replay_",
    "summed_excess",
]

# Minimum number of elements per thread: some 50 us of work, ten times the cost of waking a thread.
_ELEMENTS_PER_THREAD = 2**16


class Sweep(NamedTuple):
    """One update of a tensor in `replay_`; the fields are arguments of `combine_`."""

    scale: float
    seeds: Sequence[int]
    coefficients: Sequence[float]
    dense_coefficient: float = 0.0
    rounding_seed: int | None = None


@torch.no_grad()
def combine_(
    out: Tensor,
    *,
    weight: Tensor | None = None,
    scale: float = 1.0,
    seeds: Sequence[int] = (),
    coefficients: Sequence[float] = (),
    distribution: str = "gaussian",
    parameter: int,
    offset: int,
    factors: tuple[Tensor, Tensor] | None = None,
    dense: Tensor | None = None,
    dense_coefficient: float = 0.0,
    rounding_seed: int | None = None,
    mirror: Tensor | None = None,
) -> Tensor:
    """Write a weighted sum of tensors and directions into `out`, in one pass over memory.

        out[i] = scale * weight[i] + dense_coefficient * dense[i]
                 + (left @ right)[row(i), column(i)]
                 + sum_k coefficients[k] * z(seeds[k], parameter, offset + i)

    The sum is float32. It starts from 0 and adds the terms in their order, the products of the
    factors in their order, then `dense`, then `weight`, each with one fused multiply-add. Scalars
    are rounded to float32. The bits are the same in every backend, for any number of threads and
    any split into slices.

    Args:
        out: contiguous, float32 or bfloat16; read as flat. It may be `weight` or `dense` itself,
            but must not overlap them otherwise.
        weight, dense: contiguous, with out's number of elements, dtype and device; None means 0.
        seeds: seeds of the directions, in [0, 2^64).
        coefficients: one number per seed.
        distribution: distribution of the directions, one of DISTRIBUTIONS.
        parameter: the parameter's ordinal, in [0, 2^31).
        offset: index of out's first element in the flat whole parameter, in [0, 2^62).
        factors: float32 (left, right), left (R, Q) and right (Q, columns). The whole parameter is a
            matrix with `columns` columns. left's rows are the R rows of this matrix that contain
            out's elements.
        rounding_seed: for bfloat16 only, ignored for float32. None rounds to nearest even. A seed
            in [0, 2^64) rounds stochastically and without bias, with random bits of each element,
            so that many small updates have an effect.
        mirror: a second output like `out` that overlaps no other tensor: the same sum with the last
            coefficient negated. Both outputs share one read of `weight` and one computation of
            each direction.

    Returns:
        out.

    Raises:
        ValueError: if a tensor or number is not as described.
    """
    tensors = {"weight": weight, "dense": dense, "mirror": mirror}
    check_tensors(
        out,
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        distribution,
        parameter,
        offset,
    )
    check_terms(seeds, coefficients, rounding_seed)
    if mirror is not None and not seeds:
        raise ValueError("mirror: there is no coefficient to negate")
    left, right = factors or (None, None)
    if left is not None and right is not None:
        check_factors(left, right, out, offset)
    module = cpu_module() if out.device.type == "cpu" else None
    if module is not None:
        sweep = Sweep(scale, seeds, coefficients, dense_coefficient, rounding_seed)
        _sweep_cpp(module, out, mirror, weight, dense, [sweep],
                   [None if dense is None else dense_coefficient],
                   distribution, parameter, offset, factors)  # fmt: skip
        return out
    flat = [None if tensor is None else tensor.view(-1) for tensor in (mirror, weight, dense)]
    # ROCm's devices are named "cuda", too.
    backend_module = _gpu_module() if out.device.type == "cuda" else reference
    backend_module.combine_(out.view(-1), flat[0], flat[1], _float32(scale), list(seeds),
                       [_float32(c) for c in coefficients], distribution, parameter, offset,
                       factors, flat[2], _float32(dense_coefficient),
                       None if out.dtype == torch.float32 else rounding_seed)  # fmt: skip
    return out


@torch.no_grad()
def replay_(
    out: Tensor,
    sweeps: Sequence[Sweep],
    *,
    distribution: str,
    parameter: int,
    offset: int,
    factors: tuple[Tensor, Tensor] | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """Apply many sweeps to `out` in place, one after the other, in one pass over memory.

    The result has the same bits as

        for s, sweep in enumerate(sweeps):
            combine_(out, weight=out, scale=sweep.scale, seeds=sweep.seeds,
                     coefficients=sweep.coefficients, factors=(left[s], right[s]),
                     dense=dense if sweep.dense_coefficient != 0 else None,
                     dense_coefficient=sweep.dense_coefficient,
                     rounding_seed=sweep.rounding_seed, ...)

    On the CPU a tile of `out` stays in the cache for all sweeps, so that the time is the time to
    compute the directions. A tile reads the factors of every sweep. They should fit in the cache,
    too, which limits the number of sweeps per call.

    Args:
        out, distribution, parameter, offset: as for `combine_`.
        sweeps: in their order; without sweeps `out` is unchanged.
        factors: float32 (left, right), left (number of sweeps, R, Q) and right (number of sweeps,
            Q, columns): for each sweep the factors of `combine_`.
        dense: one tensor for all sweeps, as for `combine_`.

    Returns:
        out.

    Raises:
        ValueError: if a tensor or number is not as described; `out` is then unchanged.
    """
    check_tensors(out, {} if dense is None else {"dense": dense}, distribution, parameter, offset)
    for sweep in sweeps:
        check_terms(sweep.seeds, sweep.coefficients, sweep.rounding_seed)
    if factors is not None:
        check_factors(*factors, out, offset, [len(sweeps)])
    module = cpu_module() if out.device.type == "cpu" else None
    if module is not None:
        used = [
            None if dense is None or s.dense_coefficient == 0 else s.dense_coefficient
            for s in sweeps
        ]
        _sweep_cpp(
            module, out, None, out, dense, sweeps, used, distribution, parameter, offset, factors
        )
        return out
    for s, sweep in enumerate(sweeps):
        combine_(
            out,
            weight=out,
            scale=sweep.scale,
            seeds=sweep.seeds,
            coefficients=sweep.coefficients,
            distribution=distribution,
            parameter=parameter,
            offset=offset,
            factors=None if factors is None else (factors[0][s], factors[1][s]),
            dense=dense if sweep.dense_coefficient != 0 else None,
            dense_coefficient=sweep.dense_coefficient,
            rounding_seed=sweep.rounding_seed,
        )
    return out


def direction(
    numel: int,
    *,
    seed: int,
    distribution: str,
    parameter: int,
    offset: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """z(seed, parameter, offset + i) for 0 <= i < numel, as float32."""
    return directions(
        numel,
        seeds=[seed],
        distribution=distribution,
        parameter=parameter,
        offset=offset,
        device=device,
    )[0]


def directions(
    numel: int,
    *,
    seeds: Sequence[int],
    distribution: str,
    parameter: int,
    offset: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """z(seeds[k], parameter, offset + i) for 0 <= i < numel and each k, (seeds, numel) float32."""
    out = torch.empty(len(seeds), numel, dtype=torch.float32, device=device)
    check_tensors(out, {}, distribution, parameter, offset)
    check_terms(seeds, [1.0] * len(seeds), None)
    module = cpu_module() if out.device.type == "cpu" else None
    if module is None:
        backend_module = _gpu_module() if out.device.type == "cuda" else reference
        backend_module.directions(out, list(seeds), distribution, parameter, offset)
        return out
    num_threads = max(1, min(torch.get_num_threads(), out.numel() // _ELEMENTS_PER_THREAD))
    module.directions(
        *(out.data_ptr(), list(seeds), distribution == "rademacher", parameter, offset, numel),
        num_threads,
    )
    return out


def summed_excess(nearest: Tensor, matrix: Tensor, rows: Tensor) -> Tensor:
    """sum_i max(0, nearest[i] - matrix[row, i]) for each of `rows`, (number of rows,) int64, exact.

    nearest: (n,) float32. matrix: (number of all rows, n) float32. Both hold integers in [0, 2^24).
    rows: int64.
    """
    module = cpu_module() if matrix.device.type == "cpu" else None
    if module is None or not matrix.is_contiguous():
        # The float64 sum is exact: it is below 2^53.
        return torch.sub(nearest, matrix[rows]).clamp_(min=0).sum(1, dtype=torch.float64).long()
    out = torch.empty(len(rows), dtype=torch.int64)
    num_threads = max(
        1, min(torch.get_num_threads(), len(rows) * matrix.shape[1] // _ELEMENTS_PER_THREAD)
    )
    nearest = nearest.contiguous()
    module.summed_excess(
        matrix.data_ptr(),
        rows.tolist(),
        matrix.shape[1],
        nearest.data_ptr(),
        out.data_ptr(),
        num_threads,
    )
    return out


def fingerprint(tensor: Tensor, offset: int = 0) -> int:
    """A checksum in [0, 2^64) of a slice's bits.

        sum_i mix(bits(tensor[i]) + (offset + i + 1) * 0x9E3779B97F4A7C15) mod 2^64

    mix is SplitMix64's finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators"). The checksums of a parameter's slices add up, modulo 2^64, to the checksum of the
    whole parameter, for any split into slices. mix is one to one: a change of one element always
    changes the checksum, also -0 instead of 0. Several changes cancel with a probability of about
    2^-64. The checksum finds mistakes, not forgeries: it is no cryptographic hash.

    Args:
        tensor: contiguous, on any device, of a dtype of 1, 2, 4 or 8 bytes; read as flat. The
            checksum of an empty tensor is 0.
        offset: index of the tensor's first element in the flat whole parameter, in [0, 2^62).

    Raises:
        ValueError: if the tensor or offset is not as described.
    """
    if tensor.element_size() not in (1, 2, 4, 8):
        raise ValueError(f"a fingerprint is of elements of 1, 2, 4 or 8 bytes, got {tensor.dtype}")
    check_contiguous("tensor", tensor)
    check_offset(offset)
    module = cpu_module() if tensor.device.type == "cpu" else None
    if module is None:
        return reference.fingerprint(tensor.detach().view(-1), offset)
    kernel = getattr(module, f"fingerprint_{tensor.element_size()}")
    num_threads = max(1, min(torch.get_num_threads(), tensor.numel() // _ELEMENTS_PER_THREAD))
    return kernel(tensor.data_ptr(), offset, tensor.numel(), num_threads)


def backend() -> str:
    """The backend of CPU tensors: "cpp", or "reference" if the C++ kernel could not be built."""
    return "reference" if cpu_module() is None else "cpp"


@functools.cache
def _gpu_module() -> ModuleType:
    """The module of the Triton kernel; after one warning the reference, if Triton cannot run."""
    try:
        module = importlib.import_module("zods.kernels.gpu")
        # A launch is needed: Triton's launcher may need a C compiler, which only a launch shows.
        one = torch.empty(1, device="cuda")
        module.combine_(one, None, None, 1.0, [], [], "gaussian", 0, 0, None, None, 0.0, None)
    except Exception as error:  # any error: training can continue with the reference
        warnings.warn(
            f"zods: the Triton kernel cannot be used ({error}). The PyTorch reference serves "
            "instead: the same numbers, many times slower. The package triton (`pip install "
            "triton`) and a C compiler are needed.",
            RuntimeWarning,
            stacklevel=2,
        )
        return reference
    return module


def _sweep_cpp(
    module: ModuleType,
    out: Tensor,
    mirror: Tensor | None,
    weight: Tensor | None,
    dense: Tensor | None,
    sweeps: Sequence[Sweep],
    dense_coefficients: list[float | None],
    distribution: str,
    parameter: int,
    offset: int,
    factors: tuple[Tensor, Tensor] | None,
) -> None:
    """Apply `sweeps` with the C++ kernel. The arguments must have been checked.

    dense_coefficients: one per sweep; None: the sweep does not use `dense`.
    """
    left, right = factors or (None, None)
    addresses = [
        0 if tensor is None else tensor.data_ptr()
        for tensor in (out, mirror, weight, dense, left, right)
    ]
    shape = (0, 0, 1) if left is None or right is None else (*left.shape[-2:], right.shape[-1])
    num_terms = [len(sweep.seeds) for sweep in sweeps]
    rounding_seeds = [
        None if out.dtype == torch.float32 else sweep.rounding_seed for sweep in sweeps
    ]
    # Unit of work: one element of a sweep with one term.
    work = out.numel() * (len(sweeps) + sum(num_terms)) // 2
    num_threads = max(1, min(torch.get_num_threads(), work // _ELEMENTS_PER_THREAD))
    kernel = module.combine_float32 if out.dtype == torch.float32 else module.combine_bfloat16
    kernel(*addresses[:4], [_float32(sweep.scale) for sweep in sweeps], num_terms,
           list(itertools.chain.from_iterable(sweep.seeds for sweep in sweeps)),
           [_float32(coefficient) for sweep in sweeps for coefficient in sweep.coefficients],
           [None if coefficient is None else _float32(coefficient)
            for coefficient in dense_coefficients],
           rounding_seeds, distribution == "rademacher", parameter, offset, *addresses[4:], *shape,
           out.numel(), num_threads)  # fmt: skip


def _float32(value: float) -> float:
    return ctypes.c_float(value).value
