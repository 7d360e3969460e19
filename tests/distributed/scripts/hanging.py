"""A rank that hangs, for test_watchdog.py.

Usage: hanging.py hangs|ends

hangs: the last rank hangs in its own code while the others wait for it. ends: the last rank closes
its watchdog and outlives rank 0.
"""

import sys
import time

import deepspeed
import torch

from zods.comm.communicator import Communicator
from zods.comm.watchdog import Watchdog


def main(kind):
    deepspeed.init_distributed("gloo")
    comm = Communicator(torch.device("cpu"))
    watchdog = Watchdog(comm, timeout=2.0)
    watchdog.beat("step 17, evaluate")
    if kind == "hangs" and comm.rank == comm.world_size - 1:
        time.sleep(1000)
    comm.gather_scalars([1.0])
    time.sleep(1.5)  # the watchdogs' threads read the store meanwhile
    watchdog.close()
    comm.gather_scalars([1.0])
    time.sleep(2.5 * comm.rank)


main(sys.argv[-1])
