"""The variables of a minimisation, as the kernels change them and as the user's function gets them.

The kernels change contiguous float32 or bfloat16 tensors. A function gets x in the form of x0: a
tensor or an array, or a dict of them, of the dtypes of x0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@dataclass(frozen=True)
class Variable:
    """One tensor of x. ordinal, shape: see `zods.core.directions.Parameter`. dtype: in x0."""

    name: str
    ordinal: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Variables:
    """The form of x: its tensors, in their order.

    are_arrays: whether x0 has numpy arrays, so that a function gets arrays, too.
    """

    def __init__(self, x0: Any) -> None:
        """Check x0. Raises ValueError where it is not a tensor, an array, or a dict of either kind,
        or has a dtype that is not in DTYPES, no elements, or values that are not finite in the
        dtype in which they are kept.
        """
        self._is_dict = isinstance(x0, Mapping)
        entries = dict(x0) if self._is_dict else {"x": x0}
        names = {name: f"x0[{name!r}]" if self._is_dict else "x0" for name in entries}
        for name, value in entries.items():
            if not isinstance(name, str):
                raise ValueError(f"x0: a key is {name!r}. Give texts as keys.")
            if not isinstance(value, (Tensor, np.ndarray)):
                raise ValueError(
                    f"{names[name]}: found {type(value).__name__}, expected a torch tensor or a "
                    "numpy array. Convert it, for example with torch.tensor."
                )
        self.are_arrays = any(isinstance(value, np.ndarray) for value in entries.values())
        if self.are_arrays and any(isinstance(value, Tensor) for value in entries.values()):
            raise ValueError("x0: holds tensors and arrays. Convert them to one kind.")
        tensors = {name: _as_tensor(value, names[name]) for name, value in entries.items()}
        if not sum(tensor.numel() for tensor in tensors.values()):
            raise ValueError("x0: has no elements. Give at least one number.")
        self.variables = tuple(
            Variable(name, ordinal, tuple(tensor.shape), tensor.dtype)
            for ordinal, (name, tensor) in enumerate(tensors.items())
        )
        self.start = [_as_kept(tensor) for tensor in tensors.values()]
        for name, tensor in zip(tensors, self.start, strict=True):
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{names[name]}: holds values that are not finite as {tensor.dtype}. Start at "
                    "finite values."
                )

    def as_given(self, values: list[Tensor]) -> Any:
        """A copy of `values` in the form of x0."""
        tensors = [
            value.to(variable.dtype, copy=True)
            for variable, value in zip(self.variables, values, strict=True)
        ]
        given = [tensor.numpy() for tensor in tensors] if self.are_arrays else tensors
        if not self._is_dict:
            return given[0]
        return {v.name: value for v, value in zip(self.variables, given, strict=True)}


def _as_tensor(value: Tensor | np.ndarray, name: str) -> Tensor:
    """The values of x0 as a tensor. name: for messages."""
    try:
        tensor = (
            value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, order="C"))
        )
    except TypeError:
        tensor = None
    if tensor is None or tensor.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"{name}: its dtype is {value.dtype}, allowed are {allowed}. Convert it to one of them."
        )
    return tensor


def _as_kept(tensor: Tensor) -> Tensor:
    """A contiguous copy in a dtype of the kernels: float64 is rounded to float32."""
    dtype = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor.detach())
