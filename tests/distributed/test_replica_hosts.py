"""Replicas on two hosts, with two ranks each, over a link that breaks and comes back."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.command_line import prompted_options, write_inputs
from tests.distributed.hosts import Hosts, hosts
from tests.distributed.ranks import LIMIT, REPOSITORY, master_port, run_command
from zods.trajectory.log import read_log
from zods.trajectory.records import Step

STEPS = 120
SILENCE = 3.0  # seconds
CONFIG: dict[str, Any] = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 3},
    "zeroth_order": {
        "lr": 1e-3,
        "num_directions": 2,
        "evaluation": "stacked",
        "replicas": {"silence_timeout": SILENCE, "leader_timeout": LIMIT},
    },
}


class Replica:
    """The run of a replica on a host. output: what it has printed."""

    def __init__(self, two: Hosts, folder: Path, index: int) -> None:
        self._folder = folder / str(index)
        command = ["bash", "launch/deepspeed.sh", "--num_gpus", "2", "--"]
        command += prompted_options(
            folder,
            self._folder,
            max_steps=STEPS,
            held_out=4,
            save_model=True,
            replica=index,
            replica_store="node1:29900",
        )
        self._path = folder / f"{index}.out"
        with self._path.open("w") as output:
            self.process = two.popen(index + 1, command, output, ZODS_INTERFACE="eth0")

    @property
    def output(self) -> str:
        return self._path.read_text()

    def waits_for(self, text: str) -> None:
        deadline = time.monotonic() + LIMIT
        while text not in self.output:
            assert self.process.poll() is None, self.output[-4000:]
            assert time.monotonic() < deadline, self.output[-4000:]
            time.sleep(0.1)

    def has_made(self, steps: int) -> None:
        """Wait until it has made so many steps."""
        metrics = self._folder / "metrics.jsonl"
        deadline = time.monotonic() + LIMIT
        while not metrics.exists() or metrics.read_text().count('"train"') < steps:
            assert self.process.poll() is None, self.output[-4000:]
            assert time.monotonic() < deadline, self.output[-4000:]
            time.sleep(0.1)

    def ends(self) -> None:
        assert self.process.wait(LIMIT) == 0, self.output[-4000:]

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


def losses(folder: Path) -> list[float | None]:
    log = read_log(folder / "trajectory.log")
    return [record.loss for record in log.records if isinstance(record, Step)]


def test_replicas_on_two_hosts_survive_a_link_that_breaks_and_exchange_scalars_only(tmp_path):
    write_inputs(tmp_path, CONFIG)
    with hosts(2, tmp_path / "shared") as two:
        leader = Replica(two, tmp_path, 0)
        follower = Replica(two, tmp_path, 1)
        try:
            leader.waits_for("replica 1 (2 ranks) takes part from step")
            follower.has_made(5)
            two.cut_off(2)
            follower.waits_for("waiting up to")
            leader.waits_for("it is left out")
            two.connect(2)
            leader.ends()
            follower.ends()
            received, sent = two.traffic(2)
        finally:
            leader.kill()
            follower.kill()
    joined = [int(step) for step in re.findall(r"takes part from step (\d+)", leader.output)]
    assert len(joined) == 2, "it came back"
    models = [(tmp_path / str(k) / "model" / "model.safetensors").read_bytes() for k in range(2)]
    assert models[0] == models[1]
    # one step: two messages of at most 400 bytes, each with headers, acknowledgments and a beat;
    # the log and the model's size are not part of it
    assert 0 < sent < 1500 * STEPS
    assert 0 < received < 1500 * STEPS + 600 * STEPS

    compared = joined[0] + 5
    alone = {key: value for key, value in CONFIG["zeroth_order"].items() if key != "replicas"}
    (tmp_path / "alone.json").write_text(json.dumps({**CONFIG, "zeroth_order": alone}))
    with master_port() as port:
        command = ["bash", str(REPOSITORY / "launch" / "torchrun.sh"), "--nproc_per_node", "4"]
        command += ["--master_port", str(port), "--"]
        command += prompted_options(
            tmp_path,
            tmp_path / "alone",
            max_steps=compared,
            held_out=4,
            deepspeed_config=tmp_path / "alone.json",
        )
        code, output = run_command(command, REPOSITORY)
    assert code == 0, output[-4000:]
    of_four, of_replicas = losses(tmp_path / "alone"), losses(tmp_path / "0")
    assert len(of_four) == compared
    np.testing.assert_allclose(of_four, of_replicas[:compared], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_traffic_of_a_host_is_counted(number, tmp_path):
    with hosts(2, tmp_path / "shared") as two:
        before = two.traffic(number)
        assert two.run(1, ["ssh", "node2", "head -c 100000 /dev/zero"])[0] == 0
        after = two.traffic(number)
    received, sent = (b - a for a, b in zip(before, after, strict=True))
    assert max(received, sent) > 100_000
    assert min(received, sent) < 50_000
