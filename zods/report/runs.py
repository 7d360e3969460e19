"""Read what the folder of a run holds. Callers: the other modules of `zods.report`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zods.cli.run_folder import read_metrics
from zods.files import check_regular
from zods.trajectory.log import read_log
from zods.trajectory.records import Refresh, StepSize


@dataclass(frozen=True)
class Run:
    """One run, finished or under way.

    name: its folder, as given. about, config: run.json and config.json. train, held_out: the lines
    of metrics.jsonl by kind. summary: the line of a finished run; empty before its end. refreshes:
    {"step", "value"} of each refresh of the anchor: the number of steps before it, and the root
    mean square of its coefficients. step_sizes: the step sizes that the run measured.
    """

    name: str
    about: Mapping[str, Any]
    config: Mapping[str, Any]
    train: Sequence[Mapping[str, Any]]
    held_out: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    refreshes: Sequence[Mapping[str, Any]]
    step_sizes: Sequence[float]


def read_run(folder: Path) -> Run:
    """Read the folder of a run.

    Raises OSError, or ValueError with the file and what was found, where it is no run's folder or
    a file of it is damaged or of another version.
    """
    if not (folder / "metrics.jsonl").exists():
        raise FileNotFoundError(
            f"{folder}: no folder of a run: metrics.jsonl is missing. Give a folder that was the "
            "--output_dir of zods.finetune."
        )
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in read_metrics(folder):
        by_kind.setdefault(record["kind"], []).append(record)
    log = folder / "trajectory.log"  # a replica that follows has none
    records = read_log(log).records if log.exists() and log.stat().st_size else ()
    return Run(
        # a name that is not UTF-8 cannot be written to a page
        str(folder).encode(errors="replace").decode(),
        _read_object(folder / "run.json"),
        _read_object(folder / "config.json"),
        by_kind.get("train", []),
        by_kind.get("eval", []),
        by_kind.get("summary", [{}])[-1],
        [
            {"step": record.step, "value": _rms(record.coefficients)}
            for record in records
            if isinstance(record, Refresh) and record.coefficients
        ],
        [record.lr for record in records if isinstance(record, StepSize)],
    )


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


def _read_object(path: Path) -> dict[str, Any]:
    check_regular(path)
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: missing. Put it back from a copy, or wait until the run has written it."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not valid JSON: {error}. Put it back from a copy, or resume the run, which "
            "writes it again."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected {{...}}, found {type(value).__name__}.")
    return value
