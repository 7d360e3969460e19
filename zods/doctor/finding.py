"""The result of one check."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """state: "ok"; "note": training works, but see the text; "broken": the text says what to do."""

    state: Literal["ok", "note", "broken"]
    text: str

    def __str__(self) -> str:
        return f"{self.state:<7} {self.text}"
