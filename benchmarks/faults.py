"""Strike runs of the command line with every fault of the matrix, and start them again.

    python benchmarks/faults.py [--json FILE] [--work FOLDER] [--markdown FILE] [--only TEXT...]

Each fault is real: signals that kill, stop and end ranks and launchers at a given phase of a step,
full disks (small file systems, which need root), files that are written over. The last line of the
output is one JSON object. Its rows:

struck      whether the fault struck in the first start
exit_code   of the `deepspeed` command of the first start
outcome     how the starts ended, or the first expectation that was not met
identical   whether the run ended with the weights and the log of an undisturbed run, byte by byte

--json gets each row as soon as the cell has ended. A command that was interrupted, or that had
failing cells, continues from this file: it runs the cells that have not passed there. All rows are
of one commit, so the file of another commit is refused. --work keeps the undisturbed runs for the
next command, which would make them again otherwise.

The exit code is 1 if a cell fails.
"""

import argparse
import datetime
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Report, add_report_options, add_smoke_option, commit, machine

from tests.distributed.fault_runs import run_cell
from tests.distributed.matrix import CELLS, Cell

COLUMNS = (
    *("fault", "phase", "rank", "kind", "struck", "exit_code"),
    *("outcome", "restarts", "identical", "seconds"),
)


def passed(row: dict) -> bool:
    return row["struck"] and row["identical"]


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    cells = [cell for cell in CELLS if any(text in cell.name for text in arguments.only)]
    if arguments.smoke:  # a cell that starts the command line once beside the undisturbed run
        cells = [cell for cell in cells if len(cell.starts) == 1 and cell.disk is None][:1]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_report_options(parser)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="run the cells whose name has one of these texts"
    )
    add_smoke_option(parser)
    arguments = parser.parse_args()
    # so that a request to end kills the running ranks and unmounts the small file systems
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cells = cells_of(arguments)
    report = Report(
        {
            "benchmark": "faults",
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "machine": machine(),
        },
        arguments.json,
        key="cell",
        passed=passed,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.work is not None:
            folder = arguments.work.resolve() / (report.head["commit"] or "unknown")
        for number, cell in enumerate(cells, 1):
            row = report.done(cell.name)
            if row is None:
                result = run_cell(cell, folder)
                row = result.row()
                print(result.failure, end="\n" * bool(result.failure), file=sys.stderr)
                print(
                    f"{number} of {len(cells)}: {cell.name}: {row['outcome']}, "
                    f"exit code {row['exit_code']}, identical: {row['identical']}, "
                    f"{row['seconds']} s",
                    file=sys.stderr,
                    flush=True,
                )
            report.add(row)
    if arguments.markdown is not None:
        text = f"{len(report.rows)} cells, two ranks"
        arguments.markdown.write_text(report.markdown("Faults", text, COLUMNS))
    report.print_and_exit()


if __name__ == "__main__":
    main()
