"""Directions and their application to tensors: the one place where terms (seed, coefficient) become
numbers.

`reference.py` defines z; `cpu.cpp` is the same to the bit on CPU tensors, where a compiler is at
hand, and `gpu.py` on GPU tensors, where Triton is.
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

DISTRIBUTIONS = ("gaussian", "rademacher")
DTYPES = (torch.float32, torch.bfloat16)

__all__ = [
    "DISTRIBUTIONS",
    "DTYPES",
    "Sweep",
    "backend",
    "combine_",
    "direction",
    "fingerprint",
    "replay_",
    "summed_excess",
]

_ELEMENTS_PER_THREAD = 2**16  # at least: some 50 us of work, ten times what waking a thread costs


class Sweep(NamedTuple):
    """One update of a tensor, in `replay_`; the fields are `combine_`'s arguments of the same
    names.
    """

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
    """Write a weighted sum of a tensor, directions, low-rank and dense tensors into `out`, in one
    sweep over memory.

        out[i] = scale * weight[i] + dense_coefficient * dense[i] + (left @ right)[row(i), column(i)]
                 + sum_k coefficients[k] * z(seeds[k], parameter, offset + i)

    The sum is float32: the terms in their order, the products of the factors in theirs, then
    `dense`, then `weight`, each by one fused multiply-add, from 0. Scalars are taken to float32.
    The bits are the same in every backend, for any thread count and any cut into slices.

    Args:
        out: contiguous, float32 or bfloat16; read as flat. It may be `weight` or `dense` itself, but not overlap them
            otherwise.
        weight, dense: contiguous, with out's number of elements, dtype and device; None means 0.
        seeds: of the directions, in [0, 2^64); `coefficients` has one number for each.
        distribution: of the directions, one of DISTRIBUTIONS.
        parameter: the parameter's ordinal, in [0, 2^31).
        offset: index of out's first element in the flat whole parameter.
        factors: float32 (left, right), left (R, Q) and right (Q, columns), where the whole parameter is a matrix of
            `columns` columns; left's rows are those of the matrix that out's elements lie in.
        rounding_seed: for bfloat16, None rounds to nearest even; a seed in [0, 2^64) rounds stochastically and without
            bias, by the element's own random bits, so that many small updates arrive. Ignored for float32.
        mirror: a second output like `out`, overlapping nothing: the same with the last coefficient negated. Both take
            one read of `weight` and one making of each direction.

    Returns:
        out.

    Raises:
        ValueError: if a tensor or number is not as described.
    """
    tensors = {"weight": weight, "dense": dense, "mirror": mirror}
    _check(
        out,
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        distribution,
        parameter,
        offset,
    )
    _check_terms(seeds, coefficients, rounding_seed)
    if mirror is not None and not seeds:
        raise ValueError("mirror: there is no coefficient to negate")
    left, right = factors or (None, None)
    if left is not None and right is not None:
        _check_factors(left, right, out, offset)
    module = cpu_module() if out.device.type == "cpu" else None
    if module is not None:
        sweep = Sweep(scale, seeds, coefficients, dense_coefficient, rounding_seed)
        _sweep_cpp(module, out, mirror, weight, dense, [sweep], [None if dense is None else dense_coefficient],
                   distribution, parameter, offset, factors)  # fmt: skip
        return out
    flat = [None if tensor is None else tensor.view(-1) for tensor in (mirror, weight, dense)]
    # ROCm's devices are named "cuda" too
    served_by = _gpu_module() if out.device.type == "cuda" else reference
    served_by.combine_(out.view(-1), flat[0], flat[1], _float32(scale), list(seeds), [_float32(c) for c in coefficients],
                       distribution, parameter, offset, factors, flat[2], _float32(dense_coefficient),
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
    """Update `out` by many sweeps, one after the other, in one pass over memory: the same bits as
    of

        for s, sweep in enumerate(sweeps):
            combine_(out, weight=out, scale=sweep.scale, seeds=sweep.seeds, coefficients=sweep.coefficients,
                     factors=(left[s], right[s]), dense=dense if sweep.dense_coefficient != 0 else None,
                     dense_coefficient=sweep.dense_coefficient, rounding_seed=sweep.rounding_seed, ...)

    On the CPU a tile of `out` stays in the cache for all sweeps, so that making the directions is
    what it costs. Of the factors a tile reads every sweep's: they should fit the cache too, so pass
    no more sweeps than that at once.

    Args:
        out: as for `combine_`, and so are distribution, parameter and offset.
        sweeps: in their order; none leaves `out` as it is.
        factors: float32 (left, right), left (number of sweeps, R, Q) and right (number of sweeps, Q, columns): for each
            sweep what `combine_` takes.
        dense: one tensor for all sweeps, as for `combine_`.

    Returns:
        out.

    Raises:
        ValueError: if a tensor or number is not as described; `out` is untouched then.
    """
    _check(out, {} if dense is None else {"dense": dense}, distribution, parameter, offset)
    for sweep in sweeps:
        _check_terms(sweep.seeds, sweep.coefficients, sweep.rounding_seed)
    if factors is not None:
        _check_factors(*factors, out, offset, [len(sweeps)])
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
    out = torch.empty(numel, dtype=torch.float32, device=device)
    return combine_(
        out,
        seeds=[seed],
        coefficients=[1.0],
        distribution=distribution,
        parameter=parameter,
        offset=offset,
    )


def summed_excess(nearest: Tensor, matrix: Tensor, rows: Tensor) -> Tensor:
    """sum_i max(0, nearest[i] - matrix[row, i]) for each of `rows`, (number of rows,) int64, exact.

    nearest: (n,), matrix: (., n), both float32 and holding integers from 0 to below 2^24. rows:
    int64.
    """
    module = cpu_module() if matrix.device.type == "cpu" else None
    if module is None or not matrix.is_contiguous():
        # exact: below 2^53
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
    """A checksum in [0, 2^64) of a slice's bits that does not depend on where a parameter was cut
    into slices:

        sum_i mix(bits(tensor[i]) + (offset + i + 1) * 0x9E3779B97F4A7C15) mod 2^64, with SplitMix64's finaliser as mix

    (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"). The slices' sums
    add up, modulo 2^64, to that of the whole. mix is one to one: a change of one element always
    shows, -0 for 0 as well; several changes cancel by a chance of some 2^-64. It finds mistakes,
    not forgeries: it is no cryptographic hash.

    Args:
        tensor: contiguous, on any device, of a dtype of 1, 2, 4 or 8 bytes; read as flat. An empty one's sum is 0.
        offset: index of the tensor's first element in the flat whole parameter, in [0, 2^62).

    Raises:
        ValueError: if the tensor or offset is not as described.
    """
    if tensor.element_size() not in (1, 2, 4, 8):
        raise ValueError(f"a fingerprint is of elements of 1, 2, 4 or 8 bytes, got {tensor.dtype}")
    _check_contiguous("tensor", tensor)
    _check_offset(offset)
    module = cpu_module() if tensor.device.type == "cpu" else None
    if module is None:
        return reference.fingerprint(tensor.detach().view(-1), offset)
    kernel = getattr(module, f"fingerprint_{tensor.element_size()}")
    num_threads = max(1, min(torch.get_num_threads(), tensor.numel() // _ELEMENTS_PER_THREAD))
    return kernel(tensor.data_ptr(), offset, tensor.numel(), num_threads)


def backend() -> str:
    """Return the name of the backend for CPU tensors: "cpp", or "reference" if the C++ kernel could
    not be built.
    """
    return "reference" if cpu_module() is None else "cpp"


@functools.cache
def _gpu_module() -> ModuleType:
    """The Triton kernel, or the reference, after one warning that says why, where Triton cannot run
    it.
    """
    try:
        module = importlib.import_module("zods.kernels.gpu")
        # Triton's launcher may need a C compiler, and that shows only here
        one = torch.empty(1, device="cuda")
        module.combine_(one, None, None, 1.0, [], [], "gaussian", 0, 0, None, None, 0.0, None)
    except Exception as error:  # whatever it is, training can go on without
        warnings.warn(
            f"zods: the Triton kernel cannot be used ({error}). The PyTorch reference serves "
            f"instead: the same numbers, "
            "many times slower. The package triton (`pip install triton`) and a C compiler are "
            "needed.",
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
    """`sweeps` by the C++ kernel, all arguments checked; `dense` takes part where there is a
    coefficient for it.
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
    # a sweep of one term is one element's work
    work = out.numel() * (len(sweeps) + sum(num_terms)) // 2
    num_threads = max(1, min(torch.get_num_threads(), work // _ELEMENTS_PER_THREAD))
    kernel = module.combine_float32 if out.dtype == torch.float32 else module.combine_bfloat16
    kernel(*addresses[:4], [_float32(sweep.scale) for sweep in sweeps], num_terms,
           list(itertools.chain.from_iterable(sweep.seeds for sweep in sweeps)),
           [_float32(coefficient) for sweep in sweeps for coefficient in sweep.coefficients],
           [None if coefficient is None else _float32(coefficient) for coefficient in dense_coefficients],
           rounding_seeds, distribution == "rademacher", parameter, offset, *addresses[4:], *shape,
           out.numel(), num_threads)  # fmt: skip


def _check(
    out: Tensor, others: dict[str, Tensor], distribution: str, parameter: int, offset: int
) -> None:
    if out.dtype not in DTYPES:
        raise ValueError(f"out must be float32 or bfloat16, got {out.dtype}")
    for name, tensor in {"out": out, **others}.items():
        _check_contiguous(name, tensor)
        if (tensor.numel(), tensor.dtype, tensor.device) != (out.numel(), out.dtype, out.device):
            raise ValueError(
                f"{name} must be like out ({out.numel()} elements, {out.dtype}, {out.device}), "
                f"got {tensor.numel()} elements, {tensor.dtype}, {tensor.device}"
            )
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
    if not 0 <= parameter < 2**31:
        raise ValueError(f"parameter must be in [0, 2^31), got {parameter}")
    _check_offset(offset)


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}"
        )


def _check_offset(offset: int) -> None:
    if not 0 <= offset < 2**62:
        raise ValueError(f"offset must be in [0, 2^62), got {offset}")


def _check_terms(
    seeds: Sequence[int], coefficients: Sequence[float], rounding_seed: int | None
) -> None:
    if len(seeds) != len(coefficients):
        raise ValueError(
            f"one coefficient per seed is needed, got {len(seeds)} seeds and {len(coefficients)} "
            f"coefficients"
        )
    for seed in [*seeds, *([] if rounding_seed is None else [rounding_seed])]:
        if not 0 <= seed < 2**64:
            raise ValueError(f"a seed must be in [0, 2^64), got {seed}")


def _check_factors(
    left: Tensor, right: Tensor, out: Tensor, offset: int, stacked: Sequence[int] = ()
) -> None:
    """`stacked`: the shape in front of the matrices': none, or the number of sweeps."""
    for name, tensor in (("left", left), ("right", right)):
        if (
            tensor.dtype != torch.float32
            or tensor.ndim != len(stacked) + 2
            or not tensor.is_contiguous()
        ):
            what = "stack of float32 matrices" if stacked else "float32 matrix"
            raise ValueError(
                f"{name} must be a contiguous {what}, got {tuple(tensor.shape)}, {tensor.dtype}"
            )
        if tensor.device != out.device:
            raise ValueError(f"{name} must be on {out.device}, got {tensor.device}")
    columns = max(right.shape[-1], 1)
    rows = (offset + out.numel() - 1) // columns - offset // columns + 1 if out.numel() else 0
    stacks = [list(tensor.shape[:-2]) for tensor in (left, right)]
    if stacks != [list(stacked)] * 2 or left.shape[-1] != right.shape[-2] or left.shape[-2] < rows:
        of = "".join(f"{size}, " for size in stacked)
        raise ValueError(
            f"factors must be ({of}{rows}, Q) and ({of}Q, columns), got {tuple(left.shape)} and "
            f"{tuple(right.shape)}"
        )


def _float32(value: float) -> float:
    return ctypes.c_float(value).value
