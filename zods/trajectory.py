"""The trajectory log: what was applied at each step, one checksummed JSON line per update, appended.

Base weights and this list of terms are the fine-tuned weights.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zods.estimators import Term, Update


class TrajectoryLog:
    """Appends records to a file; a record is on its way to the disk when `append` returns."""

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "a", encoding="ascii")  # noqa: SIM115 (open as long as the run)

    def append(
        self,
        kind: str,
        step: int,
        update: Update,
        losses: Sequence[float],
        lr: float,
        gradient: Sequence[Term] = (),
        ids: Sequence[int] | None = None,
    ) -> None:
        """kind: "step" or "anchor". losses: at the points evaluated, as reduced over the ranks.

        gradient: the terms of a new anchor gradient, of which later updates take `anchor_grad` times the whole.
        ids: of the examples that a selector chose for this step.
        """
        record = {
            "kind": kind,
            "step": step,
            "terms": [list(t) for t in update.terms],
            "decay": update.decay,
            "anchor_grad": update.anchor_grad_coefficient,
            "rounding_seed": update.rounding_seed,
            "losses": list(losses),
            "gradient": [list(t) for t in gradient],
            "lr": lr,
        }
        if ids is not None:
            record["ids"] = list(ids)
        self._append(record)

    def append_selection(self, step: int, ids: Sequence[int], *, loss: float, lr: float) -> None:
        """Of a first-order step: what a selector chose for it. It is no record of what was applied."""
        self._append({"kind": "selection", "step": step, "ids": list(ids), "loss": loss, "lr": lr})

    def _append(self, record: dict[str, Any]) -> None:
        text = json.dumps(record, separators=(",", ":"))
        self._file.write(f"{zlib.crc32(text.encode()):08x} {text}\n")
        self._file.flush()


def read_log(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a log in order. Raises ValueError with the line's number where one is damaged or torn."""
    with open(path, encoding="ascii", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            checksum, _, text = line.rstrip("\n").partition(" ")
            if not line.endswith("\n") or checksum != f"{zlib.crc32(text.encode()):08x}":
                raise ValueError(f"{path}, line {number}: damaged or torn record. The records before it are intact.")
            yield json.loads(text)
