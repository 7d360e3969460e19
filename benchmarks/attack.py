"""Attack runs of the command line: kills, second starts, lost and other files, hostile files.

    python benchmarks/attack.py [--quick] [--json FILE] [--work FOLDER] [--markdown FILE]
        [--only TEXT...] [--seed N] [--trials N] [--files N]

Three parts (`tests/distributed/attack_*.py`):

A  signals at random moments, to ranks, launcher and replicas, over all kinds of run. The run is
   started again until it is finished, and is compared with the undisturbed run.
B  second starts, lost, foreign and damaged files, other data, models and options, full disks.
C  hostile files: mutations of every kind of file that zods reads.

The last line of the output is one JSON object. Its rows:

attack     the name, by which --only chooses
outcome    how it ended
silent     the number of differences from the undisturbed run, or of accepted damaged files, that
           nobody was told
traceback  the number of tracebacks in the output
passed     whether both are 0, and no other expectation was not met (such as an end in time)
seed       the seed of the attack; --only NAME --seed SEED makes it again

--json gets each row as soon as the attack has ended. A command that was interrupted, or that had
failing rows, continues from this file, on the same commit and with the same seed. --work keeps the
undisturbed runs, and the files of part C that failed.

The exit code is 1 if a row has not passed.
"""

import argparse
import datetime
import os
import signal
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Report, add_report_options, add_smoke_option, commit, machine

from tests.distributed.attack_damage import ATTACKS
from tests.distributed.attack_files import FILES, hostile_files, make_specimens
from tests.distributed.attack_kills import trials
from tests.distributed.attack_runs import interrupted, server, undisturbed
from tests.distributed.attack_verdicts import Attack, Verdict
from tests.distributed.command_line import MODEL

COLUMNS = ("attack", "outcome", "silent", "traceback", "passed", "seconds")
WHOLE = {"trials": 100, "files": 1000}
QUICK = {"trials": 4, "files": 92}
SMOKE = {"trials": 1, "files": 0}
SMOKE_ATTACKS = ("the log is lost", "kill trial 1: MeZO")


def file_attacks(number: int) -> list[Attack]:
    """The attacks of part C: `number` files, divided among the kinds of file."""
    each, more = divmod(number, len(FILES))

    def strike(work: Path, seed: int, name: str, cases: int) -> Verdict:
        sources = {
            "zeroth": interrupted(work, "MeZO"),
            "first": undisturbed(work, "AdamW, one rank"),
            "adapter": undisturbed(work, "LoRA"),
        }
        make_specimens(work / "specimens", sources, MODEL)
        files = work / "hostile files"
        return hostile_files(server(), work / "specimens", files, name, range(cases), seed)

    return [
        Attack(
            f"hostile files: {file.name}",
            lambda work, seed, n=file.name, cases=each + (k < more): strike(work, seed, n, cases),
            quick=True,
        )
        for k, file in enumerate(FILES)
    ]


def attacks_of(arguments: argparse.Namespace) -> list[Attack]:
    kills = trials(arguments.trials, quick=arguments.quick)
    listed = [attack for attack in ATTACKS if attack.quick or not arguments.quick]
    chosen = [*kills, *listed, *file_attacks(arguments.files)]
    if arguments.smoke:
        chosen = [attack for attack in chosen if attack.name in SMOKE_ATTACKS]
    if os.geteuid() != 0:
        chosen = [attack for attack in chosen if not attack.is_root]
    return [a for a in chosen if any(text in a.name for text in arguments.only)]


def struck(attack: Attack, work: Path, seed: int) -> dict[str, Any]:
    """Make an attack. Returns its row."""
    began = time.monotonic()
    try:
        verdict = attack.strike(work, seed)
    except Exception as error:  # of this script, or a run that was to be undisturbed has failed
        verdict = Verdict("", failure=f"{type(error).__name__}: {error}"[-3000:])
    seconds = round(time.monotonic() - began, 1)
    row = verdict.row()
    row["outcome"] = row["outcome"].replace(f"{work}/", "")
    return {"attack": attack.name, "seed": seed, **row, "seconds": seconds}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_report_options(parser)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="make the attacks whose name has one of these texts"
    )
    parser.add_argument("--seed", type=int, help="seed of all attacks (default: by their names)")
    parser.add_argument("--trials", type=int, help="number of kill trials (default: 100)")
    parser.add_argument("--files", type=int, help="number of hostile files (default: 1000)")
    parser.add_argument("--quick", action="store_true", help="in less than 10 minutes on 2 cores")
    add_smoke_option(parser)
    arguments = parser.parse_args()
    sizes = SMOKE if arguments.smoke else QUICK if arguments.quick else WHOLE
    for name, value in sizes.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main() -> None:
    arguments = options()
    # so that a request to end kills the running ranks and unmounts the small file systems
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    report = Report(
        {
            "benchmark": "attack",
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "machine": machine(),
            "command": sys.argv,
        },
        arguments.json,
        key="attack",
        passed=lambda row: row["passed"],
    )
    attacks = attacks_of(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if arguments.work is not None:
            work = arguments.work.resolve() / (report.head["commit"] or "unknown")
        work.mkdir(parents=True, exist_ok=True)
        os.environ["HF_DATASETS_CACHE"] = str(work / "datasets")
        for number, attack in enumerate(attacks, 1):
            seed = arguments.seed
            if seed is None:
                seed = zlib.crc32(attack.name.encode())
            row = report.done(attack.name)
            if row is None or row["seed"] != seed:
                row = struck(attack, work, seed)
                print(row.get("details", ""), end="\n" * ("details" in row), file=sys.stderr)
                text = f"{row['outcome'][:300]}, {row['seconds']} s"
                line = f"{number} of {len(attacks)}: {attack.name}: {text}"
                print(line, file=sys.stderr, flush=True)
            report.add(row)
    if arguments.markdown is not None:
        totals = (
            f"{len(report.rows)} attacks, {sum(row['silent'] for row in report.rows)} silent "
            f"differences, {sum(row['traceback'] for row in report.rows)} tracebacks"
        )
        arguments.markdown.write_text(report.markdown("Attacks", totals, COLUMNS))
    report.print_and_exit()


if __name__ == "__main__":
    main()
