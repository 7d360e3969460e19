"""MeZO and MeZO-SVRG, dense and in one process: what the sharded engine is compared with.

Everything is written out on whole parameters: a direction is made in full, a perturbed point is a
copy, the anchor is a copy, the anchor gradient is a dictionary of tensors. Only the definition of z
and of the seeds is taken from zods.

Malladi et al. 2023, arXiv:2305.17333, algorithm 1 (MeZO); Gautam et al. 2024, arXiv:2404.08080,
algorithm 2 (MeZO-SVRG). As in zods, the step of a refresh, theta <- theta - anchor_lr * g, comes
before a mini-batch step, not in its place.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zods.core.directions import derive_seed
from zods.kernels import direction

Parameters = dict[str, Tensor]


def half_seed(seed: int, side: int) -> int:
    """The seed of U (side 0) or of V (side 1) of a low-rank direction."""
    message = struct.pack("<QI", seed, side)
    return int.from_bytes(
        hashlib.blake2b(message, digest_size=8, person=b"zods-seed").digest(), "little"
    )


# (parameters, batch) -> mean loss over the batch's examples
Loss = Callable[[Parameters, Any], float]


@dataclass
class DenseReference:
    """`params`, changed by `step`; every field below it has the meaning of the key of
    "zeroth_order" of that name.

    params: all named parameters in the order of `named_parameters()`, frozen ones included, in
    float64 or float32. loss: the mean loss of a batch. whole_set: the whole training set as one
    batch (for mezo_svrg). trainable: names of the parameters to train; None trains all. count: of
    what the loss of a batch is a mean over. rounded: rounds the coefficients of the terms of
    a step, or of a refresh.
    """

    params: Parameters
    loss: Loss
    whole_set: Any = None
    trainable: set[str] | None = None
    count: Callable[[Any], float] = lambda batch: len(batch["labels"])
    rounded: Callable[[list[float]], list[float]] = lambda coefficients: coefficients
    method: str = "mezo_svrg"
    eps: float = 1e-3
    lr: float = 1e-6
    anchor_lr: float | None = None
    anchor_interval: int = 100
    num_directions: int = 1
    examples_per_direction: int | str = "all"
    anchor_directions: int = 1
    share_direction: bool = True
    direction: str = "gaussian"
    rank: int = 1
    seed: int = 42
    weight_decay: float = 0.0
    normalize: bool = False
    anchor_weight: float | str = 1.0
    anchor_split: bool = False
    # from the step of a refresh to (batch, share in the mean) of each part of the examples; one
    # part without anchor_split. None: the whole set
    parts: Callable[[int], list[tuple[Any, float]]] | None = None
    steps: int = 0
    anchor: Parameters | None = field(default=None, init=False)
    anchor_grad: Parameters | None = field(default=None, init=False)
    # of the last step, group by group, in pairs; at_anchor: at the anchor
    losses: list[float] = field(default_factory=list, init=False)
    losses_at_anchor: list[float] = field(default_factory=list, init=False)
    # of the last step, one per direction: its group's share in the mean loss times the projected
    # gradient at the parameters (here) and at the anchor (there), over the directions of a group
    here: list[float] = field(default_factory=list, init=False)
    there: list[float] = field(default_factory=list, init=False)
    anchor_losses: list[float] = field(default_factory=list, init=False)  # of the last refresh
    anchor_coefficients: list[float] = field(default_factory=list, init=False)
    # of the estimates so far: the mean squares of their elements, if directions are orthogonal
    squares: list[float] = field(default_factory=list, init=False)
    # of the steps since the refresh: (c a, a a), each summed over directions
    products: list[tuple[float, float]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.params = {name: value.detach().clone() for name, value in self.params.items()}

    def z(self, seed: int) -> Parameters:
        """The direction of `seed`, whole, for every parameter to train."""
        made = {}
        for ordinal, (name, value) in enumerate(self.params.items()):
            if self.trainable is not None and name not in self.trainable:
                continue
            if self.direction == "low_rank" and value.ndim == 2:
                rank = min(self.rank, *value.shape)
                sides = [half_seed(seed, side) for side in (0, 1)]
                left = (
                    self._gaussian(value.shape[0] * rank, sides[0], ordinal).view(-1, rank).double()
                )
                right = (
                    self._gaussian(rank * value.shape[1], sides[1], ordinal).view(rank, -1).double()
                )
                z = left @ right / math.sqrt(rank)
            elif self.direction == "rademacher":
                z = direction(
                    value.numel(), seed=seed, distribution="rademacher", parameter=ordinal, offset=0
                )
            else:
                z = self._gaussian(value.numel(), seed, ordinal)
            made[name] = z.to(value.dtype).view(value.shape)
        return made

    @staticmethod
    def _gaussian(numel: int, seed: int, ordinal: int) -> Tensor:
        return direction(numel, seed=seed, distribution="gaussian", parameter=ordinal, offset=0)

    def projected_grad(self, at: Parameters, seed: int, batch: Any, losses: list[float]) -> float:
        """(L(at + eps z) - L(at - eps z)) / (2 eps); the two losses are appended to `losses`."""
        z = self.z(seed)
        plus = {
            name: value + self.eps * z[name] if name in z else value for name, value in at.items()
        }
        minus = {
            name: value - self.eps * z[name] if name in z else value for name, value in at.items()
        }
        losses += [float(self.loss(plus, batch)), float(self.loss(minus, batch))]
        return (losses[-2] - losses[-1]) / (2 * self.eps)

    def estimate(
        self, at: Parameters, seeds: list[int], batch: Any, losses: list[float]
    ) -> Parameters:
        """The mean over `seeds` of projected_grad * z: the SPSA estimate of the gradient of `batch`
        at `at`.
        """
        total: Parameters = {}
        for seed in seeds:
            grad = self.projected_grad(at, seed, batch, losses)
            for name, z in self.z(seed).items():
                total[name] = total.get(name, torch.zeros_like(z)) + grad * z / len(seeds)
        return total

    def seeds(self, purpose: str, number: int, group: int = 0) -> list[int]:
        return [
            derive_seed(self.seed, purpose, self.steps, group * number + k) for k in range(number)
        ]

    def groups(self, batch: Any) -> list[tuple[Any, float]]:
        """Cut a batch into groups of examples: (part, share in the mean loss) of each."""
        if self.examples_per_direction == "all":
            return [(batch, 1.0)]
        size, number = int(self.examples_per_direction), len(batch["labels"])
        parts = [
            {
                key: value[first : first + size] if len(value) == number else value
                for key, value in batch.items()
            }
            for first in range(0, number, size)
        ]
        return [(part, self.count(part) / self.count(batch)) for part in parts]

    def refresh(self) -> None:
        """Copy the parameters as the anchor, estimate the full-batch gradient there, and step along
        it.
        """
        self.anchor = {name: value.clone() for name, value in self.params.items()}
        self.anchor_losses, self.products = [], []
        seeds = self.seeds("anchor", self.anchor_directions)
        parts = [(self.whole_set, 1.0)] if self.parts is None else self.parts(self.steps)
        if not self.anchor_split:
            ((batch, _),) = parts
            parts = [(batch, 1.0 / len(seeds))] * len(seeds)
        self.anchor_coefficients = self.rounded(
            [
                share * self.projected_grad(self.anchor, seed, batch, self.anchor_losses)
                for seed, (batch, share) in zip(seeds, parts, strict=True)
            ]
        )
        self.anchor_grad = {name: torch.zeros_like(z) for name, z in self.z(0).items()}
        for seed, c in zip(seeds, self.anchor_coefficients, strict=True):
            for name, z in self.z(seed).items():
                self.anchor_grad[name] = self.anchor_grad[name] + c * z
        anchor_lr = self.lr if self.anchor_lr is None else self.anchor_lr
        if self.normalize:
            anchor_lr /= math.sqrt(sum(c * c for c in self.anchor_coefficients))
        for name, grad in self.anchor_grad.items():
            self.params[name] = self.params[name] - anchor_lr * grad

    def step(self, batch: Any) -> float:
        """Make a step on the global batch. Returns the mean of the losses at theta +- eps z."""
        if self.method == "mezo_svrg" and self.steps % self.anchor_interval == 0:
            self.refresh()
        self.losses, self.losses_at_anchor, self.here, self.there = [], [], [], []
        seeds: list[int] = []
        anchor_seeds: list[int] = []
        n, mean_loss = self.num_directions, 0.0
        for group, (part, share) in enumerate(self.groups(batch)):
            of_group = self.seeds("step", n, group)
            seeds += of_group
            self.here += [
                share * self.projected_grad(self.params, seed, part, self.losses) / n
                for seed in of_group
            ]
            mean_loss += share * sum(self.losses[-2 * n :]) / (2 * n)
            if self.method == "mezo_svrg":
                assert self.anchor is not None
                if not self.share_direction:
                    of_group = self.seeds("step_anchor", n, group)
                anchor_seeds += of_group
                self.there += [
                    share * self.projected_grad(self.anchor, seed, part, self.losses_at_anchor) / n
                    for seed in of_group
                ]
        if self.share_direction:
            anchor_seeds = []
        coefficients = self.rounded(self.step_coefficients())
        grad = {name: torch.zeros_like(value) for name, value in self.z(0).items()}
        for seed, c in zip(seeds + anchor_seeds, coefficients, strict=True):
            for name, z in self.z(seed).items():
                grad[name] = grad[name] + c * z
        if self.method == "mezo_svrg":
            assert self.anchor_grad is not None
            grad = {
                name: value + self.weight() * self.anchor_grad[name] for name, value in grad.items()
            }
        self.squares.append(sum(c * c for c in [*coefficients, *self.weighted_anchor()]))
        ca = sum(c * a for c, a in zip(self.here, self.there, strict=False))
        self.products.append((ca, sum(a * a for a in self.there)))
        lr = self.lr / self.rms() if self.normalize else self.lr
        for name, value in grad.items():
            decay = 1 - self.lr * self.weight_decay if self.params[name].dim() >= 2 else 1.0
            self.params[name] = decay * self.params[name] - lr * value
        self.steps += 1
        return mean_loss

    def step_coefficients(self) -> list[float]:
        """The coefficients of the last step's terms, without those of the anchor gradient."""
        if self.method == "mezo":
            return self.here
        at_anchor = [self.weight() * a for a in self.there]
        if not self.share_direction:
            return [*self.here, *(-a for a in at_anchor)]
        return [c - a for c, a in zip(self.here, at_anchor, strict=True)]

    def weighted_anchor(self) -> list[float]:
        """The coefficients of the anchor gradient in a step."""
        return [self.weight() * g for g in self.anchor_coefficients]

    def weight(self) -> float:
        """The weight of the anchor: given, or that of the least noise in the steps before this
        one. A step that is k steps old has the weight 0.9^k in it.
        """
        if self.anchor_weight != "auto":
            return float(self.anchor_weight)
        ages = [0.9**age for age in reversed(range(len(self.products)))]
        ca = sum(w * of[0] for w, of in zip(ages, self.products, strict=True))
        aa = sum(w * of[1] for w, of in zip(ages, self.products, strict=True))
        return min(1.0, max(0.0, ca / aa)) if aa else 1.0

    def rms(self) -> float:
        """The root of the mean of the squares, in which a square that is k steps old has the
        weight 0.99^k.
        """
        weights = [0.99**age for age in reversed(range(len(self.squares)))]
        total = sum(w * square for w, square in zip(weights, self.squares, strict=True))
        return math.sqrt(total / sum(weights))


def named_parameters_of(module: torch.nn.Module, dtype: torch.dtype = torch.float64) -> Parameters:
    """Copies of a module's parameters, for `DenseReference.params`; tied parameters are one."""
    return {name: param.detach().to(dtype, copy=True) for name, param in module.named_parameters()}


def loss_of_module(module: torch.nn.Module, mean_loss: Callable[[Any, Any], Tensor]) -> Loss:
    """A `Loss` that runs `module` with the given parameters in place of its own: mean_loss(outputs,
    batch).

    `batch` is a dict of the module's keyword arguments, or its one argument. The module must be of
    the parameters' dtype.
    """

    @torch.no_grad()
    def loss(params: Parameters, batch: Any) -> float:
        kwargs = batch if isinstance(batch, dict) else None
        outputs = torch.func.functional_call(
            module, params, () if kwargs is not None else (batch,), kwargs
        )
        return mean_loss(outputs, batch).item()

    return loss
