"""Connect the ranks of a run, under any launcher or none; report a failed start; end a process.

`deepspeed` and `torchrun` set torch's environment variables. Under mpirun and srun DeepSpeed asks
mpi4py. A process that none of them started is a run of one rank. Used by `zods.initialize` and
`zods.finetune`.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from zods.comm import build_locks
from zods.comm.communicator import (
    Communicator,
    Disagreement,
    RankFailure,
    is_connected,
    is_lost_connection,
)
from zods.comm.stop_request import EXIT_CODE
from zods.comm.store import Board

logger = logging.getLogger(__name__)

_status_is_written = threading.Lock()  # acquired once, never released
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# set for processes that mpirun (Open MPI, MPICH and Intel MPI, MVAPICH) or srun started, but not in
# a batch script itself
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
# variables of clouds for which DeepSpeed has code of its own
CLOUDS = (
    "AZUREML_EXPERIMENT_ID",
    "SM_TRAINING_ENV",
    "DLTS_JOB_ID",
)
SAID_WITHIN = 10.0  # seconds that a rank waits for the one that reports a failed start


def environment_rank() -> int:
    """This process's rank by the launcher's variables, before the ranks are connected."""
    return next((int(os.environ[name]) for name in RANKS if os.environ.get(name, "").isdigit()), 0)


def connect_ranks(
    distributed_port: int = 29500, dist_init_required: bool | None = None
) -> Communicator:
    """Connect the ranks that the launcher started; one rank where there is no launcher.

    Raises ValueError where the launcher's variables are incomplete, where mpi4py is needed but
    missing, and on rank 0 where its port is in use.
    """
    if not is_connected() and dist_init_required is not False:
        _prepare_environment()
    if environment_rank() == 0 or os.environ.get("LOCAL_RANK") == "0":  # one rank of each machine
        report_stale_locks()
    _prefer_own_ninja()
    try:
        deepspeed.init_distributed(
            get_accelerator().communication_backend_name(),
            distributed_port=distributed_port,
            dist_init_required=dist_init_required,
            verbose=False,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ValueError(
            f"MASTER_PORT: {os.environ.get('MASTER_PORT')}, where another process of this host "
            "listens, maybe another run. Give the launcher a free port: --master_port of "
            "deepspeed and torchrun, else the variable MASTER_PORT."
        ) from None
    comm = Communicator(torch.device(get_accelerator().current_device_name()))
    if comm.device.type == "cpu":
        _unlink_shared_memory(comm)
    return comm


def _prefer_own_ninja() -> None:
    """Let torch's extension loader find the ninja of this Python's environment first.

    The PATH of a rank that was started over ssh is that of a login. Another version of ninja there
    takes DeepSpeed's operators for outdated, because it hashes commands in another way, and compiles
    them again.
    """
    own = Path(sys.executable).with_name("ninja")
    if own.exists() and shutil.which("ninja") != str(own):
        os.environ["PATH"] = os.pathsep.join([str(own.parent), os.environ.get("PATH", os.defpath)])


def _unlink_shared_memory(comm: Communicator) -> None:
    """Remove the name of this rank's buffer in shared memory, 66 MiB.

    DeepSpeed's CPU operator (0.19.8) makes the buffer when ranks connect, and never removes it, so
    that each run would leave one per rank. The ranks of the machine keep it mapped. All ranks call
    this together, after they have connected.
    """
    comm.gather_objects(None)  # when it returns, all ranks have opened the buffers of the others
    address = f"{os.environ.get('MASTER_ADDR')}_{os.environ.get('MASTER_PORT')}"
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{comm.rank}"
    (Path("/dev/shm") / name).unlink(missing_ok=True)


def report_stale_locks() -> None:
    """Name the locks that killed builds left. The ranks would wait for them without a message."""
    for lock in build_locks.stale_locks():
        logger.error(
            "%s: no process of this machine holds it. A build of %s was killed and left it, and "
            "the ranks wait for it when they need that operator. Remove the file, unless another "
            "machine builds there.",
            lock,
            lock.parent.name,
        )


def _prepare_environment() -> None:
    missing = [name for name in TORCH if name not in os.environ]
    if not missing or any(name in os.environ for name in CLOUDS):
        return
    started = next((name for name in SIZES if _number(os.environ.get(name)) > 1), None)
    if started is not None:
        if importlib.util.find_spec("mpi4py") is None:
            raise ValueError(
                f"{started} is {os.environ[started]}: the ranks were started by mpirun or srun, "
                "but mpi4py, by which DeepSpeed finds them, is not installed. Install mpi4py, or "
                "start the ranks with deepspeed or torchrun."
            )
        return
    given = [name for name in TORCH[:3] if name in os.environ]
    if given and missing:
        raise ValueError(
            f"{', '.join(given)} set in the environment, but not {', '.join(missing)}. Set all of "
            "them, or none for a run of one rank, or start the ranks with deepspeed or torchrun."
        )
    # overwritten where they are set: an address and a port from an earlier run are of no use
    one_rank = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    os.environ.update({**one_rank, "MASTER_PORT": str(_free_port())})


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 1


def _world_size() -> int:
    """The number of ranks by the launcher's variables."""
    return max(_number(os.environ.get(name)) for name in ("WORLD_SIZE", *SIZES))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def report_failure(error: Exception, program: str) -> int:
    """Print why the run does not start, on one rank. Returns the process's exit code.

    All failing ranks call it. Once the ranks are connected, the first rank to fail prints the
    message: the errors of other ranks are consequences, such as a lost connection. Before that,
    every failing rank prints its own message, with its number. Bad input gives one line and code 2.
    A lost connection, as after the kill of another rank, gives one line and code 1. An unexpected
    exception gives a traceback, one line with its type, and code 1.
    """
    rank = environment_rank()
    bad_input = isinstance(error, (ValueError, OSError))
    speaker = error.rank if isinstance(error, RankFailure) else None
    connected = is_connected()
    if not connected or _is_first(rank, speaker):
        agreed = isinstance(error, (Disagreement, RankFailure))
        foreseen = bad_input or agreed or is_lost_connection(error)
        kind = "" if foreseen else f"{type(error).__name__}: "
        cause = error.__cause__ if isinstance(error, RankFailure) else error
        if not foreseen or (isinstance(error, RankFailure) and cause is not None):
            traceback.print_exception(cause)
        who = "" if connected or _world_size() == 1 else f"rank {rank}: "
        print(f"{program}: error: {who}{kind}{error}", file=sys.stderr, flush=True)
    _mark_said()
    return 2 if bad_input else 1


def _is_first(rank: int, speaker: int | None) -> bool:
    """Whether this rank reports the failure. speaker: the rank that has the traceback; None if no
    rank is known to have failed.
    """
    try:
        board = Board()
        if speaker is None or speaker == rank:
            return board.first("failure")
        deadline = time.monotonic() + SAID_WITHIN
        while not board.has("said") and time.monotonic() < deadline:
            time.sleep(0.05)
        return not board.has("said") and board.first("failure")
    except RuntimeError:  # rank 0's process, which keeps the board, has reported and ended
        return False


def _mark_said() -> None:
    if is_connected():
        try:
            Board().pin("said", "")
        except RuntimeError:  # rank 0's process has ended
            return


def write_exit_status(code: int) -> None:
    """On rank 0, write the status of this process's end to the file ZODS_EXIT_FILE, if the
    environment has one.

    The scripts in launch/ set it, because not every launcher returns the status of a rank. The status
    to be continued is kept: where the watchdog ends the process, the main thread may fail meanwhile.
    """
    first = _status_is_written.acquire(blocking=False)
    wanted = first or code == EXIT_CODE
    if environment_rank() == 0 and "ZODS_EXIT_FILE" in os.environ and wanted:
        with contextlib.suppress(OSError):
            Path(os.environ["ZODS_EXIT_FILE"]).write_text(f"{code}\n")


def end_process(code: int) -> NoReturn:
    """End the process without the interpreter's teardown. With code 0, and after a request to stop,
    all ranks end together.

    A rank that exits while others communicate aborts them. In addition, Gloo's threads can abort a
    finished run: they may drop a tensor during the teardown, which needs a lock that is gone
    (PyTorch issue 190489). DeepSpeed keeps references to the process groups, so destroying the
    groups does not end the threads.
    """
    if code in (0, EXIT_CODE):
        dist.barrier()
        dist.destroy_process_group()
        if mpi := sys.modules.get("mpi4py.MPI"):
            mpi.Finalize()  # mpirun takes an end without it for a crash
    write_exit_status(code)
    atexit._run_exitfuncs()  # trackers upload what they hold
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
