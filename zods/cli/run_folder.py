"""Write and read the folder of a run. Callers: `zods.finetune`, `zods.cli.plots` and `zods.report`.

config.json          the DeepSpeed JSON with "zeroth_order", every value resolved
run.json             command, options with their values, versions, git commit, seed, ranks, device
metrics.jsonl        one object per step ("train") and per evaluation ("eval", "in_context")
trajectory.log       the updates that were applied, step by step (see zods.trajectory)
initial/             the initial weights that the base model lacks (a new head or adapters), and
                     their configuration
checkpoints/, model/ and curves.png where they were asked for
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zods.files import atomic_write, check_regular, check_still_named, make_folder, sync
from zods.training.rank_agreement import code_in_use
from zods.trajectory.log import Trajectory, parse_log, read_log
from zods.trajectory.records import Step

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy")


class RunFolder:
    """The writer of a run's folder.

    Rank 0 writes; on other ranks the methods do nothing. A resumed run continues in its folder.
    """

    def __init__(self, path: str | Path, *, rank: int, resume: bool, has_log: bool = True) -> None:
        """has_log: whether the run keeps a log in the folder; a replica that follows does not.

        Raises ValueError where the folder holds another run and `resume` is False, or where the log
        of the run that is to be resumed is lost, or steps at its end are.
        """
        self.path = Path(path)
        self.rank = rank
        self._has_log = has_log
        self._metrics: Any = None
        if (
            rank == 0
            and not resume
            and any((self.path / name).exists() for name in ("metrics.jsonl", "trajectory.log"))
        ):
            raise ValueError(
                f"--output_dir {self.path}: holds another run. Give another folder, or --resume "
                "auto to go on with it."
            )
        if rank == 0 and resume and has_log:
            self._check_log()

    def _check_log(self) -> None:
        """Raise ValueError where metrics.jsonl has steps that the log has lost.

        A step's record is on the disk before its line of metrics is written, and lines are removed
        before the log is cut (`follow_cuts`).
        """
        metrics = self.path / "metrics.jsonl"
        if not metrics.exists():
            return
        # the metrics are read first: another run may be writing both
        steps = {r["step"] for r, _ in _readable_lines(metrics) if r["kind"] == "train"}
        logged, found = _logged_steps(self.path / "trajectory.log")
        lost = {step for step in steps if step > logged}
        # a damaged line of metrics may hold any number: one alone, after a gap, is left out
        if not lost or (logged and len(lost) == 1 and logged + 1 not in lost):
            return
        go_on = (
            f", or, to make the steps after {logged} again, remove metrics.jsonl" if logged else ""
        )
        raise ValueError(
            f"{self.path / 'trajectory.log'}: {found}, but metrics.jsonl beside it has {max(steps)} "
            "steps. The run cannot be resumed without the steps that its log has lost. Put the log "
            f"back from a copy, or start a new run in another --output_dir{go_on}."
        )

    def describe(
        self,
        config: dict[str, Any],
        *,
        arguments: dict[str, Any],
        seed: int,
        world_size: int,
        device: str,
        step: int,
        has_begun: bool,
    ) -> None:
        """Create the folder, write config.json and run.json, and open metrics.jsonl.

        Call it when all input has been checked.

        arguments: options and their values. They are kept because the command may name a file of
        options that is changed later.
        step: number of steps made so far. Lines of metrics.jsonl for later steps are removed,
        because these steps will be made again. has_begun: whether the weights have been changed; a
        refresh of the anchor may have changed them before the first step. Otherwise the first
        evaluation is made again, too. A line that was lost for an earlier step, as in a
        crash just after the step, is made again from the log, if the folder has it.
        """
        if self.rank != 0:
            return
        make_folder(self.path)
        self._open_metrics(step if has_begun else -1)
        about = {
            "command": sys.argv,
            "arguments": arguments,
            "seed": seed,
            "world_size": world_size,
            "device": device,
            "git_commit": _git_commit(),
            "versions": versions(),
            "image": os.environ.get("ZODS_IMAGE"),
            "lock": code_in_use().get("lock"),
        }
        for name, content in (("config.json", config), ("run.json", about)):
            with atomic_write(self.path / name) as temporary:
                temporary.write_text(json.dumps(content, indent=2) + "\n")

    def follow_cuts(self, trajectory: Trajectory) -> None:
        """Have the metrics of steps removed before these steps are cut from the log. Call it before
        the run is resumed.
        """
        trajectory.before_cut = self._remove_steps_after

    def _remove_steps_after(self, step: int) -> None:
        """Remove the lines of metrics.jsonl for steps after `step`; -1 removes all."""
        if self.rank != 0:
            return
        with contextlib.suppress(OSError):  # e.g. a full disk; the log has to be cut all the same
            self._open_metrics(step)

    def _open_metrics(self, step: int) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self._mend_metrics(step)
        # The file stays open as long as the run.
        self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def _mend_metrics(self, step: int) -> None:
        """Remove lines for steps after `step`, and write those that are missing up to it. A step of
        -1 removes all.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            with atomic_write(path) as temporary:  # which does not follow a link, as open() would
                temporary.touch()
            return
        kept = [
            record
            for record, line in _readable_lines(path)
            if line.endswith("\n") and record["step"] <= step and record["kind"] != "summary"
        ]
        # a damaged file may have a line twice
        kept = list({(record["step"], str(record["kind"])): record for record in kept}.values())
        present = {record["step"] for record in kept if record["kind"] == "train"}
        if len(present) < step and self._has_log:
            kept += [
                record
                for record in _from_log(self.path / "trajectory.log")
                if record["step"] not in present and record["step"] <= step
            ]
            kept.sort(key=lambda record: (record["step"], record["kind"] != "train"))
        with atomic_write(path) as temporary:
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")

    def evaluation_at(self, step: int, kind: str = "eval") -> dict[str, float]:
        """The held-out metrics after `step` steps; of kind "in_context", those with solved examples.

        Empty on ranks other than 0, and where there was no such evaluation.
        """
        if self.rank != 0:
            return {}
        found = next(
            (r for r in read_metrics(self.path) if r["kind"] == kind and r["step"] == step), {}
        )
        return {name: value for name, value in found.items() if name not in ("kind", "step")}

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl. kind: "train", "eval" or "in_context"."""
        if self._metrics is None:
            return
        try:
            check_still_named(self._metrics.fileno(), self.path / "metrics.jsonl")
            self._metrics.write(_line({"kind": kind, "step": step, **values}))
            self._metrics.flush()
            if kind != "train":  # that of a step can be made again from the log
                sync(self._metrics.fileno())
        except FileNotFoundError:  # the file was removed
            raise
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.path / 'metrics.jsonl'}: cannot be written ({error.strerror}). What the "
                "trajectory log holds is safe. Free some disk space, and start again with the "
                "same command",
            ) from None


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _logged_steps(log: Path) -> tuple[int, str]:
    """The number of steps in a log, a torn one included, and what was found there; 0 where it has no
    whole line.
    """
    check_regular(log)
    data = log.read_bytes() if log.exists() else None
    if not data:
        return 0, "missing" if data is None else "empty"
    if b"\n" not in data:
        return 0, f"{len(data)} bytes without a whole line"
    whole = parse_log(data, log)
    if (run := whole.run_at_end()) is not None and run.optimizer is not None and whole.num_steps:
        # Of first-order training, the checkpoint that is loaded says where the log goes on.
        return sys.maxsize, ""
    # A torn record may be that of a step, which is made again with the same bits.
    return whole.num_steps + bool(whole.torn), f"{whole.num_steps} steps"


def _from_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the metrics of each step in a log. What only the step itself could measure is None."""
    for record in read_log(path).records:
        if isinstance(record, Step):
            yield {
                "kind": "train",
                "step": record.step + 1,
                "loss": record.loss,
                "projected_grad": None,
                "lr": record.lr,
                "seconds": None,
                "scalar_bytes": None,
                "skipped": record.skipped,
                **record.measured,
            }


def _readable_lines(metrics: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (record, line) of each line that a crash did not cut."""
    check_regular(metrics)
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if _is_record(record):
                yield record, line


def _is_record(value: Any) -> bool:
    """Whether a line's value has a kind, and a number of steps that is possible."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("kind"), str)
        and type(value.get("step")) is int
        and (value["kind"] == "train") <= value["step"] < 2**53
    )


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a run folder's metrics.jsonl.

    A last line without its newline is left out: the run may be writing it, or a crash has cut it.
    Raises OSError, or ValueError with the line that is no record.
    """
    metrics = Path(path) / "metrics.jsonl"
    check_regular(metrics)
    with open(metrics, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                if not _is_record(record):
                    raise ValueError("no object with a kind and a number of steps")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{metrics}, line {number}: no record: {error}") from error
            yield record


def versions() -> dict[str, str]:
    """The versions of Python, of the dependencies of zods and of the platform."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "platform": platform.platform(), **found}


def _git_commit() -> str | None:
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
