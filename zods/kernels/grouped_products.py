"""Products of groups of rows with thin matrices of each group.

A low-rank direction changes a linear layer's output for x by c (x V) U^T, with V, U and c of each
example or point: `project_` is x V, and `add_products_` adds the rest to the output. In torch each
group would need some calls of its own, which take longer than the work: with a direction per example
a layer has as many groups as the batch has examples. Called by `zods.forward.low_rank` and
`zods.forward.matrix_forwards`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from zods.kernels.build import cpu_module
from zods.kernels.checks import DTYPES, check_contiguous

# Multiplications per thread: some 50 us of work, ten times the cost of waking a thread.
_PRODUCTS_PER_THREAD = 2**17
# With more factors torch's product is faster, also in several calls.
_MOST_FACTORS = 4


@torch.no_grad()
def project_(inner: Tensor, x: Tensor, factors: Tensor, bounds: Sequence[int]) -> Tensor:
    """inner[i, q] = sum_j x[i, j] * factors[g, q, j] for the group g of row i, and q < Q.

    Up to 4 factors are multiplied and summed in float32, more of them in the dtype of x. In the C++
    kernel, which has up to 4, a row's result depends on its own x and factors alone.

    Args:
        inner: (N, Q or more), float32. Further columns are not changed.
        x: (N, columns), of any floating-point dtype.
        factors: (G, Q, columns), float32.
        bounds: group g has the rows from bounds[g] to bounds[g + 1]; G + 1 numbers, 0 to N.

    Returns:
        inner.

    Raises:
        ValueError: if a tensor is not contiguous or not as described.
    """
    groups, number, columns = factors.shape
    _check({"inner": inner, "x": x, "factors": factors}, bounds, groups)
    rows = len(inner)
    if x.shape != (rows, columns) or inner.ndim != 2 or inner.shape[1] < number:
        raise ValueError(
            f"x must be ({rows}, {columns}) and inner ({rows}, {number} or more) for factors "
            f"{tuple(factors.shape)}, got x {tuple(x.shape)} and inner {tuple(inner.shape)}"
        )
    serves = x.device.type == "cpu" and x.dtype in DTYPES and number <= _MOST_FACTORS
    module = cpu_module() if serves else None
    if module is None:
        dtype = torch.float32 if number <= _MOST_FACTORS else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            for g, (begin, end) in enumerate(itertools.pairwise(bounds)):
                inner[begin:end, :number] = x[begin:end].to(dtype) @ factors[g].T.to(dtype)
        return inner
    kernel = module.project_float32 if x.dtype == torch.float32 else module.project_bfloat16
    kernel(
        *(inner.data_ptr(), x.data_ptr(), factors.data_ptr(), list(bounds)),
        *(inner.shape[1], number, columns, _threads(x.numel() * number)),
    )
    return inner


@torch.no_grad()
def add_products_(
    out: Tensor,
    inner: Tensor,
    outer: Tensor,
    bounds: Sequence[int],
    *,
    scale: float = 1.0,
    common: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """out[i] = scale * out[i] + common_inner[i] @ common_outer + inner[i] @ outer[g].

    The sum is float32, and is rounded once, to nearest even.

    Args:
        out: (N, columns), of any floating-point dtype.
        inner: (N, Q), float32.
        outer: (G, Q, columns), float32, of each group.
        bounds: as in `project_`.
        scale: of `out`.
        common: (N, D) and (D, columns), float32, of all groups; none by default.

    Returns:
        out.

    Raises:
        ValueError: if a tensor is not contiguous or not as described.
    """
    groups, number, columns = outer.shape
    common_inner, common_outer = common or (
        inner.new_empty(len(out), 0),
        outer.new_empty(0, columns),
    )
    tensors = {"out": out, "inner": inner, "outer": outer}
    _check(tensors | {"common": common_inner, "common's outer": common_outer}, bounds, groups)
    rows, of_common = len(out), len(common_outer)
    needed = [(rows, columns), (rows, number), (rows, of_common), (of_common, columns)]
    given = [tuple(tensor.shape) for tensor in (out, inner, common_inner, common_outer)]
    if given != needed:
        raise ValueError(
            f"out, inner and the two of common must be {needed} for outer {tuple(outer.shape)}, got "
            f"{given}"
        )
    module = cpu_module() if out.device.type == "cpu" and out.dtype in DTYPES else None
    if module is None:
        with torch.autocast(out.device.type, enabled=False):
            for g, (begin, end) in enumerate(itertools.pairwise(bounds)):
                added = common_inner[begin:end] @ common_outer + inner[begin:end] @ outer[g]
                out[begin:end] = added.add_(out[begin:end], alpha=scale)
        return out
    kernel = (
        module.add_products_float32 if out.dtype == torch.float32 else module.add_products_bfloat16
    )
    kernel(
        *(out.data_ptr(), inner.data_ptr(), outer.data_ptr(), list(bounds), number),
        *(common_inner.data_ptr(), common_outer.data_ptr(), len(common_outer)),
        *(scale, columns, _threads(out.numel() * (2 + number + len(common_outer)))),
    )
    return out


def _check(tensors: dict[str, Tensor], bounds: Sequence[int], groups: int) -> None:
    first, one = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check_contiguous(name, tensor)
        if tensor.device != one.device:
            raise ValueError(f"{name} must be on {one.device} as {first}, got {tensor.device}")
    for name in ("inner", "factors", "outer", "common", "common's outer"):
        if name in tensors and tensors[name].dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {tensors[name].dtype}")
    ordered = all(begin <= end for begin, end in itertools.pairwise(bounds))
    if len(bounds) != groups + 1 or bounds[0] != 0 or bounds[-1] != len(one) or not ordered:
        raise ValueError(
            f"bounds must be {groups + 1} numbers from 0 to {len(one)}, got {list(bounds)}"
        )


def _threads(products: int) -> int:
    return max(1, min(torch.get_num_threads(), products // _PRODUCTS_PER_THREAD))
