"""Ranks that watch each other, for test_siblings.py: rank 1 ends by a signal.

Usage: killed.py FOLDER SIGNAL_NUMBER
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

from zods.comm.siblings import Siblings

folder, how = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
Siblings().watch()
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a rank that finishes its step
rank = int(os.environ["RANK"])
(Path(folder) / f"watching{rank}").touch()
while not all((Path(folder) / f"watching{other}").exists() for other in range(3)):
    time.sleep(0.05)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if rank == 1:
    os.kill(os.getpid(), int(how))
time.sleep(2)
