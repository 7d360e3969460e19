"""The folder of a run: resolved config, versions, git commit and seed, metrics.jsonl, the trajectory log.

config.json          the DeepSpeed JSON with "zeroth_order", every value resolved
run.json             command, versions, git commit, seed, ranks, device
metrics.jsonl        one object per step ("train") and per evaluation ("eval")
trajectory.log       what was applied, step by step (see zods.trajectory)
checkpoints/, model/ and curves.png as asked for
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy")


class RunFolder:
    """Writes a run's folder; on other ranks than 0 it does nothing. A resumed run goes on in its folder."""

    def __init__(self, path: str | Path, *, rank: int, resume: bool) -> None:
        """Raises ValueError where the folder holds another run and `resume` is False."""
        self.path = Path(path)
        self.rank = rank
        self._metrics: Any = None
        if rank == 0 and not resume and (self.path / "metrics.jsonl").exists():
            raise ValueError(f"--output_dir {self.path}: holds another run. Give another folder, or --resume that run.")

    def describe(self, config: dict[str, Any], *, seed: int, world_size: int, device: str) -> None:
        """Make the folder, write config.json and run.json, and open metrics.jsonl: when all input has been checked."""
        if self.rank != 0:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        (self.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        about = {
            "command": sys.argv,
            "seed": seed,
            "world_size": world_size,
            "device": device,
            "git_commit": _git_commit(),
            "versions": versions(),
        }
        (self.path / "run.json").write_text(json.dumps(about, indent=2) + "\n")

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl; kind: "train" or "eval"."""
        if self._metrics is not None:
            self._metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._metrics.flush()


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a run folder's metrics.jsonl."""
    with open(Path(path) / "metrics.jsonl", encoding="utf-8") as file:
        yield from map(json.loads, file)


def versions() -> dict[str, str]:
    """Of Python, zods' own dependencies and the platform."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "platform": platform.platform(), **found}


def _git_commit() -> str | None:
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
