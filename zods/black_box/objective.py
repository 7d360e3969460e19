"""The function that is minimised: its calls, the check of what it returns, and their number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zods.black_box.variables import Variables


class Objective:
    """A function of x, or of x and examples.

    num_examples: None where the function has no examples; it is then treated as one of a single
    example. evaluations: number of losses computed so far.
    """

    def __init__(
        self, function: Callable[..., Any], variables: Variables, num_examples: int | None
    ) -> None:
        self._function, self._variables = function, variables
        self._has_examples = num_examples is not None
        self.num_examples = 1 if num_examples is None else num_examples
        self.evaluations = 0

    def losses(self, values: list[Tensor], indices: Tensor) -> Tensor:
        """The losses of examples at `values`, (number of indices,) float64 on the CPU.

        indices: of the examples, int64. Raises ValueError where the function returns something
        else than one real number per example.
        """
        x = self._variables.as_given(values)
        self.evaluations += len(indices)
        if not self._has_examples:
            return _real(self._function(x), "a number", lambda found: found.numel() == 1).view(1)
        of_examples = indices.numpy() if self._variables.are_arrays else indices
        return _real(
            self._function(x, of_examples),
            f"one loss per index, of shape ({len(indices)},)",
            lambda found: found.shape == indices.shape,
        )

    def mean(self, values: list[Tensor]) -> float:
        """The mean loss of all examples."""
        return self.losses(values, torch.arange(self.num_examples)).mean().item()


def _real(returned: Any, expected: str, fits: Callable[[Tensor], bool]) -> Tensor:
    """What a function returned, as float64."""
    try:
        found = torch.as_tensor(returned)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"function: returned {type(returned).__name__}, expected {expected}."
        ) from None
    if found.is_complex() or not fits(found):
        raise ValueError(
            f"function: returned {found.dtype} of shape {tuple(found.shape)}, expected {expected}."
        )
    return found.detach().double().cpu()
