"""Ranks and replicas whose clocks differ by hours, as those of hosts may.

Of the second process, the date is shifted by a preloaded library, and the monotonic clock, which on
a host starts with the host, by a time namespace.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.command_line import LAUNCHED, launched_options, outcome, write_inputs
from tests.distributed.ranks import (
    LIMIT,
    REPOSITORY,
    environment_of_ranks,
    free_port,
    master_port,
)

HOURS = 3600.0
LATER = 9 * HOURS  # the date
LONGER = 30 * HOURS  # since the host's start
SOURCE = Path(__file__).parent / "scripts" / "shifted_date.c"
pytestmark = pytest.mark.slow


class Elsewhere:
    """A host with other clocks. prefix: of a command there. variables: its environment."""

    def __init__(self, library: Path) -> None:
        clocks = (f"--{clock}={LONGER:.0f}" for clock in ("monotonic", "boottime"))
        self.prefix = ["unshare", "--time", *clocks, "--fork", "--kill-child"]
        self.variables = {"LD_PRELOAD": str(library), "CLOCK_SHIFT": f"{LATER:.0f}"}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    library = tmp_path_factory.mktemp("clock") / "date.so"
    compiler = os.environ.get("CC") or shutil.which("gcc") or "cc"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    made = Elsewhere(library)
    probe = subprocess.run([*made.prefix, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no time namespaces here: {probe.stderr.strip()}")
    return made


def clocks(prefix: Sequence[str] = (), **variables: str) -> tuple[float, float]:
    """(date, monotonic clock) in seconds, as Python sees them."""
    code = "import time; print(time.time(), time.monotonic())"
    command = [*prefix, sys.executable, "-c", code]
    said = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=True
    ).stdout
    date, monotonic = map(float, said.split())
    return date, monotonic


def test_the_second_process_has_other_clocks(elsewhere):
    date, monotonic = clocks()
    other_date, other_monotonic = clocks(elsewhere.prefix, **elsewhere.variables)
    assert other_date - date == pytest.approx(LATER, abs=60)
    assert other_monotonic - monotonic == pytest.approx(LONGER, abs=60)


class Run:
    """A process of zods.finetune. output: what it has printed."""

    def __init__(self, output: Path, prefix: list[str], options: list[str], **variables: str):
        command = [*prefix, sys.executable, "-m", "zods.finetune", *options]
        self._path = output
        with output.open("w") as said:
            self._process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment_of_ranks(**variables),
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._path.read_text()

    def waits_for(self, text: str) -> None:
        deadline = time.monotonic() + LIMIT
        while text not in self.output:
            assert self._process.poll() is None, self.output[-4000:]
            assert time.monotonic() < deadline, self.output[-4000:]
            time.sleep(0.1)

    def ends(self) -> None:
        assert self._process.wait(LIMIT) == 0, self.output[-4000:]

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    """The runs of a test, which are killed at its end."""
    started: list[Run] = []
    yield started
    for run in started:
        run.kill()


def two_ranks(folder: Path, output: str, runs: list[Run], second: Elsewhere | None) -> Any:
    """What two ranks end with. second: the host of rank 1, if its clocks are others."""
    with master_port() as port:
        of_all = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        for rank in range(2):
            host = second if rank else None
            variables = {**of_all, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": "2"}
            run = Run(
                folder / f"{output}{rank}.out",
                [] if host is None else host.prefix,
                launched_options(folder, output),
                **{**variables, **({} if host is None else host.variables)},
            )
            runs.append(run)
        for run in runs:
            run.ends()
    return outcome(folder / output)


def test_ranks_whose_clocks_differ_by_hours_end_with_the_same_bits(elsewhere, runs, tmp_path):
    section = {**LAUNCHED["zeroth_order"], "hang_timeout": 60.0}
    write_inputs(tmp_path, {**LAUNCHED, "zeroth_order": section})
    same_clocks = two_ranks(tmp_path, "same", runs, None)
    assert two_ranks(tmp_path, "other", runs, elsewhere) == same_clocks
    assert not any("hang" in run.output for run in runs)


def test_a_replica_whose_clocks_differ_by_hours_takes_part_to_the_end(elsewhere, runs, tmp_path):
    replicas = {"silence_timeout": 20.0, "leader_timeout": 20.0}
    section = {**LAUNCHED["zeroth_order"], "num_directions": 2, "replicas": replicas}
    write_inputs(tmp_path, {**LAUNCHED, "zeroth_order": section})
    store = f"127.0.0.1:{free_port()}"
    for index, prefix in enumerate(([], elsewhere.prefix)):
        options = launched_options(
            tmp_path, str(index), max_steps=400, replica=index, replica_store=store
        )
        variables = elsewhere.variables if index else {}
        runs.append(Run(tmp_path / f"{index}.out", prefix, options, **variables))
    leader, follower = runs
    leader.waits_for("replica 1 (1 ranks) takes part from step")
    for run in (leader, follower):
        run.ends()
    assert leader.output.count("takes part from step") == 1
    assert "left out" not in leader.output
    models = [
        (tmp_path / str(index) / "model" / "model.safetensors").read_bytes() for index in range(2)
    ]
    assert models[0] == models[1]
