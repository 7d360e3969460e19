"""A process that listens for requests to stop, for test_stopping.py.

Usage: stopping.py FOLDER

Once a forked process of its own has been ended with SIGTERM, it writes its process id and its
parent's to FOLDER/listening. When it is asked to stop, it writes FOLDER/reason and ends.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

from zods.comm.stop_request import StopRequest


def main(folder):
    stop = StopRequest()
    stop.listen()
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join()
    temporary = folder / "temporary"
    temporary.write_text(
        json.dumps({"pid": os.getpid(), "parent": os.getppid(), "child": child.exitcode})
    )
    temporary.rename(folder / "listening")
    while stop.reason is None:
        time.sleep(0.05)
    time.sleep(0.5)  # a second signal may come
    temporary.write_text(stop.reason)
    temporary.rename(folder / "reason")


if __name__ == "__main__":
    main(Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))))
