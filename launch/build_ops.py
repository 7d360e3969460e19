"""Build the native parts once, before any rank starts: DeepSpeed's operators for this accelerator, and the kernels.

torch guards a build with a file that exists while the build runs. A build that is killed leaves it behind, and every later
run then waits for it in silence. The builder keeps the file open, so a lock that no process has open is stale: it is removed.
"""

import contextlib
import os
import sys
from pathlib import Path


def say(message: str) -> None:
    print(f"zods: {message}", file=sys.stderr, flush=True)


def holder(lock: Path) -> int | None:
    """The process on this machine that has `lock` open, or None. Processes of other users show it to root only."""
    wanted = lock.stat()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # closed meanwhile, or another user's
            found = descriptor.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return int(descriptor.parts[2])
    return None


def remove_stale_locks(folder: Path) -> None:
    for lock in folder.glob("**/lock"):
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            builder = holder(lock)
            if builder is None:
                say(f"removing {lock}, left by a build that was killed")
                lock.unlink()
            else:
                say(f"waiting for process {builder}, which builds {lock.parent.name}")


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
