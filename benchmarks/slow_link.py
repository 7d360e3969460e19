"""Measure a step of replicas over a slow link, beside first-order data parallel over the same link.

    python benchmarks/slow_link.py [--hosts 2 4] [--layers 12] [--json FILE] [--markdown FILE]

Hosts are network namespaces on this machine, with a rank each, which needs root. A switch in user
space joins them: it delivers a frame after --delay milliseconds and lets --rate megabits per second
pass in each direction. The model has the shape of OPT-125M with random weights, in fp32.

Training is one of

replicas   a MeZO step of zods, each host a replica; with a direction per example, or one for all
ddp        a step of AdamW under torch's DistributedDataParallel

Prints one JSON object with a row per number of hosts, link and training: the median time of a step
on the first host (`step_s`), the bytes that cross its link in a step (`sent`, `received`, headers
included), and the difference of the time from that without delay in one-way delays (`delays`).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import heapq
import json
import multiprocessing
import os
import select
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import (
    Report,
    add_report_options,
    add_smoke_option,
    examples_of,
    opt_125m,
    report_head,
    single_rank_engine,
    tiny_opt,
    token_batch,
)

from tests.distributed.hosts import Hosts, lacking

TRAININGS: dict[str, dict[str, Any]] = {
    "replicas, E=1": {"examples_per_direction": 1, "normalize": True, "lr": 1e-5},
    "replicas, E=all": {"examples_per_direction": "all", "lr": 1e-6},
    "ddp": {},
}
BATCH, LENGTH = 8, 64  # of all hosts together
TUNSETIFF, IFF_TAP, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x2, 0x1000, 0x40000000
COLUMNS = ("hosts", "training", "delay_ms", "rate_mbit", "step_s", "delays", "sent", "received")


class SlowHosts(Hosts):
    """Hosts joined by a switch with a delay in seconds and a rate in bytes per second."""

    def __init__(self, count: int, folder: Path, delay: float, rate: float) -> None:
        super().__init__(count, folder)
        self._delay, self._rate = delay, rate

    def _join(self) -> None:
        taps: list[int] = []
        # a thread of its own, because it changes its network namespace
        thread = threading.Thread(target=self._open_taps, args=(taps,))
        thread.start()
        thread.join()
        self._switch = multiprocessing.get_context("fork").Process(
            target=switch, args=(taps, self._delay, self._rate), daemon=True
        )
        self._switch.start()

    def _open_taps(self, taps: list[int]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for k in range(len(self.names)):
            with open(f"/run/netns/{self._namespace(k + 1)}") as namespace:
                if libc.setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH", b"eth0", IFF_TAP | IFF_NO_PI))
            taps.append(tap)

    def close(self) -> None:
        super().close()
        self._switch.terminate()
        self._switch.join()


def switch(taps: Sequence[int], delay: float, rate: float) -> None:
    """Pass frames between the taps, for ever."""
    free = [0.0] * len(taps)  # when the sender's link is free again
    known: dict[bytes, int] = {}  # the tap of a hardware address
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, tap, frame = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # the host's end is down
                os.write(taps[tap], frame)
        left = max(waiting[0][0] - now, 0) if waiting else 1.0
        for readable in select.select(taps, [], [], left)[0]:
            frame = os.read(readable, 65536)
            source = taps.index(readable)
            known[frame[6:12]] = source
            free[source] = max(time.monotonic(), free[source]) + len(frame) / rate
            targets = [known[frame[:6]]] if frame[:6] in known else range(len(taps))
            for target in targets:
                if target != source:
                    number += 1
                    heapq.heappush(waiting, (free[source] + delay, number, target, frame))


# --- on a host ------------------------------------------------------------------------------------


def work(arguments: argparse.Namespace) -> None:
    """Train on one host, and write the times of the steps."""
    import torch

    torch.set_num_threads(1)
    index, count = arguments.work_on, arguments.hosts[0]
    model = tiny_opt() if arguments.smoke else opt_125m(arguments.layers)
    make = ddp if arguments.training[0] == "ddp" else replicas
    step, close = make(model, index, count, arguments.training[0])
    for _ in range(1 if make is ddp else 3):
        step()
    (arguments.folder / f"ready{index}").touch()
    while not (arguments.folder / "go").exists():
        time.sleep(0.01)
    times = []
    for _ in range(arguments.steps):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    (arguments.folder / f"times{index}").write_text(json.dumps(times))
    while not (arguments.folder / "end").exists():
        time.sleep(0.01)
    close()


def replicas(
    model: Any, index: int, count: int, training: str
) -> tuple[Callable[[], Any], Callable[[], None]]:
    data = examples_of(token_batch(64 * BATCH, LENGTH))
    engine = single_rank_engine(
        model,
        {
            "direction": "low_rank",
            "evaluation": "stacked",
            **TRAININGS[training],
            "replicas": {"store": "node1:29900", "index": index},
        },
        data,
        train_batch_size=BATCH,
    )
    engine.resume(Path(tempfile.mkdtemp()))
    while index == 0 and len(engine.replicas.members) < count:
        engine.train_batch()
    return engine.train_batch, engine.close


def ddp(
    model: Any, index: int, count: int, training: str
) -> tuple[Callable[[], Any], Callable[[], None]]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method="tcp://node1:29901", rank=index, world_size=count)
    parallel = torch.nn.parallel.DistributedDataParallel(model.train())
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-5)
    rows = token_batch(BATCH // count, LENGTH)

    def step() -> None:
        parallel(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, dist.destroy_process_group


# --- on this machine ------------------------------------------------------------------------------


def measured(
    arguments: argparse.Namespace, count: int, training: str, delay: float, rate: float
) -> dict[str, Any]:
    """Run a training on so many hosts. delay: in milliseconds. rate: in megabits per second."""
    steps = 2 if training == "ddp" else arguments.steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hosts = SlowHosts(count, folder / "shared", delay / 1000, rate * 1e6 / 8)
        try:
            hosts.start()
            command = [sys.executable, __file__, "--layers", str(arguments.layers)]
            command += ["--hosts", str(count), "--training", training, "--steps", str(steps)]
            command += ["--folder", name, *(["--smoke"] if arguments.smoke else [])]
            processes = [
                hosts.popen(
                    k + 1,
                    [*command, "--work_on", str(k)],
                    (folder / f"output{k}").open("w"),
                    GLOO_SOCKET_IFNAME="eth0",
                )
                for k in range(count)
            ]

            def all_have(what: str) -> None:
                while not all((folder / f"{what}{k}").exists() for k in range(count)):
                    for k, process in enumerate(processes):
                        if process.poll() is not None:
                            raise SystemExit((folder / f"output{k}").read_text()[-3000:])
                    time.sleep(0.02)

            all_have("ready")
            before = hosts.traffic(1)
            (folder / "go").touch()
            all_have("times")
            after = hosts.traffic(1)
            (folder / "end").touch()
            for process in processes:
                process.wait()
            times = json.loads((folder / "times0").read_text())
        finally:
            hosts.close()
    received, sent = ((b - a) / steps for a, b in zip(before, after, strict=True))
    return {
        "hosts": count,
        "training": training,
        "delay_ms": delay,
        "rate_mbit": rate,
        "steps": steps,
        "step_s": round(statistics.median(times), 4),
        "sent": round(sent),
        "received": round(received),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--training", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of replicas")
    parser.add_argument("--delay", type=float, default=50.0, help="one way, in milliseconds")
    parser.add_argument("--rate", type=float, default=100.0, help="in megabits per second")
    parser.add_argument("--work_on", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    add_report_options(parser)
    add_smoke_option(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.work_on is not None:
        work(arguments)
        return
    if arguments.smoke:
        arguments.hosts, arguments.steps, arguments.training = [2], 2, ["replicas, E=1"]
    report = Report(
        report_head("slow_link", arguments), arguments.json, key="run", passed=lambda row: True
    )
    reason = lacking()
    if reason is not None:
        print(f"nothing is measured: {reason}", file=sys.stderr)
        report.print_and_exit()
    links = [(0.0, 10_000.0), (arguments.delay, arguments.rate)]
    for count in arguments.hosts:
        for training in arguments.training:
            without: float | None = None
            for delay, rate in links:
                name = f"{count} hosts, {training}, {delay:g} ms, {rate:g} Mbit/s"
                row = report.done(name)
                if row is None:
                    row = {"run": name, **measured(arguments, count, training, delay, rate)}
                without = row["step_s"] if without is None else without
                added = row["step_s"] - without
                row["delays"] = round(added / (delay / 1000), 2) if delay else 0.0
                report.add(row)
                print(row, file=sys.stderr, flush=True)
    if arguments.markdown is not None:
        text = "fp32, a batch of 8 sequences of 64 tokens over all hosts, one core each where there are enough"
        arguments.markdown.write_text(report.markdown("Replicas over a slow link", text, COLUMNS))
    report.print_and_exit()


if __name__ == "__main__":
    main()
