"""A process that listens for requests to stop, for test_stopping.py.

Usage: stopping.py FOLDER [starting]

With "starting" it writes its process id and its parent's to FOLDER/importing, and waits for
FOLDER/imported, in place of the imports of a run. Then it watches its launcher, as a run does that
loads its model, and writes FOLDER/guarding.

Otherwise it forks a process and ends it with SIGTERM. Then it writes its process id and its
parent's to FOLDER/listening. When it is asked to stop, it writes FOLDER/reason and ends.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

from zods.comm.stop_request import StopRequest


def write(file, text):
    temporary = file.with_name("temporary")
    temporary.write_text(text)
    temporary.rename(file)


def start(folder):
    write(folder / "importing", json.dumps({"pid": os.getpid(), "parent": os.getppid()}))
    while not (folder / "imported").exists():
        time.sleep(0.05)
    StopRequest().guard_start()
    write(folder / "guarding", "")
    time.sleep(300)


def main(folder):
    stop = StopRequest()
    stop.listen()
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join()
    known = {"pid": os.getpid(), "parent": os.getppid(), "child": child.exitcode}
    write(folder / "listening", json.dumps(known))
    while stop.reason is None:
        time.sleep(0.05)
    time.sleep(0.5)  # a second signal may come
    write(folder / "reason", stop.reason)


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    (start if given[1:] == ["starting"] else main)(Path(given[0]))
