"""`python -m zods.trajectory`: replay, inspect, verify, diff and merge trajectory logs."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

from zods.files import atomic_write
from zods.trajectory.compare import differences, longer
from zods.trajectory.log import Log, read_log
from zods.trajectory.records import Evaluation, Refresh, RunRecord, Step, StepSize


def main(argv: list[str] | None = None) -> int:
    options = vars(_parser().parse_args(argv))
    command = options.pop("command")
    options.pop("local_rank", None)  # the rank comes from the environment
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return command(**options)
    except (ValueError, OSError) as error:
        print(f"zods.trajectory: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zods.trajectory", description=__doc__, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_replay(commands)

    inspect = commands.add_parser("inspect", help="summarise the run of a log")
    inspect.add_argument("path", metavar="FILE")
    inspect.add_argument(
        "--step",
        type=int,
        metavar="STEP",
        help="print only the records written after this many steps",
    )
    inspect.set_defaults(command=_inspect)

    verify = commands.add_parser(
        "verify",
        help="check a log; exit code 1 if its last record is torn, 2 if it is damaged",
    )
    verify.add_argument("path", metavar="FILE")
    verify.set_defaults(command=_verify)

    diff = commands.add_parser("diff", help="compare two logs; exit code 1 if they differ")
    diff.add_argument("left", metavar="FILE")
    diff.add_argument("right", metavar="FILE")
    diff.set_defaults(command=_diff)

    merge = commands.add_parser(
        "merge", help="write the longer log if it continues the other; otherwise say why not"
    )
    merge.add_argument("left", metavar="FILE")
    merge.add_argument("right", metavar="FILE")
    merge.add_argument("--out", required=True, metavar="FILE")
    merge.set_defaults(command=_merge)
    return parser


def _add_replay(commands: Any) -> None:
    replay = commands.add_parser(
        "replay", help="write the weights of a run, from base weights and its log"
    )
    replay.add_argument(
        "--base",
        required=True,
        metavar="NAME_OR_FOLDER",
        help="the model that the run started from",
    )
    replay.add_argument(
        "--log",
        required=True,
        metavar="FILE",
        help="with the run's folder `initial` beside it, if the run had one",
    )
    replay.add_argument(
        "--out", required=True, metavar="FOLDER", help="to be read by from_pretrained"
    )
    replay.add_argument(
        "--until", type=int, metavar="STEP", help="weights after so many steps (default: all)"
    )
    # A launcher sets --local_rank.
    replay.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    replay.set_defaults(command=_replay)


def _replay(base: str, log: str, out: str, until: int | None) -> int:
    from zods.trajectory.replay import replay

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    done = replay(base, log, out, until=until, rank=rank, world_size=world_size)
    speed = done.element_terms / max(done.seconds, 1e-9)
    print(f"{done.steps} steps in {done.seconds:.1f} s, {speed:.3g} element-terms/s: {out}")
    return 0


def _inspect(path: str, step: int | None) -> int:
    log = _read(path)
    if step is not None:
        for record in log.records:
            if record.step == step:
                print(json.dumps(record.to_json()))
        return 0
    parameters = log.header.parameters
    trained = [parameter for parameter in parameters if parameter.trained]
    print(
        f"model       {log.header.model}, {sum(p.numel for p in parameters):,} parameters in "
        f"{len(parameters)} tensors"
    )
    print(
        f"trained     {sum(p.numel for p in trained):,} in {len(trained)}, "
        f"{', '.join(sorted({p.dtype for p in trained}))}"
    )
    if log.header.data is not None:
        print(f"data        {log.header.data[0]:,} examples, digest {log.header.data[1]}")
    for record in log.records:
        if isinstance(record, RunRecord):
            updates = record.updates or {}
            written = {"optimizer": record.optimizer, **updates, **record.to_json()["zeroth_order"]}
            section = {"batch": record.batch, **{k: v for k, v in written.items() if v is not None}}
            print(f"from step {record.step:<6} on {record.world_size} ranks: {json.dumps(section)}")
        if isinstance(record, Evaluation):
            print(
                f"from step {record.step:<6} evaluated {record.form}, {record.streams} points per "
                "forward"
            )
        if isinstance(record, StepSize):
            print(f"from step {record.step:<6} lr {record.lr:g}, measured")
    steps = [record for record in log.records if isinstance(record, Step)]
    refreshes = sum(isinstance(record, Refresh) for record in log.records)
    print(
        f"steps       {len(steps)}, of these skipped {sum(s.skipped for s in steps)}; refreshes of "
        f"the anchor {refreshes}"
    )
    if steps:
        losses = [step.loss for step in steps if step.loss is not None]
        most = min(20, len(losses))
        first, last = (
            math.fsum(part) / max(most, 1) for part in (losses[:most], losses[len(losses) - most :])
        )
        print(f"loss        {first:.4f} -> {last:.4f} (means of {most} steps)")
        print(
            f"size        {log.ends[-1]:,} bytes, {(log.ends[-1] - log.ends[0]) / len(steps):.0f} "
            "per step"
        )
    print(f"head        {log.heads[-1]}")
    return 0


def _verify(path: str) -> int:
    log = _read(path)
    _changes(log)
    print(f"{path}: {log.num_steps} steps, {len(log.records)} records, head {log.heads[-1]}: whole")
    return int(log.torn > 0)


def _changes(log: Log) -> None:
    """Check every record. Raises ValueError if a record contradicts the configuration in force."""
    from zods.trajectory.updates import History

    history = History()
    for record in log.records:
        # Steps of first-order training have no coefficients and cannot be replayed.
        if not (isinstance(record, Step) and record.coefficients is None):
            history.change(record)


def _diff(left: str, right: str) -> int:
    found = list(differences(_read(left), _read(right)))
    print("\n".join(found) or "the same")
    return int(bool(found))


def _merge(left: str, right: str, out: str) -> int:
    made = Path(out)
    if made.exists():
        raise ValueError(f"--out {out}: exists. Give another name.")
    log = longer(_read(left), _read(right))
    with atomic_write(made) as temporary:
        temporary.write_bytes(Path(log.path).read_bytes()[: log.ends[-1]])
    print(f"{made}: the {log.num_steps} steps of {log.path}; the other log is the beginning of it")
    return 0


def _read(path: str) -> Log:
    log = read_log(path)
    log.warn_if_torn()
    return log


if __name__ == "__main__":
    sys.exit(main())
