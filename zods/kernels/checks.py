"""Checks of the arguments of `zods.kernels`. Each raises ValueError with what was found."""

from collections.abc import Sequence

import torch
from torch import Tensor

DISTRIBUTIONS = ("gaussian", "rademacher")
DTYPES = (torch.float32, torch.bfloat16)


def check_tensors(
    out: Tensor, others: dict[str, Tensor], distribution: str, parameter: int, offset: int
) -> None:
    """Check `out`, tensors that must be like it, and the place of its elements."""
    if out.dtype not in DTYPES:
        raise ValueError(f"out must be float32 or bfloat16, got {out.dtype}")
    for name, tensor in {"out": out, **others}.items():
        check_contiguous(name, tensor)
        if (tensor.numel(), tensor.dtype, tensor.device) != (out.numel(), out.dtype, out.device):
            raise ValueError(
                f"{name} must be like out ({out.numel()} elements, {out.dtype}, {out.device}), got "
                f"{tensor.numel()} elements, {tensor.dtype}, {tensor.device}"
            )
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
    if not 0 <= parameter < 2**31:
        raise ValueError(f"parameter must be in [0, 2^31), got {parameter}")
    check_offset(offset)


def check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}"
        )


def check_offset(offset: int) -> None:
    if not 0 <= offset < 2**62:
        raise ValueError(f"offset must be in [0, 2^62), got {offset}")


def check_terms(
    seeds: Sequence[int], coefficients: Sequence[float], rounding_seed: int | None
) -> None:
    if len(seeds) != len(coefficients):
        raise ValueError(
            f"one coefficient per seed is needed, got {len(seeds)} seeds and {len(coefficients)} "
            "coefficients"
        )
    for seed in [*seeds, *([] if rounding_seed is None else [rounding_seed])]:
        if not 0 <= seed < 2**64:
            raise ValueError(f"a seed must be in [0, 2^64), got {seed}")


def check_factors(
    left: Tensor, right: Tensor, out: Tensor, offset: int, stacked: Sequence[int] = ()
) -> None:
    """Check the factors. stacked: their leading dimensions: none, or the number of sweeps."""
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
