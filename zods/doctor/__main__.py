"""`python -m zods.doctor`: check this installation and its hosts; also under `deepspeed` or torchrun.

One line per check: "ok"; "note" where training works but something is slower or not available; or
"broken", with what to do. The exit code is 1 where something is broken.
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence

from zods.comm.communicator import Communicator
from zods.comm.process import connect_ranks, end_process, report_failure
from zods.doctor.finding import Finding
from zods.doctor.host_checks import host, locks
from zods.doctor.rank_checks import nvme, ranks


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    found = locks()
    if any(finding.state == "broken" for finding in found):
        # a rank that connects may wait for such a lock; each prints it, for the first to end ends all
        print("\n".join(map(str, found)), flush=True)
        sys.exit(1)
    try:
        found += host()
        comm = connect_ranks()
        found += ranks(comm)
        if options.nvme is not None:
            found.append(nvme(options.nvme))
    except Exception as error:
        print("\n".join(map(str, found)), flush=True)
        end_process(report_failure(error, "zods.doctor"))
    end_process(report(found, comm))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zods.doctor", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--nvme",
        metavar="PATH",
        help="measure the drive of this folder with a file of 256 MiB, which is removed; "
        "{local_rank} stands for the rank's number on its host",
    )
    # A launcher sets --local_rank.
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


def report(found: Sequence[Finding], comm: Communicator) -> int:
    """Print the findings of all ranks on rank 0, each text once. Returns the exit code."""
    gathered = comm.gather_objects((socket.gethostname(), list(found)))
    if comm.rank == 0:
        said = set()
        for rank, (name, findings) in enumerate(gathered):
            for finding in findings:
                if finding not in said:
                    print(finding if rank == 0 else f"{finding} (rank {rank}, {name})")
                said.add(finding)
        sys.stdout.flush()
    comm.gather_objects(None)  # a rank that ends with an error ends the others: rank 0 has printed
    return int(any(of.state == "broken" for _, findings in gathered for of in findings))


if __name__ == "__main__":
    main()
