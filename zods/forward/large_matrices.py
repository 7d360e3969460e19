"""Perturbed copies of parts of large matrices: the rows that an embedding looks up, or blocks of
rows of a linear layer's weight.

The matrix of the vocabulary is the largest of a small language model. A whole copy of it for every
point would take more memory than everything else in a step. Called by
`zods.forward.module_runners` and `zods.forward.matrix_forwards`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from zods.forward.parameter_copies import Centers, Perturber
from zods.forward.parameter_usage import Perturbable, reads_values

LARGE_BYTES = 1 << 26  # matrices of at least this size are copied in parts
BLOCK_BYTES = 1 << 24  # rows of a linear layer's weight are copied in blocks of this size
MOST_ROWS = 1 / 8  # if a batch uses a larger share of the rows, the whole matrix is copied
MOST_RUNS = 1 << 11  # likewise for groups of adjacent rows: each takes one call of a kernel

CopyRows = Callable[[torch.Tensor, range], None]  # (out, rows): write the perturbed rows into `out`


def is_large(matrix: torch.Tensor) -> bool:
    return matrix.ndim == 2 and matrix.nbytes >= LARGE_BYTES


def large_weight(
    perturber: Perturber, module: nn.Module, gathered: Sequence[Perturbable]
) -> Perturbable | None:
    """Return a module's weight if it is perturbed, not in place yet, and too large for a whole
    copy. gathered: the module's perturbed parameters.
    """
    weight = module._parameters.get("weight")
    if weight is None or not is_large(weight.data):
        return None
    parameter = next((p for p in gathered if p.param is weight), None)
    if parameter is None or parameter.ordinal in perturber.in_place:
        return None
    return parameter


def blocks(matrix: torch.Tensor) -> Iterator[range]:
    """Yield the rows of a matrix in blocks of at most BLOCK_BYTES."""
    number = max(1, BLOCK_BYTES // max(1, matrix.shape[1] * matrix.itemsize))
    for start in range(0, matrix.shape[0], number):
        yield range(start, min(start + number, matrix.shape[0]))


@contextmanager
def perturbed_rows(
    perturber: Perturber, parameter: Perturbable | None, stream: int, centers: Centers
) -> Iterator[None]:
    """Have an embedding inside look up rows that are perturbed to a stream's point.

    parameter: the embedding's matrix; None: nothing is done.
    """
    if parameter is None:
        yield
        return
    point = perturber.points[stream]

    def place_whole() -> None:
        ((copy,),) = perturber.copies([parameter], (stream,), centers)
        perturber.place(*copy)

    def copy_rows(out: torch.Tensor, rows: range) -> None:
        perturber.perturb_([out], parameter, point, centers, rows)

    try:
        with LookedUpRows(parameter.param, copy_rows, place_whole):
            yield
    finally:
        perturber.restore([parameter.ordinal])


class LookedUpRows(TorchFunctionMode):
    """A context in which an embedding gets perturbed copies of the rows of a matrix that it uses.

    Any other use of the matrix first puts a copy of the whole matrix in place.
    """

    def __init__(
        self, matrix: torch.Tensor, copy_rows: CopyRows, place_whole: Callable[[], None]
    ) -> None:
        super().__init__()
        self._matrix: torch.Tensor | None = matrix
        self._copy_rows, self._place_whole = copy_rows, place_whole

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        uses = self._matrix is not None and any(
            leaf is self._matrix for leaf in tree_leaves((args, kwargs))
        )
        if uses and reads_values(func):
            if (
                func is functional.embedding
                and (found := self._lookup(*args, **kwargs)) is not None
            ):
                return found
            self._matrix = None
            self._place_whole()
        return func(*args, **kwargs)

    def _lookup(
        self,
        indices: torch.Tensor,
        weight: torch.Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor | None:
        rows, inverse = torch.unique(indices, return_inverse=True)
        if max_norm is not None or len(rows) > MOST_ROWS * weight.shape[0]:
            return None
        runs = list(_runs(rows.tolist()))
        if len(runs) > MOST_RUNS:
            return None
        copies = torch.empty(len(rows), weight.shape[1], dtype=weight.dtype, device=weight.device)
        for begin, run in runs:
            self._copy_rows(copies[begin : begin + len(run)], run)
        return functional.embedding(inverse, copies)


def _runs(rows: list[int]) -> Iterator[tuple[int, range]]:
    """Split ascending numbers into runs of consecutive ones: (index of its first number, run).

    >>> list(_runs([2, 3, 7]))
    [(0, range(2, 4)), (2, range(7, 8))]
    """
    begin = 0
    for k in range(1, len(rows) + 1):
        if k == len(rows) or rows[k] != rows[k - 1] + 1:
            yield begin, range(rows[begin], rows[k - 1] + 1)
            begin = k
