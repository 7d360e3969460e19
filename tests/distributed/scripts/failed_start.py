"""Starts that fail in different ways, most of them on one rank.

tests/distributed/test_failed_start.py runs this script through the launcher.
"""

import os
import signal
import sys

from zods.comm.process import connect_ranks, end_process, environment_rank, report_failure


def start(way: str) -> None:
    if way == "one rank, before they are connected" and environment_rank() == 1:
        raise ValueError("no such device")
    comm = connect_ranks()
    if way == "disagreement":
        comm.check_agreement(str(comm.rank).encode(), "the model")
    if way == "one rank, and the other waits for it":
        if comm.rank == 1:
            raise AttributeError("no attribute 'rotary'")
        comm.gather_scalars([1.0])
    if way == "one rank is killed, and the other waits for it":
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        comm.gather_scalars([1.0])
    if way == "one rank, in a block that ranks agree on":
        with comm.same_on_all_ranks():
            if comm.rank == 1:
                raise ImportError("no module for this model")
    if way == "the same on all":
        with comm.same_on_all_ranks():
            {}["gate"]


try:
    start(sys.argv[-1])
except Exception as error:
    end_process(report_failure(error, "a program"))
