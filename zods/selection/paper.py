"""The features of the paper (Nguyen et al. 2024, arXiv:2407.19580v1, section 4.3), kept for comparison.

All examples share one direction z: an example's gradient is estimated as g_i z, with g_i one difference of losses, made what an
Adam step would be from it by the moments of the gradients chosen so far, and cut to the elements that are largest over the
candidates. So the features are a curve with one parameter; what tells examples apart is g_i.

The moments follow from the list of (seed of z, mean g_i of the chosen), which is all that a checkpoint keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zods import kernels
from zods.directions import Parameter

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class PaperFeatures:
    """Moments of the gradients of `parameter` along the directions chosen so far. top: elements that count."""

    def __init__(self, parameter: Parameter, top: int) -> None:
        self._parameter, self._top = parameter, top
        self.history: list[tuple[int, float]] = []
        self._numel = 1
        for size in parameter.shape:
            self._numel *= size
        self._moments: tuple[Tensor, Tensor] = (torch.zeros(self._numel), torch.zeros(self._numel))

    def expand(self, differences: Tensor, seed: int) -> Tensor:
        """(n, top) float32 of the candidates' derivatives (n,) along z(seed)."""
        z = self._z(seed)
        total = torch.zeros(self._numel)
        for g in differences.tolist():
            total += self._normalised(g * z).abs()
        kept = total.topk(min(self._top, self._numel)).indices.sort().values
        return torch.stack([self._normalised(g * z[kept], kept) for g in differences.tolist()])

    def record(self, seed: int, mean: float) -> None:
        """The chosen have this mean derivative along z(seed)."""
        self.history.append((seed, mean))
        self._moments = self._moved(mean * self._z(seed), slice(None))

    def load(self, history: list[tuple[int, float]]) -> None:
        self.history = []
        self._moments = (torch.zeros(self._numel), torch.zeros(self._numel))
        for seed, mean in history:
            self.record(seed, mean)

    def _z(self, seed: int) -> Tensor:
        ordinal = self._parameter.ordinal
        return kernels.direction(self._numel, seed=seed, distribution="gaussian", parameter=ordinal, offset=0)

    def _moved(self, gradient: Tensor, where: Tensor | slice) -> tuple[Tensor, Tensor]:
        first, second = (moment[where] for moment in self._moments)
        return first.lerp(gradient, 1 - BETAS[0]), second.lerp(gradient.square(), 1 - BETAS[1])

    def _normalised(self, gradient: Tensor, where: Tensor | slice = slice(None)) -> Tensor:
        first, second = self._moved(gradient, where)
        step = len(self.history) + 1
        return first / (1 - BETAS[0] ** step) / ((second / (1 - BETAS[1] ** step)).sqrt() + EPSILON)
