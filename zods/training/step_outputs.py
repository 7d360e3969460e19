"""The results of a step that an engine shows: the loss, and a report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


class StepLoss(torch.Tensor):
    """The loss that `engine(batch)` returns in training mode: a 0-d tensor that also serves as the
    model's outputs.

    `outputs.loss`, `outputs["loss"]`, `outputs[0]` and `loss.mean()` return the loss itself, so
    that `engine.backward` recognizes it. Any other computation gives a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def loss(self) -> StepLoss:
        return self

    def __getitem__(self, key: Any) -> Any:
        if key in (0, "loss"):
            return self
        raise (KeyError if isinstance(key, str) else IndexError)(_ONLY_LOSS.format(f"[{key!r}]"))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_ONLY_LOSS.format(f".{name}"))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.as_subclass(torch.Tensor))

    def __format__(self, spec: str) -> str:
        return format(self.as_subclass(torch.Tensor), spec)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)

    def mean(self, *args: Any, **kwargs: Any) -> Any:
        return super().mean(*args, **kwargs) if args or kwargs else self

    def backward(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "loss.backward(): the loss has no graph in a zeroth-order step. Call "
            "engine.backward(loss)."
        )


_ONLY_LOSS = (
    "outputs{}: in training mode engine(batch) returns the loss alone, of several points around "
    "the parameters. For the model's outputs call engine.eval() first, and engine.train() after "
    "it."
)


@dataclass(frozen=True)
class StepReport:
    """The report of one step.

    loss: mean of the losses at theta +- eps z, over the global batch. projected_grad: mean over the
    directions; None for a first-order step. scalar_bytes: bytes that this rank sent. seconds: wall
    time, including a refresh of the anchor and the choice of the sub-batch (selection_seconds).
    measured: "rms" (the estimate was divided by it), "anchor_weight", and the figures of
    `NoiseMeter.report`, where they are known.
    """

    step: int
    loss: float
    projected_grad: float | None
    lr: float
    scalar_bytes: int
    seconds: float
    skipped: bool
    selection_seconds: float = 0.0
    measured: dict[str, float] = field(default_factory=dict)
