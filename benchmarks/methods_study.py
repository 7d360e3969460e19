"""Noise of the gradient and curvature of the loss along a run of `methods.py`.

With g_i the gradient of example i, g their mean and H the Hessian of the mean loss, over some
training examples and the trained parameters:

    noise_scale     N = (mean |g_i|^2 - |g|^2) / |g|^2. The variance of per-example projected
                    gradients over their mean square has the same value.
    trace           tr H = E z^T H z, with Rademacher z (Hutchinson 1990)
    curvature       the largest eigenvalue of H, by power iteration
    effective_rank  trace / curvature

Products with H are central differences of the gradient.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from methods_tasks import Bench
from torch import Tensor

from zods.training.engine import ZerothOrderEngine

NUM_PROBES, NUM_ITERATIONS = 8, 12
NUM_CURVED = 64  # examples whose mean loss has the Hessian H
STEP = 1e-3  # length of a difference, over the root mean square of its direction's elements


class Study:
    """Measurements on a float32 copy of the model."""

    def __init__(self, bench: Bench, num_examples: int) -> None:
        """num_examples: the training examples that are used, the first ones."""
        self.bench, self.rows = bench, bench.train[:num_examples]
        self.model = copy.deepcopy(bench.model).float()
        self.trained = [param for param in self.model.parameters() if param.requires_grad]
        self.generator = torch.Generator().manual_seed(0)

    def at(self, forward: ZerothOrderEngine | torch.nn.Module) -> dict[str, float]:
        """Measure at the parameters of an engine in eval mode, or of a model."""
        model = forward.module if isinstance(forward, ZerothOrderEngine) else forward
        self.model.load_state_dict(model.state_dict())
        mean_square, square = self._gradients()
        trace, curvature = self._trace(), self._largest_eigenvalue()
        return {
            "grad_norm_squared": square,
            "noise_scale": (mean_square - square) / square,
            "trace": trace,
            "curvature": curvature,
            "effective_rank": trace / curvature,
        }

    def _gradient(self, rows: list[dict[str, Any]]) -> Tensor:
        loss = self.model(**self.bench.collate(rows)).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.trained)])

    def _gradients(self) -> tuple[float, float]:
        """Unbiased estimates of the mean over examples of |g_i|^2, and of |g|^2."""
        total, mean_square, n = torch.tensor(0.0), 0.0, len(self.rows)
        for row in self.rows:
            gradient = self._gradient([row])
            total = total + gradient / n
            mean_square += gradient.square().sum().item() / n
        square = (n * total.square().sum().item() - mean_square) / (n - 1)
        return mean_square, max(square, 1e-6 * mean_square)

    @torch.no_grad()
    def _move(self, direction: Tensor, length: float) -> None:
        start = 0
        for param in self.trained:
            part = direction[start : start + param.numel()].view(param.shape)
            param.add_(part, alpha=length)
            start += param.numel()

    def _times_hessian(self, direction: Tensor) -> Tensor:
        length = STEP / direction.square().mean().sqrt().item()
        self._move(direction, length)
        above = self._gradient(self.rows[:NUM_CURVED])
        self._move(direction, -2 * length)
        below = self._gradient(self.rows[:NUM_CURVED])
        self._move(direction, length)
        return (above - below) / (2 * length)

    def _probe(self) -> Tensor:
        numel = sum(param.numel() for param in self.trained)
        return torch.randint(0, 2, (numel,), generator=self.generator).float() * 2 - 1

    def _trace(self) -> float:
        probes = [self._probe() for _ in range(NUM_PROBES)]
        return sum((z @ self._times_hessian(z)).item() for z in probes) / NUM_PROBES

    def _largest_eigenvalue(self) -> float:
        direction = self._probe()
        for _ in range(NUM_ITERATIONS):
            direction = direction / direction.norm()
            product = self._times_hessian(direction)
            value = (direction @ product).item()
            direction = product
        return value
