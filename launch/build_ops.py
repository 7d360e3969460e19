"""Build the native parts once, before any rank starts: DeepSpeed's operators for this accelerator, and the kernels.

Locks that a killed build left are removed first, see zods/build_locks.py.
"""

import os
import sys
from pathlib import Path

from zods.build_locks import holders


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
    if not any(folder.glob("**/*.so")):
        say("building DeepSpeed's operators and the kernels (once, a few minutes)")

    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import AsyncIOBuilder

    import zods.kernels

    AsyncIOBuilder().load(verbose=False)
    if get_accelerator().device_name() == "cpu":
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    zods.kernels.backend()


if __name__ == "__main__":
    main()
