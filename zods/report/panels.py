"""Choose and draw the panels of a report. Callers: `zods.report.page` and the command."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from zods.cli.plots import Floats, series
from zods.report.bins import binned
from zods.report.runs import Run

COLORS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#8c564b", "#666666", "#bcbd22")
LINES = ("-", "--", ":")  # of the curves of one run in a panel
SIZE = (6.0, 2.9)  # inches
SPREAD = 20.0  # largest over median size, beyond which an axis is logarithmic
MOST_MARKERS = 100  # of a curve
MOST_LETTERS = 40  # of a label
MOST_SOURCES = 7  # in a panel; the smallest share one curve
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # names from files may hold dollar signs
    "svg.fonttype": "path",  # the same letters on every machine
}


class Curve(NamedTuple):
    """One curve of a panel.

    label: in the legend; empty for the only curve. color, line: indices into COLORS and LINES.
    smooth: the line is the running mean; otherwise it joins the values, with markers.
    """

    label: str
    color: int
    line: int
    steps: Floats
    values: Floats
    smooth: bool = True


class Panel(NamedTuple):
    """A panel: a title with the unit, and its curves."""

    title: str
    curves: Sequence[Curve]


# title: keys of a line of training, with their labels
TRAINING = {
    "projected gradient": {"projected_grad": ""},
    "step size (lr)": {"lr": ""},
    "running size of the estimates (rms)": {"rms": ""},
    "noise scale (variance over square)": {"noise_scale": ""},
    "shares of the noise": {
        "direction_noise": "direction",
        "batch_noise": "batch",
        "staleness": "age of the anchor",
    },
    "weight of the anchor": {"anchor_weight": ""},
    "seconds per step": {"seconds": "whole step", "selection_seconds": "choice of examples"},
    "bytes sent by a rank per step": {"scalar_bytes": ""},
}


def panels(runs: Sequence[Run]) -> list[Panel]:
    """The panels for which some run has values."""
    names = dict.fromkeys(name for run in runs for line in run.held_out for name in line)
    found = [_over_steps("training loss", [run.train for run in runs], {"loss": ""})]
    found += [
        _over_steps(f"held-out {name}", [run.held_out for run in runs], {name: ""}, smooth=False)
        for name in names
        if name not in ("kind", "step")
    ]
    found += [
        _over_steps(title, [run.train for run in runs], keys) for title, keys in TRAINING.items()
    ]
    refreshes = [run.refreshes for run in runs]
    found.append(
        _over_steps("anchor refreshes: RMS of the coefficients", refreshes, {"value": ""}, False)
    )
    for number, run in enumerate(runs):
        of_run = f" ({run_label(number)})" if len(runs) > 1 else ""
        found.append(Panel(f"chosen examples by source{of_run}", _shares_of_sources(run)))
    return [panel for panel in found if panel.curves]


def run_label(number: int) -> str:
    """The name of a run in legends. number: from 0."""
    return f"run {number + 1}"


def _over_steps(
    title: str,
    lines: Sequence[Sequence[Mapping[str, Any]]],
    keys: Mapping[str, str],
    smooth: bool = True,
) -> Panel:
    """A panel of one curve per run and key. lines: of each run. keys: with their labels."""
    several = len(lines) > 1
    curves = [
        Curve(
            f"{run_label(number) if several else ''} {label}".strip(),
            *((number, line) if several else (line, 0)),
            *series(of_run, key),
            smooth,
        )
        for number, of_run in enumerate(lines)
        for line, (key, label) in enumerate(keys.items())
    ]
    return Panel(title, [curve for curve in curves if len(curve.values)])


def _shares_of_sources(run: Run) -> list[Curve]:
    """The share of each source in the chosen examples of a run."""
    lines = [line for line in run.train if isinstance(line.get("sources"), dict)]
    names = sorted({name for line in lines for name in line["sources"]})
    counts = np.array([[_count(line["sources"].get(name)) for name in names] for line in lines])
    if not counts.size:
        return []
    shares = (counts / np.maximum(counts.sum(1, keepdims=True), 1.0)).T  # (sources, lines)
    order = np.argsort(-shares.sum(1), kind="stable").tolist()
    largest, others = order[:MOST_SOURCES], order[MOST_SOURCES:]
    curves = [(names[i], shares[i]) for i in largest]
    if others:
        curves.append((f"{len(others)} others", shares[others].sum(0)))
    steps = np.array([line["step"] for line in lines], dtype=np.float64)
    return [Curve(name, k, 0, steps, values) for k, (name, values) in enumerate(curves)]


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def draw(panel: Panel, kind: str) -> bytes:
    """Draw a panel as "svg" or "png". Needs matplotlib (the extra `report`)."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        for curve in panel.curves:
            _plot(axes, curve)
        _set_scale(axes, [curve.values for curve in panel.curves])
        axes.set_title(panel.title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25, linewidth=0.6)
        if len(panel.curves) > 1:
            axes.legend(frameon=False, fontsize=8, ncols=2)
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, dpi=130)
    return drawn.getvalue()


def _plot(axes: Any, curve: Curve) -> None:
    bins = binned(curve.steps, curve.values, curve.smooth)
    color = COLORS[curve.color % len(COLORS)]
    axes.fill_between(bins.steps, bins.low, bins.high, color=color, alpha=0.22, linewidth=0.5)
    axes.plot(
        bins.steps,
        bins.mean,
        color=color,
        linestyle=LINES[curve.line % len(LINES)],
        linewidth=1.3,
        marker=None if curve.smooth or len(curve.values) > MOST_MARKERS else "o",
        markersize=3,
        # matplotlib leaves labels that begin with "_" out of a legend
        label=f" {curve.label[:MOST_LETTERS]}",
    )


def _set_scale(axes: Any, curves: Sequence[Floats]) -> None:
    """Have a logarithmic axis where a few values of a curve would flatten its others."""
    sizes = [np.abs(values[values != 0.0]) for values in curves]
    if not any(len(of) and of.max() > SPREAD * np.median(of) for of in sizes):
        return
    if all((values > 0.0).all() for values in curves):
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=float(np.median(np.concatenate(sizes))))
    axes.yaxis.set_major_formatter("{x:g}")  # the default is mathematical text, which STYLE forbids
