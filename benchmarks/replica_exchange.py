"""Measure the exchange of a step between replicas, for up to 128 replicas.

    python benchmarks/replica_exchange.py [--replicas 2 16 128] [--json FILE]

The leader is in this process, and the others are threads of another, joined by TCP on the loopback
interface; no model is evaluated. An exchange is a step's sums of 16 directions from each follower to
the leader, their total back to each, and the notice that the step's record is on the disk. Prints one
JSON object with a row per number of replicas: the median time of an exchange (`exchange_s`; the
followers share one interpreter, so it is an upper bound), the bytes that the leader and a follower
send in it as zods counts them (`leader_sends`, `follower_sends`), and what the kernel counts on the
leader's connections: bytes without the headers of TCP and IP, and packets with data.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import threading
import time
from multiprocessing.connection import Connection

from common import Report, add_report_options, add_smoke_option, free_port, report_head
from socket_counters import counted

from zods.config.replicas_section import ReplicasConfig
from zods.training import replica_messages as messages
from zods.training.replica_follower import Follower, Lost
from zods.training.replica_leader import Leader
from zods.training.replica_messages import Sums
from zods.trajectory.log import START, chained

DIRECTIONS = 16
VALUES = [0.5] * (DIRECTIONS + 5)
TOKEN = b"of this benchmark alone"
FRAME_BYTES = 4 + 16  # the length of a message and its HMAC
COLUMNS = (
    *("replicas", "exchange_s", "leader_sends", "follower_sends", "socket_sent"),
    *("socket_received", "packets_sent", "packets_received"),
)


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


def leader_sends(replicas: int) -> int:
    """The bytes of the leader's two messages of a step, to each of the others.

    The step's number has two digits. Beats are sent by the second and do not count.
    """
    answer = Sums("10", START, False, VALUES).pack(messages.ANSWER)
    notice = messages.pack_notice(10, START, "")
    return (replicas - 1) * (2 * FRAME_BYTES + len(answer) + len(notice))


def run_followers(store: str, replicas: int, steps: int, pipe: Connection) -> None:
    """Follow in threads until the leader ends. Sends the bytes that one of them sent per step."""
    followers = [
        Follower(ReplicasConfig(store=store, index=k), TOKEN, 1) for k in range(1, replicas)
    ]
    threads = [threading.Thread(target=follow, args=(of,), daemon=True) for of in followers]
    for thread in threads:
        thread.start()
    pipe.recv()  # all take part
    before = followers[0].sent_bytes
    pipe.send(None)
    pipe.recv()  # the steps are made
    pipe.send(round((followers[0].sent_bytes - before) / steps))
    for follower in followers:
        follower.close()


def measured(replicas: int, steps: int) -> dict:
    """Make some steps with so many replicas."""
    store = f"127.0.0.1:{free_port()}"
    context = multiprocessing.get_context("fork")
    pipe, of_followers = context.Pipe()
    arguments = (store, replicas, steps, of_followers)
    process = context.Process(target=run_followers, args=arguments, daemon=True)
    process.start()  # before the leader's threads and sockets are there
    leader = Leader(ReplicasConfig(store=store), TOKEN, 1)
    leader.publish_log([])
    head, step = START, 0

    def exchange() -> float:
        nonlocal head, step
        began = time.perf_counter()
        leader.sum(Sums(str(step), head, False, VALUES), rows=replicas)
        head = chained(head, record(step))
        leader.publish(record(step))
        step += 1
        return time.perf_counter() - began

    while len(leader.members) < replicas:
        exchange()
        time.sleep(0.05)
    pipe.send(None)
    pipe.recv()
    before, bytes_before = counted(), leader.sent_bytes
    times = [exchange() for _ in range(steps)]
    figures = counted().per_step(before, steps)
    sends = round((leader.sent_bytes - bytes_before) / steps)
    pipe.send(None)
    follower_sends = pipe.recv()
    leader.close()
    process.join()
    return {
        "replicas": replicas,
        "exchange_s": round(statistics.median(times), 5),
        "leader_sends": sends,
        "follower_sends": follower_sends,
        **figures,
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
