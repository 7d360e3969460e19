"""Directions and their application to tensors: the one place where terms (seed, coefficient) become numbers.

`reference.py` defines z; `cpu.cpp` is the same to the bit on CPU tensors, where a compiler is at hand, and `gpu.py` on GPU
tensors, where Triton is.
"""

import ctypes
import functools
import importlib
import warnings
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from zods.kernels import reference
from zods.kernels.build import cpu_module

DISTRIBUTIONS = ("gaussian", "rademacher")
DTYPES = (torch.float32, torch.bfloat16)

__all__ = ["DISTRIBUTIONS", "DTYPES", "backend", "combine_", "direction", "summed_excess"]

_ELEMENTS_PER_THREAD = 2**16  # at least: some 50 us of work, ten times what waking a thread costs


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
    """Write a weighted sum of a tensor, directions, low-rank and dense tensors into `out`, in one sweep over memory.

        out[i] = scale * weight[i] + dense_coefficient * dense[i] + (left @ right)[row(i), column(i)]
                 + sum_k coefficients[k] * z(seeds[k], parameter, offset + i)

    The sum is float32: the terms in their order, the products of the factors in theirs, then `dense`, then `weight`, each
    by one fused multiply-add, from 0. Scalars are taken to float32. The bits are the same in every backend, for any
    thread count and any cut into slices.

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
        out, {name: tensor for name, tensor in tensors.items() if tensor is not None}, distribution, parameter, offset
    )
    if len(seeds) != len(coefficients):
        raise ValueError(
            f"one coefficient per seed is needed, got {len(seeds)} seeds and {len(coefficients)} coefficients"
        )
    for seed in [*seeds, *([] if rounding_seed is None else [rounding_seed])]:
        if not 0 <= seed < 2**64:
            raise ValueError(f"a seed must be in [0, 2^64), got {seed}")
    if mirror is not None and not seeds:
        raise ValueError("mirror: there is no coefficient to negate")
    left, right = factors or (None, None)
    if left is not None and right is not None:
        _check_factors(left, right, out, offset)
    if out.dtype == torch.float32:
        rounding_seed = None

    seeds, coefficients = list(seeds), [_float32(c) for c in coefficients]
    scale, dense_coefficient = _float32(scale), _float32(dense_coefficient)
    module = cpu_module() if out.device.type == "cpu" else None
    if module is None:
        flat = [None if tensor is None else tensor.view(-1) for tensor in (mirror, weight, dense)]
        served_by = _gpu_module() if out.device.type == "cuda" else reference  # ROCm's devices are named "cuda" too
        served_by.combine_(out.view(-1), flat[0], flat[1], scale, seeds, coefficients, distribution, parameter, offset,
                           factors, flat[2], dense_coefficient, rounding_seed)  # fmt: skip
        return out
    kernel = module.combine_float32 if out.dtype == torch.float32 else module.combine_bfloat16
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (out, mirror, weight, left, right, dense)]
    num_factors, num_columns = (0, 1) if right is None else right.shape
    num_threads = max(1, min(torch.get_num_threads(), out.numel() // _ELEMENTS_PER_THREAD))
    kernel(*addresses[:3], scale, seeds, coefficients, distribution == "rademacher", parameter, offset, *addresses[3:5],
           num_factors, num_columns, addresses[5], dense_coefficient, rounding_seed, out.numel(), num_threads)  # fmt: skip
    return out


def direction(
    numel: int, *, seed: int, distribution: str, parameter: int, offset: int, device: torch.device | str = "cpu"
) -> Tensor:
    """z(seed, parameter, offset + i) for 0 <= i < numel, as float32."""
    out = torch.empty(numel, dtype=torch.float32, device=device)
    return combine_(
        out, seeds=[seed], coefficients=[1.0], distribution=distribution, parameter=parameter, offset=offset
    )


def summed_excess(nearest: Tensor, matrix: Tensor, rows: Tensor) -> Tensor:
    """sum_i max(0, nearest[i] - matrix[row, i]) for each of `rows`, (number of rows,) int64, exact.

    nearest: (n,), matrix: (., n), both float32 and holding integers from 0 to below 2^24. rows: int64.
    """
    module = cpu_module() if matrix.device.type == "cpu" else None
    if module is None or not matrix.is_contiguous():
        return torch.sub(nearest, matrix[rows]).clamp_(min=0).sum(1, dtype=torch.float64).long()  # exact: below 2^53
    out = torch.empty(len(rows), dtype=torch.int64)
    num_threads = max(1, min(torch.get_num_threads(), len(rows) * matrix.shape[1] // _ELEMENTS_PER_THREAD))
    nearest = nearest.contiguous()
    module.summed_excess(
        matrix.data_ptr(), rows.tolist(), matrix.shape[1], nearest.data_ptr(), out.data_ptr(), num_threads
    )
    return out


def backend() -> str:
    """What serves CPU tensors, for logs: "cpp", or "reference" where the C++ kernel could not be built."""
    return "reference" if cpu_module() is None else "cpp"


@functools.cache
def _gpu_module() -> ModuleType:
    """The Triton kernel, or the reference, after one warning that says why, where Triton cannot run it."""
    try:
        module = importlib.import_module("zods.kernels.gpu")
        one = torch.empty(1, device="cuda")  # Triton's launcher may need a C compiler, and that shows only here
        module.combine_(one, None, None, 1.0, [], [], "gaussian", 0, 0, None, None, 0.0, None)
    except Exception as error:  # whatever it is, training can go on without
        warnings.warn(
            f"zods: the Triton kernel cannot be used ({error}). The PyTorch reference serves instead: the same numbers, "
            "many times slower. The package triton (`pip install triton`) and a C compiler are needed.",
            RuntimeWarning,
            stacklevel=2,
        )
        return reference
    return module


def _check(out: Tensor, others: dict[str, Tensor], distribution: str, parameter: int, offset: int) -> None:
    if out.dtype not in DTYPES:
        raise ValueError(f"out must be float32 or bfloat16, got {out.dtype}")
    for name, tensor in {"out": out, **others}.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        if (tensor.numel(), tensor.dtype, tensor.device) != (out.numel(), out.dtype, out.device):
            raise ValueError(
                f"{name} must be like out ({out.numel()} elements, {out.dtype}, {out.device}), "
                f"got {tensor.numel()} elements, {tensor.dtype}, {tensor.device}"
            )
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
    if not 0 <= parameter < 2**31:
        raise ValueError(f"parameter must be in [0, 2^31), got {parameter}")
    if not 0 <= offset < 2**62:
        raise ValueError(f"offset must be in [0, 2^62), got {offset}")


def _check_factors(left: Tensor, right: Tensor, out: Tensor, offset: int) -> None:
    for name, tensor in (("left", left), ("right", right)):
        if tensor.dtype != torch.float32 or tensor.ndim != 2 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be a contiguous float32 matrix, got {tuple(tensor.shape)}, {tensor.dtype}")
        if tensor.device != out.device:
            raise ValueError(f"{name} must be on {out.device}, got {tensor.device}")
    columns = max(right.shape[1], 1)
    rows = (offset + out.numel() - 1) // columns - offset // columns + 1 if out.numel() else 0
    if left.shape[1] != right.shape[0] or left.shape[0] < rows:
        raise ValueError(
            f"factors must be ({rows}, Q) and (Q, columns), got {tuple(left.shape)} and {tuple(right.shape)}"
        )


def _float32(value: float) -> float:
    return ctypes.c_float(value).value
