"""Build the native parts once, before any rank starts.

The native parts are the kernels, DeepSpeed's communication operator for CPUs and, with
`--async_io`, DeepSpeed's operator for NVMe, which takes several times as long. Locks that a killed
build left are removed first (zods/comm/build_locks.py). Called by launch/setup.sh.
"""

import os
import sys
from pathlib import Path

from zods.comm.build_locks import holders


def say(message: str) -> None:
    print(f"zods: {message}", file=sys.stderr, flush=True)


def remove_stale_locks(folder: Path) -> None:
    for lock, process in holders(folder).items():
        if process is None:
            say(f"removing {lock}, left by a build that was killed")
            lock.unlink(missing_ok=True)
        else:
            say(f"waiting for process {process}, which builds {lock.parent.name}")


def main() -> None:
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    remove_stale_locks(folder)
    with_async_io = "--async_io" in sys.argv[1:]
    if not any(folder.glob("**/async_io.so" if with_async_io else "**/*.so")):
        say("building DeepSpeed's operators and the kernels (once, a few minutes)")

    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import AsyncIOBuilder

    import zods.kernels

    if with_async_io:
        AsyncIOBuilder().load(verbose=False)
    if get_accelerator().device_name() == "cpu":
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    zods.kernels.backend()


if __name__ == "__main__":
    main()
