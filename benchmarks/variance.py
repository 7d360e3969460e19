"""Measure the errors of estimates of the gradient on a logistic regression.

    python benchmarks/variance.py [--json FILE] [--markdown FILE]

The gradient of all examples is known exactly. The error is the mean of |estimate - gradient|^2 over
|gradient|^2. Prints one JSON object. Rows of part "step" have the estimates of a step of 256
forwards, 20 steps after a refresh, with an anchor far from the optimum and near it. Rows of part
"refresh" have the estimates of a refresh by K directions: in one pass over the examples, each
direction on its own part of them, and in K whole passes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Report, add_smoke_option, report_head

from tests.reference.variance import (
    NUM_EXAMPLES,
    NUM_PARAMETERS,
    WALK,
    errors_at_equal_forwards,
    errors_of_refresh,
)

DESCENTS = {"far": 0, "near": 300}  # steps of gradient descent from 0 to the anchor
DIRECTIONS = (4, 16, 64)
STEP_COLUMNS = ("point", "MeZO", "SVRG, shared, K = 16", "SVRG, per example, K = 64, auto")
REFRESH_COLUMNS = ("K", "one pass", "formula", "K passes", "ratio", "ratio by formula")


def row_of_step(point: str, walk: int, draws: int) -> dict[str, Any]:
    errors = errors_at_equal_forwards(DESCENTS[point], walk, draws)
    row = {"name": f"step, {point}", "part": "step", "point": point}
    return row | dict(zip(STEP_COLUMNS[1:], errors.values(), strict=True))


def row_of_refresh(number: int, draws: int) -> dict[str, Any]:
    found = errors_of_refresh(number, draws)
    one, whole = found["one pass"], found["whole passes"]
    noise = found["noise"] / NUM_EXAMPLES
    return {
        "name": f"refresh, {number}",
        "part": "refresh",
        "K": number,
        "one pass": one,
        "formula": NUM_PARAMETERS * (1 / number + noise),
        "K passes": whole,
        "ratio": one / whole,
        "ratio by formula": 1 + number * noise,
        "noise_scale": found["noise"],
    }


def markdown(report: Report) -> str:
    """The two tables."""
    text = f"|estimate - gradient|^2 / |gradient|^2, d = {NUM_PARAMETERS:,}, n = {NUM_EXAMPLES}"
    tables = []
    for part, columns in (("step", STEP_COLUMNS), ("refresh", REFRESH_COLUMNS)):
        rows = [
            {key: f"{row[key]:.4g}" if isinstance(row[key], float) else row[key] for key in columns}
            for row in report.rows
            if row["part"] == part
        ]
        tables.append(report.markdown("Errors of estimates", text, columns, rows))
    return tables[0] + "\n" + tables[1].split("\n\n", 2)[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the JSON object there, too")
    parser.add_argument("--markdown", type=Path, help="write the tables there, too")
    add_smoke_option(parser)
    arguments = parser.parse_args()
    smoke = arguments.smoke
    report = Report(
        report_head("variance", arguments), arguments.json, key="name", passed=lambda row: True
    )
    for point in ["far"] if smoke else DESCENTS:
        report.add(row_of_step(point, 1 if smoke else WALK, draws=1 if smoke else 60))
    for number in DIRECTIONS[:1] if smoke else DIRECTIONS:
        report.add(row_of_refresh(number, draws=1 if smoke else 100))
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(report))
    report.print_and_exit()


if __name__ == "__main__":
    main()
