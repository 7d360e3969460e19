"""Build the native parts once, before any rank starts: DeepSpeed's operators for this accelerator, and the kernels.

torch's build lock stays behind when a build is killed, and every later run then waits for it in silence: a lock that is
there now, before anything builds, is such a one, and is removed.
"""

import os
import sys
from pathlib import Path


def main() -> None:
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    for lock in folder.glob("**/lock"):
        print(f"zods: removing {lock}, left by a build that was killed", file=sys.stderr)
        lock.unlink()
    if not any(folder.glob("**/*.so")):
        print("zods: building DeepSpeed's operators and the kernels (once, a few minutes)", file=sys.stderr)

    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import AsyncIOBuilder

    import zods.kernels

    AsyncIOBuilder().load(verbose=False)
    if get_accelerator().device_name() == "cpu":
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    zods.kernels.backend()


if __name__ == "__main__":
    main()
