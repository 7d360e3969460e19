"""Helpers of all tests: random tensors, their bits, damage to files, the texts of loggers."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor


def normal(shape: int | tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of standard normal numbers that depends on shape and seed alone."""
    shape = (shape,) if isinstance(shape, int) else shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    """A copy of a tensor as integers, so that -0 differs from 0 and NaN is equal to itself."""
    return tensor.detach().view({4: torch.int32, 2: torch.int16}[tensor.element_size()]).clone()


def flip(file: Path, position: int) -> None:
    """Flip one bit of the byte at `position`; a second call restores the file."""
    with open(file, "r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ 1 << position % 8]))


class LogTexts(logging.Handler):
    """The texts of the messages of a logger from now on."""

    def __init__(self, logger: str = "zods", level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self.texts: list[str] = []
        logging.getLogger(logger).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
