"""One model of the zoo with its batches, made in the same way in every process."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

EXAMPLES = 4  # the number of examples of a global batch


@dataclass(frozen=True)
class Subject:
    """A model and its batches.

    make: makes the model, with seeded random numbers.
    batch: seed -> a global batch of `EXAMPLES` examples of equal size, a dict or a tuple of tensors
        with the examples on dim 0. Anything else in it belongs to all examples.
    trained: a regular expression for the names of the parameters to train.
    eps, lr: of the steps.
    sample: whether the tests run the model by default.
    svrg, bf16: whether the model is also run in these ways.
    sharded: whether DeepSpeed can run it under ZeRO-3.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    trained: str = ""
    eps: float = 1e-2
    lr: float = 1e-3
    sample: bool = False
    svrg: bool = False
    bf16: bool = False
    sharded: bool = True


def fresh(subject: Subject) -> nn.Module:
    """The model in evaluation mode, with the same bits at every call.

    Noise is added to all parameters. So no parameter is zero (as LoRA's matrices, gates and biases
    are at the start), and all layers matter to the loss.
    """
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    # as in a rank: the QR decomposition of an orthogonal initialization depends on the number of
    # threads
    torch.set_num_threads(1)
    model = subject.make().eval()
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        param.requires_grad_(param.requires_grad and re.search(subject.trained, name) is not None)
        param.data += 0.1 * torch.randn(param.shape, generator=generator)
    return model


def part_of(batch: Any, start: int, stop: int) -> Any:
    """Examples `start` to `stop` of a batch."""
    if isinstance(batch, dict):
        return {key: part_of(value, start, stop) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(part_of(value, start, stop) for value in batch)
    return batch[start:stop] if isinstance(batch, Tensor) and batch.ndim else batch


def joined(parts: Sequence[Any]) -> Any:
    """Join parts of a batch."""
    first = parts[0]
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(joined(values) for values in zip(*parts, strict=True))
    return torch.cat(list(parts)) if isinstance(first, Tensor) and first.ndim else first


def loss_of(outputs: Any, batch: Any) -> Tensor:
    """The loss in a model's outputs, or else the cross entropy of its logits."""
    if isinstance(outputs, Tensor) and outputs.ndim == 0:
        return outputs
    if isinstance(outputs, tuple) and isinstance(outputs[0], Tensor) and outputs[0].ndim == 0:
        return outputs[0]
    found = outputs if isinstance(outputs, dict) else vars(outputs)
    if found.get("loss") is not None:
        return found["loss"]
    return functional.cross_entropy(found["logits"], batch["labels"])
