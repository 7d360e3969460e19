"""Strikes runs of the command line with every fault of the matrix, and starts them again. Prints
one JSON object, last.

    python benchmarks/faults.py [--markdown FILE] [--only TEXT]

Each cell is real: signals that kill, stop and end ranks and launchers at a given phase of a step,
full disks (small file systems, which needs root), files that are written over. `identical`: the
run's weights and log are at the end those of an undisturbed run, byte by byte.
"""

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import add_smoke_option, machine

from tests.distributed.matrix import CELLS, run_cell


def table(rows: list[dict]) -> str:
    columns = ("fault", "phase", "rank", "outcome", "identical")
    lines = [
        columns,
        ["---"] * len(columns),
        *([str(row[column]) for column in columns] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", type=Path, help="write the table there, too")
    parser.add_argument("--only", default="", help="cells whose name holds this text")
    add_smoke_option(parser)
    arguments = parser.parse_args()
    rows = []
    cells = [cell for cell in CELLS if arguments.only in cell.name]
    if arguments.smoke:  # one that starts the command line once beside the undisturbed run
        cells = [cell for cell in cells if cell.restarts == 0 and cell.disk_kib is None][:1]
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells:
            try:
                found = run_cell(cell, Path(folder))
                row = {
                    "outcome": found.outcome,
                    "identical": found.identical,
                    "seconds": round(found.seconds, 1),
                }
            except AssertionError as error:
                print(error, file=sys.stderr)
                row = {
                    "outcome": f"failed: {str(error).splitlines()[0]}",
                    "identical": False,
                    "seconds": None,
                }
            rows.append({"fault": cell.fault, "phase": cell.phase, "rank": cell.rank, **row})
            print(f"{cell.name}: {row['outcome']}, identical: {row['identical']}", file=sys.stderr)
    if arguments.markdown is not None:
        head = f"# Faults\n\n`python benchmarks/faults.py --markdown FILE`, {datetime.date.today().isoformat()}\n\n"
        arguments.markdown.write_text(head + table(rows))
    print(
        json.dumps(
            {
                "benchmark": "faults",
                "date": datetime.date.today().isoformat(),
                "machine": machine(),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
