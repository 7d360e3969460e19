"""Measure the exchange of a step between replicas: its time, its bytes, and the leader's processor.

    python benchmarks/replica_exchange.py [--replicas 2 16 128] [--json FILE]

No model is evaluated. An exchange is a step's sums from each follower to the leader, their total back
to each, and the notice that the step's record is on the disk. Prints one JSON object with rows of two
kinds:

- Two replicas of 1 and of 2 ranks, with DIRECTIONS_OF_WORLDS: each rank is a process, with gloo inside
  a replica. This is what a step of training exchanges.
- `--replicas` of them, with DIRECTIONS: the leader is in this process, and the others are threads of
  others, joined by TCP on the loopback interface.

Keys: the median time of an exchange made at once after the one before (`exchange_s`; the followers
share this machine, so it is an upper bound), the bytes that the leader and a follower send to other
replicas in it as zods counts them (`leader_sends`, `follower_sends`), and what the kernel counts on the
leader's connections to replicas (`socket_sent`, ...): bytes without the headers of TCP and IP, and
packets with data. `inside_sent`: bytes that the leader's rank 0 sends to its own replica's ranks.
`leader_cpu_s`: the processor time of the leader's process per exchange when one is made each second,
beats included; `replicas_at_5_percent`: so many replicas would take 5% of one processor in such steps,
in proportion.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from common import Report, add_report_options, add_smoke_option, free_port, report_head
from socket_counters import counted

from zods.comm.authenticated import TAG_BYTES, TOKEN_VARIABLE
from zods.comm.communicator import Communicator
from zods.config.replicas_section import ReplicasConfig
from zods.training import replica_messages as messages
from zods.training.loss_exchange import LossExchange
from zods.training.replica_follower import Follower, Lost
from zods.training.replica_leader import Leader
from zods.training.replica_messages import Sums
from zods.training.replicas import Replicas
from zods.training.step_points import StepSums
from zods.trajectory.log import START, chained, text_of
from zods.trajectory.records import Step

DIRECTIONS, DIRECTIONS_OF_WORLDS = 16, (1, 2)
SUM = 0.7071  # of losses; of no number of replicas is the total whole, which would take fewer bytes
VALUES = [SUM] * (DIRECTIONS + 2) + [8.0, 1.0, 8.0]  # as `LossExchange` sends them
TOKEN = "of this benchmark alone"
FRAME_BYTES = 1 + TAG_BYTES  # the length of a short message and its HMAC
OF_ONE_PROCESS = 32  # followers: they share its interpreter
BATCH, RANKS_OF_WORLDS = 16, (1, 2)
WARM_UP = 5
COLUMNS = (
    *("run", "exchange_s", "leader_sends", "follower_sends", "socket_sent", "socket_received"),
    *("packets_sent", "packets_received", "inside_sent", "leader_cpu_s", "replicas_at_5_percent"),
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

    Beats are sent by the second and do not count.
    """
    answer = Sums("0", START, False, VALUES).pack(messages.ANSWER)
    notice = messages.pack_notice(0, START, "")
    return (replicas - 1) * (2 * FRAME_BYTES + len(answer) + len(notice))


def run_followers(store: str, indices: range, steps: int, pipe: Connection) -> None:
    """Follow in threads until the leader ends. Sends the bytes that one of them sent per step."""
    followers = [Follower(config_of(store, k), TOKEN.encode(), 1) for k in indices]
    threads = [threading.Thread(target=follow, args=(of,), daemon=True) for of in followers]
    for thread in threads:
        thread.start()
    pipe.recv()  # all take part
    before = followers[0].sent_bytes
    pipe.send(None)
    pipe.recv()  # the steps are made
    pipe.send(round((followers[0].sent_bytes - before) / steps))
    pipe.recv()  # the leader ends
    for follower in followers:
        follower.close()


def config_of(store: str, replica: int) -> ReplicasConfig:
    """Nobody is left out because this machine is too slow for all of them."""
    return ReplicasConfig(store=store, index=replica, silence_timeout=600.0, leader_timeout=600.0)


def measured(replicas: int, steps: int, seconds: int) -> dict[str, Any]:
    """Make some steps with so many replicas, and then one in each of so many seconds."""
    store = f"127.0.0.1:{free_port()}"
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for first in range(1, replicas, OF_ONE_PROCESS):
        pipe, of_followers = context.Pipe()
        indices = range(first, min(first + OF_ONE_PROCESS, replicas))
        arguments = (store, indices, steps, of_followers)
        process = context.Process(target=run_followers, args=arguments, daemon=True)
        process.start()  # before the leader's threads and sockets are there
        pipes.append(pipe)
        processes.append(process)

    def tell_followers() -> None:
        for pipe in pipes:
            pipe.send(None)

    def answers_of_followers() -> list[Any]:
        return [pipe.recv() for pipe in pipes]

    leader = Leader(config_of(store, 0), TOKEN.encode(), 1)
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
    tell_followers()
    answers_of_followers()
    before, bytes_before = counted(), leader.sent_bytes
    times = [exchange() for _ in range(steps)]
    figures = counted().per_step(before, steps)
    sends = round((leader.sent_bytes - bytes_before) / steps)
    tell_followers()
    follower_sends = answers_of_followers()[0]
    cpu = time.process_time()
    for _ in range(seconds):
        time.sleep(max(0.0, 1.0 - exchange()))
    cpu = (time.process_time() - cpu) / seconds if seconds else 0.0
    if len(leader.members) != replicas:
        raise SystemExit(f"{replicas} replicas: {len(leader.members)} are left at the end")
    tell_followers()
    leader.close()
    for process in processes:
        process.join()
    return {
        "replicas": replicas,
        "directions": DIRECTIONS,
        "exchange_s": round(statistics.median(times), 5),
        "leader_sends": sends,
        "follower_sends": follower_sends,
        **figures,
        "leader_cpu_s": round(cpu, 5),
        "replicas_at_5_percent": 1 + round(0.05 * (replicas - 1) / cpu) if cpu else None,
    }


def rank_of_replica(
    replica: int, rank: int, ranks: int, directions: int, steps: int, store: str, pipe: Connection
) -> None:
    """Make steps as a rank of one of two replicas, and send a row's figures through the pipe."""
    torch.set_num_threads(1)
    address, folder = store.split(" ", 1)
    init = f"file://{folder}/{replica}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=ranks)
    comm = Communicator(torch.device("cpu"))
    replicas = Replicas(ReplicasConfig(store=address, index=replica), comm)
    exchange = LossExchange(
        comm,
        replicas,
        batch_size=BATCH,
        accumulation=1,
        examples_per_direction="all",
        in_order=True,
    )
    own = BATCH // (2 * ranks)
    sums = StepSums({0: [SUM] * directions}, SUM, own, SUM, 1, own)
    step, head, figures = 0, START, []
    port = int(address.rpartition(":")[2])
    if replicas.leads and rank == 0:
        replicas.publish_log([])
    while not replicas.leads and (made := replicas.to_catch_up(step, head)) is not None:
        step, head = made.step + 1, chained(head, text_of(made))
    together, should_stop = 0, False
    while not should_stop:
        began = time.perf_counter()
        together += len(replicas.members) == 2
        reduced = exchange.step_losses(
            sums,
            pairs=directions,
            step=step,
            head=head,
            rows=BATCH,
            asked=together > WARM_UP + steps,
            left_form=False,
        )
        made = Step(step, reduced.loss, 1e-6, (1.0,) * directions, (0, step))
        if not replicas.leads:
            replicas.next_record(made, head)
        elif rank == 0:
            replicas.publish(text_of(made))
        step, head, should_stop = step + 1, chained(head, text_of(made)), reduced.should_stop
        figures.append(
            (time.perf_counter() - began, replicas.sent_bytes, counted(port), counted(but=port))
        )
        if not together:
            time.sleep(0.05)  # the other has not joined yet
    times = [seconds for seconds, *_ in figures[-steps:]]
    (_, first, across, inside), (_, last, *now) = figures[-1 - steps], figures[-1]
    pipe.send(
        {
            "exchange_s": round(statistics.median(times), 5),
            "sends": round((last - first) / steps),
            "across": now[0].per_step(across, steps),
            "inside": now[1].per_step(inside, steps),
        }
    )
    replicas.close()
    dist.destroy_process_group()


def of_worlds(ranks: int, directions: int, steps: int) -> dict[str, Any]:
    """Make steps with two replicas, each of as many ranks, which are processes."""
    os.environ[TOKEN_VARIABLE] = TOKEN
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        store = f"127.0.0.1:{free_port()} {folder}"
        for replica, rank in [(replica, rank) for replica in range(2) for rank in range(ranks)]:
            receiver, sender = context.Pipe(duplex=False)
            arguments = (replica, rank, ranks, directions, steps, store, sender)
            process = context.Process(target=rank_of_replica, args=arguments, daemon=True)
            process.start()
            processes.append(process)
            sender.close()
            pipes.append(receiver)
        found = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    leader, follower = found[0], found[ranks]
    return {
        "replicas": 2,
        "ranks": ranks,
        "directions": directions,
        "exchange_s": leader["exchange_s"],
        "leader_sends": leader["sends"],
        "follower_sends": follower["sends"],
        **leader["across"],
        "inside_sent": leader["inside"]["socket_sent"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=20, help="with a step in each of them")
    add_report_options(parser)
    add_smoke_option(parser)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.replicas, arguments.steps, arguments.seconds = [3], 2, 1
    report = Report(
        report_head("replica_exchange"), arguments.json, key="run", passed=lambda row: True
    )
    worlds = [(ranks, number) for ranks in RANKS_OF_WORLDS for number in DIRECTIONS_OF_WORLDS]
    for ranks, number in worlds:
        name = f"2 replicas, each {ranks} ranks, {number} directions"
        row = report.done(name) or of_worlds(ranks, number, arguments.steps)
        report.add({**dict.fromkeys(COLUMNS, "-"), **row, "run": name})
    for replicas in arguments.replicas:
        name = f"{replicas} replicas, {DIRECTIONS} directions"
        row = report.done(name) or measured(replicas, arguments.steps, arguments.seconds)
        report.add({**dict.fromkeys(COLUMNS, "-"), **row, "run": name})
    if arguments.markdown is not None:
        text = "the exchange of a step, bytes without headers"
        arguments.markdown.write_text(report.markdown("Replicas: messages", text, COLUMNS))
    report.print_and_exit()


if __name__ == "__main__":
    main()
