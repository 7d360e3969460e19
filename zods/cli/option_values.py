"""The types of options whose values are more than a text or a number."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass, field
from typing import Any, Literal

from zods.config.config_errors import nearest
from zods.tasks import KINDS, TASKS


class Names(tuple[str, ...]):
    """Names, made from a text that separates them by commas.

    >>> Names("q_proj,v_proj")
    ('q_proj', 'v_proj')
    """

    def __new__(cls, text: str) -> Names:
        return super().__new__(cls, (name.strip() for name in text.split(",")))


class TaskName(str):
    """The name of a kind of task, of a declared task, or "custom"."""

    ALLOWED = (*KINDS, *TASKS, "custom")

    def __new__(cls, text: str) -> TaskName:
        if text not in cls.ALLOWED:
            raise argparse.ArgumentTypeError(
                f"found {text!r}, allowed are {', '.join(cls.ALLOWED)}.{nearest(text, cls.ALLOWED)}"
            )
        return super().__new__(cls, text)

    @property
    def is_declared(self) -> bool:
        """Whether the name stands for data, prompt and metric, not only for a kind of task."""
        return self not in KINDS


@dataclass(frozen=True)
class SubBatch:
    """A selection K/N: the number of chosen examples, and the number of candidates."""

    text: str

    def __post_init__(self) -> None:
        chosen, _, candidates = self.text.partition("/")
        if not (chosen.isdigit() and candidates.isdigit() and 0 < int(chosen) <= int(candidates)):
            raise argparse.ArgumentTypeError(
                f"found {self.text!r}, expected K/N with 0 < K <= N, as in 64/128",
            )

    @property
    def chosen(self) -> int:
        return int(self.text.partition("/")[0])

    @property
    def candidates(self) -> int:
        return int(self.text.partition("/")[2])


@dataclass(frozen=True)
class Weights:
    """Weights of sources, "source=weight,...". The text after the last "=" is the weight.

    >>> Weights("code=2,web=0.5").values
    {'code': 2.0, 'web': 0.5}
    """

    text: str
    values: dict[str, float] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        pairs = [pair.rpartition("=") for pair in self.text.split(",")]
        try:
            values = {name.strip(): float(weight) for name, _, weight in pairs}
        except ValueError:
            values = {}
        if len(values) < len(pairs) or "" in values:
            raise argparse.ArgumentTypeError(
                f"found {self.text!r}, expected each source once, as in code=2,web=0.5"
            )
        object.__setattr__(self, "values", values)


@dataclass(frozen=True)
class FractionOrCount:
    """A part of the examples: a count where the text has only digits, a fraction otherwise."""

    text: str

    def __post_init__(self) -> None:
        float(self.text)  # raises ValueError where the text is no number

    def __str__(self) -> str:
        return self.text

    @property
    def value(self) -> float | int:
        return int(self.text) if self.text.isdigit() else float(self.text)


@dataclass(frozen=True)
class NumberOrName:
    """A number, or a name such as "all"."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def value(self) -> float | int | str:
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(self.text)
        return self.text


@dataclass(frozen=True)
class NumberOrAuto:
    """A number, or "auto"."""

    text: str = field(compare=False)
    value: float | Literal["auto"] = field(init=False)

    def __post_init__(self) -> None:
        try:
            value: Any = self.text if self.text == "auto" else float(self.text)
        except ValueError:
            message = f"found {self.text!r}, expected a number or auto"
            raise argparse.ArgumentTypeError(message) from None
        object.__setattr__(self, "value", value)

    def __str__(self) -> str:
        return self.text
