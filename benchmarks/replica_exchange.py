"""Measure the exchange of a step between replicas, for up to 128 replicas.

    python benchmarks/replica_exchange.py [--replicas 2 16 128] [--json FILE]

The leader and the others are threads of this process, joined by TCP on the loopback interface; no
model is evaluated. An exchange is a step's sums of 16 directions from each follower to the leader,
their total back to each, and the notice that the step's record is on the disk. Prints one JSON object
with a row per number of replicas: the median time of an exchange (`exchange_s`; the threads share
one interpreter, so it is an upper bound), and the bytes that the leader and a follower send in it,
without the headers of TCP and IP.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time

from common import Report, add_report_options, add_smoke_option, free_port, report_head

from zods.config.schema import ReplicasConfig
from zods.training.replica_follower import Follower, Lost
from zods.training.replica_leader import Leader
from zods.training.replica_messages import Sums
from zods.trajectory.log import START, chained

DIRECTIONS = 16
VALUES = [0.5] * (DIRECTIONS + 5)
TOKEN = b"of this benchmark alone"
COLUMNS = ("replicas", "exchange_s", "leader_sends", "follower_sends")


def record(step: int) -> str:
    return f'{{"step":{step},"loss":0.5}}'


def follow(follower: Follower) -> None:
    """Join, and take part until the leader ends."""
    step, head, number = 0, START, 0
    while "members" not in (answer := follower.next_event(step, number, head)):
        head, number = chained(head, answer["record"]), number + 1
        step += 1
    while True:
        after = chained(head, record(step))
        try:
            follower.sum(Sums(str(step), head, False, VALUES))
            assert follower.next_record(number, after) is None
        except Lost:
            return
        step, number, head = step + 1, number + 1, after


def measured(replicas: int, steps: int) -> dict:
    """Make some steps with so many replicas."""
    store = f"127.0.0.1:{free_port()}"
    leader = Leader(ReplicasConfig(store=store), TOKEN, 1)
    leader.publish_log([])
    followers = [
        Follower(ReplicasConfig(store=store, index=k), TOKEN, 1) for k in range(1, replicas)
    ]
    for follower in followers:
        threading.Thread(target=follow, args=(follower,), daemon=True).start()
    all_there, head, step = False, START, 0
    times: list[float] = []
    before = leader_before = 0
    while len(times) < steps:
        if not all_there and len(leader.members) == replicas:
            all_there, before = True, followers[0].sent_bytes
            leader_before = leader.sent_bytes
        began = time.perf_counter()
        leader.sum(Sums(str(step), head, False, VALUES), rows=replicas)
        head = chained(head, record(step))
        leader.publish(record(step))
        if all_there:
            times.append(time.perf_counter() - began)
        else:
            time.sleep(0.05)
        step += 1
    sent, leader_sent = followers[0].sent_bytes - before, leader.sent_bytes - leader_before
    for follower in followers:
        follower.close()
    leader.close()
    return {
        "replicas": replicas,
        "exchange_s": round(statistics.median(times), 5),
        "leader_sends": round(leader_sent / steps),
        "follower_sends": round(sent / steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--steps", type=int, default=100)
    add_report_options(parser)
    add_smoke_option(parser)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.replicas, arguments.steps = [3], 2
    report = Report(
        report_head("replica_exchange"), arguments.json, key="replicas", passed=lambda row: True
    )
    for replicas in arguments.replicas:
        report.add(report.done(replicas) or measured(replicas, arguments.steps))
    if arguments.markdown is not None:
        text = "the exchange of a step with 16 directions, bytes without headers"
        arguments.markdown.write_text(report.markdown("Replicas: messages", text, COLUMNS))
    report.print_and_exit()


if __name__ == "__main__":
    main()
