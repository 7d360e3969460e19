"""Helpers of all tests: random tensors, their bits, damage to files, the texts of loggers, selections of cases."""

from __future__ import annotations

import logging
from collections.abc import Container, Hashable, Iterable
from pathlib import Path
from typing import Any

import pytest
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


def sampled(cases: Iterable[Any], default: Container[Any]) -> list[Any]:
    """Cases as parameters of a test. All but the default ones are marked slow."""
    return [pytest.param(c, marks=[] if c in default else pytest.mark.slow) for c in cases]


def asked_for(
    request: pytest.FixtureRequest, argument: str, cases: Iterable[Hashable], default: Container
) -> list[Any]:
    """The default cases, and those that tests of this session and module have as an argument.

    For a fixture that runs the cases of several tests at once.
    """
    asked = {
        item.callspec.params[argument]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.module.__name__ == request.module.__name__
        and argument in getattr(getattr(item, "callspec", None), "params", {})
    }
    return [case for case in cases if case in default or case in asked]


class LogTexts(logging.Handler):
    """The texts of the messages of a logger from now on."""

    def __init__(self, logger: str = "zods", level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self.texts: list[str] = []
        logging.getLogger(logger).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
