"""A rank that hangs, for test_watchdog.py.

Usage: hanging.py hangs|ends|alone

hangs: the last rank hangs in its own code while the others wait for it. ends: the last rank closes
its watchdog and outlives rank 0. alone: the only rank hangs where it
loads data; no launcher has started it.
"""

import sys
import time

from zods.comm.process import connect_ranks
from zods.comm.watchdog import Watchdog
from zods.data.loader import WholePass


class Hanging:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        time.sleep(1000)


def main(kind):
    comm = connect_ranks()
    watchdog = Watchdog(comm, timeout=2.0)
    watchdog.beat("step 17, evaluate")
    if kind == "alone":
        list(WholePass(Hanging(), 1, comm.rank, comm.world_size))
    if kind == "hangs" and comm.rank == comm.world_size - 1:
        time.sleep(1000)
    comm.gather_scalars([1.0])
    time.sleep(1.5)  # the watchdogs' threads read the store meanwhile
    watchdog.close()
    comm.gather_scalars([1.0])
    time.sleep(2.5 * comm.rank)


main(sys.argv[-1])
