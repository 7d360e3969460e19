"""The tables of a report: final figures, and settings. Caller: `zods.report.page`.

A table is a list of rows: a name and one text per run. A text is empty where a run has no value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zods.cli.plots import WINDOW, Floats, series
from zods.report.runs import Run

Row = tuple[str, Sequence[str]]
MIB = 1 << 20
# Settings that are of no use in a comparison: the command repeats the arguments, and the folder of
# the run heads its column.
NOT_COMPARED = ("command", "arguments.output_dir")


def figures(runs: Sequence[Run]) -> list[Row]:
    """What the runs reached and what they cost."""
    of_runs = [{**_measured(run), **_summarised(run)} for run in runs]
    names = dict.fromkeys(name for found in of_runs for name in found)
    return [(name, [found.get(name, "") for found in of_runs]) for name in names]


def _measured(run: Run) -> dict[str, str]:
    """The figures that follow from the lines of the steps and of the evaluations."""
    steps = max((line["step"] for line in run.train), default=0)
    found = {"state": "finished" if run.summary else "not finished", "steps": f"{steps:,}"}
    losses = series(run.train, "loss")[1]
    if len(losses):
        first, last = losses[:WINDOW].mean(), losses[-WINDOW:].mean()
        found[f"training loss, mean of {WINDOW} steps"] = f"{first:.4f} → {last:.4f}"
    for name in dict.fromkeys(name for line in run.held_out for name in line):
        values = series(run.held_out, name)[1]
        if name not in ("kind", "step") and len(values):
            found[f"held-out {name}"] = f"{values[0]:.4f} → {values[-1]:.4f}"
    if run.step_sizes:
        found["measured step size"] = ", ".join(f"{lr:g}" for lr in run.step_sizes)
    if run.refreshes:
        found["anchor refreshes"] = f"{len(run.refreshes):,}"
    skipped = sum(line.get("skipped") is True for line in run.train)
    return {**found, "skipped steps": f"{skipped:,}", **_times(run), **_bytes(run)}


def _times(run: Run) -> dict[str, str]:
    """The time of training by phase."""
    steps, seconds = series(run.train, "seconds")
    if not len(seconds):
        return {}
    refreshing = np.isin(steps, [refresh["step"] + 1 for refresh in run.refreshes])
    selecting = series(run.train, "selection_seconds")[1]
    found = {
        "time per step (median)": f"{np.median(seconds) * 1e3:,.1f} ms",
        "time of all steps": _duration(seconds.sum()),
    }
    if refreshing.any():
        found["of it steps with a refresh"] = _share(seconds[refreshing], seconds)
    if len(selecting):
        found["of it the choice of examples"] = _share(selecting, seconds)
    return found


def _share(part: Floats, whole: Floats) -> str:
    return f"{_duration(part.sum())} ({part.sum() / max(whole.sum(), 1e-9):.0%})"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60.0)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest:.0f} s" if minutes else f"{rest:.1f} s"


def _bytes(run: Run) -> dict[str, str]:
    sent = series(run.train, "scalar_bytes")[1]
    if not len(sent):
        return {}
    return {"sent per step and rank (mean)": f"{sent.mean():,.0f} bytes"}


def _summarised(run: Run) -> dict[str, str]:
    """The figures that only the run itself could measure, at its end."""
    found = {}
    for key, name in (
        ("zero3_bytes_per_step", "gathered by ZeRO-3 per step"),
        ("anchor_gather_bytes_per_step", "gathered of the anchor point per step"),
        ("anchor_device_bytes", "anchor per rank, on the device"),
        ("anchor_offloaded_bytes", "anchor per rank, offloaded"),
    ):
        if (value := _number(run.summary.get(key))) is not None:
            found[name] = f"{value / MIB:,.1f} MiB"
    peaks = run.summary.get("peak_memory_bytes")
    values = [_number(peak) for peak in peaks] if isinstance(peaks, list) else []
    if texts := [f"{value / MIB:,.0f}" for value in values if value is not None]:
        found["peak memory of each rank"] = f"{', '.join(texts)} MiB"
    for key, value in run.summary.items():
        if key.endswith("_in_context") and (number := _number(value)) is not None:
            name = key.removesuffix("_in_context")
            found[f"held-out {name}, examples in context"] = f"{number:.4f}"
    for key in ("evaluation", "noise_scale", "advice"):
        if run.summary.get(key) is not None:
            found[key.replace("_", " ")] = str(run.summary[key])
    return found


def _number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    values = series([{"step": 0, "value": value}], "value")[1]
    return float(values[0]) if len(values) else None


# --- settings -------------------------------------------------------------------------------------


def settings(runs: Sequence[Run]) -> list[Row]:
    """All settings by their dotted names."""
    of_runs = [_flat({**run.about, "config": run.config}) for run in runs]
    names = dict.fromkeys(name for found in of_runs for name in found)
    return [(name, [found.get(name, "") for found in of_runs]) for name in names]


def differing(rows: Sequence[Row]) -> list[Row]:
    """The settings in which the runs differ."""
    return [row for row in rows if len(set(row[1])) > 1 and row[0] not in NOT_COMPARED]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return found
