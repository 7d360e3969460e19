"""For test_watchdog.py: the last rank hangs in its own code while the others wait for it, or closes
its watch and outlives rank 0.

Usage: hanging.py hangs|ends
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
    time.sleep(1.5)  # the threads look at the store
    watchdog.close()
    comm.gather_scalars([1.0])
    time.sleep(2.5 * comm.rank)


main(sys.argv[-1])
