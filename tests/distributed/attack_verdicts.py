"""What the runs of `benchmarks/attack.py` have left, and the verdicts on them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Attack:
    """An attack, which `strike` makes in a folder, with a seed.

    quick: whether it is part of --quick. is_root: whether it needs root.
    """

    name: str
    strike: Callable[[Path, int], Verdict]
    quick: bool = False
    is_root: bool = False


@dataclass(frozen=True)
class Verdict:
    """How an attack ended.

    silent: differences from the undisturbed run that nobody was told. traceback: tracebacks in the
    output. failure: another expectation that was not met, or "". details: what helps to find the
    reason.
    """

    outcome: str
    silent: int = 0
    traceback: int = 0
    failure: str = ""
    details: str = ""

    def row(self) -> dict[str, Any]:
        """The row of the report, without the attack's name."""
        return {
            "outcome": f"FAILED: {self.failure}" if self.failure else self.outcome,
            "silent": self.silent,
            "traceback": self.traceback,
            "passed": not (self.silent or self.traceback or self.failure),
            **({"details": self.details} if self.details else {}),
        }


@dataclass(frozen=True)
class Ended:
    """A start that has ended.

    codes: exit codes of the ranks, or of the `deepspeed` command. hung: whether it had to be killed
    when it had taken LIMIT seconds.
    """

    codes: tuple[int, ...]
    output: str
    seconds: float
    hung: bool = False

    @property
    def succeeded(self) -> bool:
        return not self.hung and not any(self.codes)


def failed(failure: str, output: str) -> Verdict:
    """The verdict on an attack after which an expectation was not met."""
    return Verdict("", 0, tracebacks(output), failure, _excerpt(output))


def compare(folder: Path, expected: Path, what: str, output: str) -> Verdict:
    """The verdict on a finished run that has to be as the undisturbed one."""
    found, seen = differences(folder, expected), tracebacks(output)
    details = _excerpt(output) if seen else ""
    if not found:
        return Verdict(f"{what}: as undisturbed", 0, seen, details=details)
    details = f"{first_difference(folder, expected)}\n{details}"
    return Verdict(f"{what}: SILENT, other {', '.join(found)}", 1, seen, details=details)


def judged(
    ended: Ended, folder: Path, expected: Path, *, told: str = "", must_differ: bool = False
) -> Verdict:
    """The verdict on a start that may refuse its input, or finish as the undisturbed run.

    told: a pattern in the output that announces another result. must_differ: the result of the
    undisturbed run would show that a change was ignored.
    """
    seen, said = tracebacks(ended.output), message(ended.output)
    details = _excerpt(ended.output)
    if ended.hung:
        return Verdict("", 0, seen, "hangs", details)
    if not ended.succeeded:
        failure = "" if said else f"ended with {ended.codes} without a message"
        return Verdict(f"refused: {said}", 0, seen, failure, details if seen or failure else "")
    if not is_finished(folder):
        silent = int("stopped after step" not in ended.output)
        outcome = "SILENT: exit code 0, and the run is lost" if silent else "stopped, said"
        return Verdict(outcome, silent, seen, details=details)
    found = differences(folder, expected)
    if not found and must_differ:
        return Verdict("SILENT: goes on, and ignores the change", 1, seen, details=details)
    if not found:
        return Verdict("as undisturbed", 0, seen, details=details if seen else "")
    if told and re.search(told, ended.output):
        return Verdict(f"goes on, said; other {', '.join(found)}", 0, seen)
    details = f"{first_difference(folder, expected)}\n{details}"
    return Verdict(f"SILENT: exit code 0, other {', '.join(found)}", 1, seen, details=details)


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict for several starts."""
    return Verdict(
        "; ".join(verdict.outcome for verdict in verdicts if verdict.outcome),
        sum(verdict.silent for verdict in verdicts),
        sum(verdict.traceback for verdict in verdicts),
        "; ".join(verdict.failure for verdict in verdicts if verdict.failure),
        "\n".join(verdict.details for verdict in verdicts if verdict.details),
    )


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, without an incomplete last line."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def is_finished(folder: Path) -> bool:
    return any(record["kind"] == "summary" for record in metrics_of(folder))


def compared(record: dict[str, Any]) -> dict[str, Any]:
    """What is the same in two runs with the same bits: no times, sizes and counts of bytes."""
    if record["kind"] == "train":
        return {key: record[key] for key in ("kind", "step", "loss", "lr", "skipped")}
    kept = ("kind", "step", "steps")
    return {
        key: value
        for key, value in record.items()
        if record["kind"] == "eval" or key in kept or key.endswith(("_before", "_after"))
    }


def differences(folder: Path, expected: Path) -> list[str]:
    """The parts of a finished run that differ from those of the undisturbed run."""
    found = []
    for weights in sorted((expected / "model").glob("*.safetensors")):
        other = folder / "model" / weights.name
        if not other.exists() or other.read_bytes() != weights.read_bytes():
            found.append("weights")
    log = "trajectory.log"
    if not (folder / log).exists() or (folder / log).read_bytes() != (expected / log).read_bytes():
        found.append("log")
    ours, theirs = (list(map(compared, metrics_of(of))) for of in (folder, expected))
    if ours != theirs:
        found.append("metrics")
    return found


def first_difference(folder: Path, expected: Path) -> str:
    """The first records of the metrics that differ, for the report on a failure."""
    ours, theirs = (list(map(compared, metrics_of(of))) for of in (folder, expected))
    for k in range(max(len(ours), len(theirs))):
        pair = [of[k] if k < len(of) else None for of in (ours, theirs)]
        if pair[0] != pair[1]:
            return f"metrics: {json.dumps(pair[0])} instead of {json.dumps(pair[1])}"
    return ""


TRACEBACK = "Traceback (most recent call last)"


def tracebacks(output: str) -> int:
    return output.count(TRACEBACK)


def _excerpt(output: str) -> str:
    """The first traceback of an output with its surroundings, and the end of the output."""
    at = output.find(TRACEBACK)
    around = f"{output[max(0, at - 500) : at + 4000]}\n...\n" if at >= 0 else ""
    return around + output[-6000:]


def message(output: str) -> str:
    """The line of an output that says why the run ended, or "".

    A rank that lost its connection says so after the rank that has the reason.
    """
    found = re.findall(r"^(?:zods\.\w+|deepspeed --module zods\.finetune): error: .*", output, re.M)
    return next((line for line in found if "closed by peer" not in line), (found or [""])[0])
