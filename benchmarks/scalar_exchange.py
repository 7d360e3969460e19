"""Measure what a step exchanges between 2 to 64 ranks, and between 2 to 64 replicas.

    python benchmarks/scalar_exchange.py [--numbers 2 16 64] [--json FILE] [--plot FILE]

Ranks are gloo processes of this host with the loss exchange of a training step and no model:
"ranks, one direction" with a direction for the whole batch, "ranks, per example" with one for each of
EXAMPLES examples. "replicas" are a leader in this process and followers in another, each of one rank.
All evaluate PAIRS pairs of points per direction. Prints one JSON object with a row per case and
number. Bytes are of one step and of the rank (or replica) that sends most: `sends` as zods counts
them, `formula` as they are predicted, `socket_sent` and `socket_received` as the kernel counts them
on that process's TCP connections, with gloo's headers and without those of TCP and IP. `exchange_s` is
the median time on this host, whose cores all processes share. Rows with `measured` false have the
formula alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Report, add_report_options, add_smoke_option, report_head
from replica_exchange import DIRECTIONS, leader_sends, measured
from socket_counters import counted

from zods.comm.communicator import Communicator
from zods.comm.rank_groups import receivers
from zods.training.loss_exchange import LossExchange
from zods.training.step_points import StepSums

PAIRS = DIRECTIONS
EXAMPLES = 128
FEW_PAIRS = 1  # with a direction per example
WARM_UP = 2
FAR = 10_000
FORMULAS = {
    "ranks, one direction": lambda n: 8 * (PAIRS + 6) * receivers(n),
    "ranks, per example": lambda n: 8 * (FEW_PAIRS * -(-max(EXAMPLES, n) // n) + 6) * (n - 1),
    "replicas": leader_sends,
}
COLUMNS = (
    *("case", "number", "measured", "sends", "formula", "socket_sent", "socket_received"),
    *("packets_sent", "exchange_s"),
)


def rank_of_steps(
    rank: int, ranks: int, case: str, steps: int, store: str, pipe: Connection
) -> None:
    """Make steps as one rank of a process group, and send a row's figures through the pipe."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    comm = Communicator(torch.device("cpu"))
    per_example = case == "ranks, per example"
    pairs = FEW_PAIRS if per_example else PAIRS
    batch_size = max(EXAMPLES, ranks)
    exchange = LossExchange(
        comm,
        None,
        batch_size=batch_size,
        accumulation=1,
        examples_per_direction=1 if per_example else "all",
        in_order=True,
    )
    own = [k for k in range(batch_size) if k * ranks // batch_size == rank] if per_example else [0]
    sums = StepSums({group: [0.5] * pairs for group in own}, 1.0, 1.0, 0.5, 1, 1)
    times = []
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            dist.barrier()
            before, bytes_before = counted(), comm.scalar_bytes
        began = time.perf_counter()
        exchange.step_losses(
            sums, pairs=pairs, step=step, head="", rows=batch_size, asked=False, left_form=False
        )
        times.append(time.perf_counter() - began)
    sends = (comm.scalar_bytes - bytes_before) // steps
    figures = counted().per_step(before, steps)
    dist.barrier()
    pipe.send(
        {"sends": sends, **figures, "exchange_s": round(statistics.median(times[WARM_UP:]), 5)}
    )
    dist.destroy_process_group()


def of_ranks(case: str, ranks: int, steps: int) -> dict[str, Any]:
    """The figures of the rank that sends most, on as many processes."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (rank, ranks, case, steps, str(Path(folder) / "store"), sender)
            process = context.Process(target=rank_of_steps, args=arguments, daemon=True)
            process.start()
            processes.append(process)
            sender.close()
            pipes.append(receiver)
        figures = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    return max(figures, key=lambda of_rank: of_rank["sends"])


def of_replicas(replicas: int, steps: int) -> dict[str, Any]:
    """The figures of the leader, which sends most."""
    row = measured(replicas, steps, 0)
    return {"sends": row.pop("leader_sends"), **row}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the bytes that are sent over the number of ranks or replicas."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    numbers = sorted({*range(2, 65), *(round(10 ** (k / 20)) for k in range(36, 81))})
    for k, (case, formula) in enumerate(FORMULAS.items()):
        axis.plot(numbers, [formula(n) for n in numbers], color=f"C{k}", label=f"{case}: formula")
        points = [row for row in rows if row["case"] == case and row["measured"]]
        for key, marker in (("sends", "o"), ("socket_sent", "x")):
            axis.plot(
                [row["number"] for row in points],
                [row[key] for row in points],
                marker,
                color=f"C{k}",
                label=f"{case}: {'counted by zods' if key == 'sends' else 'on its sockets'}",
            )
    axis.set(xscale="log", yscale="log", xlabel="ranks or replicas", ylabel="bytes sent per step")
    axis.set_title("by the rank that sends most; for replicas, the leader")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numbers", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--plot", type=Path, help="draw the rows there")
    add_report_options(parser)
    add_smoke_option(parser)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.numbers, arguments.steps = [2], 2
    report = Report(
        report_head("scalar_exchange"), arguments.json, key="name", passed=lambda row: True
    )
    for case, formula in FORMULAS.items():
        for number in [*arguments.numbers, FAR]:
            name = f"{case}, {number}"
            row = report.done(name)
            if row is None:
                head = {"name": name, "case": case, "number": number, "measured": number != FAR}
                row = {**dict.fromkeys(COLUMNS, "-"), **head, "formula": formula(number)}
                if number != FAR:
                    replicas = case == "replicas"
                    row |= (
                        of_replicas(number, arguments.steps)
                        if replicas
                        else of_ranks(case, number, arguments.steps)
                    )
            report.add(row)
    if arguments.markdown is not None:
        text = f"bytes of one step, {PAIRS} pairs of points ({FEW_PAIRS} per example)"
        arguments.markdown.write_text(report.markdown("The scalar exchange", text, COLUMNS))
    if arguments.plot is not None:
        draw(report.rows, arguments.plot)
    report.print_and_exit()


if __name__ == "__main__":
    main()
