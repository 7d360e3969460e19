"""Ranks for tests.

`run_ranks` runs a function on N gloo ranks. `launch` runs a script through the real launcher.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from zods.comm import build_locks

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {  # the environment of every rank
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    "ZODS_REPLICA_TOKEN": "of the tests, 0123456789",
}
# Seconds after which a test gives up. A slow and busy machine takes ten times as long as a quiet
# one.
LIMIT = 600.0
COMPILERS = {name: os.environ.get(name) for name in ("CC", "CXX")}
# Ranks are forked from a server that has only imported these modules. Importing them takes seconds.
PRELOADED = [
    *("pytest", "torch", "torch._dynamo", "deepspeed", "peft", "zods"),
    *("zods.finetune", "tests.distributed.models", "tests.distributed.frozen_modules"),
    "deepspeed.runtime.zero.muon.original_muon",  # imports torch._inductor, for a first-order engine
]


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `function(*args)` on `world_size` ranks.

    A rank is a process of one torch thread with an initialised gloo group.

    function: a function of a module's top level. Its arguments and its result are pickled. Returns
    the ranks' results, in rank order. The test fails with the ranks' tracebacks if a rank raises or
    dies, or if a rank takes longer than LIMIT seconds. No process is left behind.
    """
    os.environ.update(ENVIRONMENT)
    restore_compilers()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder, master_port() as port:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(rank, world_size, folder, port, sender, function, args)
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        results = _collect(pipes, processes)
        failures = [f"--- rank {rank}:\n{text}" for rank, (ok, text) in results.items() if not ok]
        if failures:
            outputs = [
                (Path(folder) / f"output-{rank}").read_text(errors="replace")[-2000:]
                for rank in results
            ]
            said = [
                f"--- output of rank {rank}:\n{text}"
                for rank, text in enumerate(outputs)
                if text.strip()
            ]
            pytest.fail("\n".join([f"{function.__name__} failed", *failures, *said]), pytrace=False)
        return [results[rank][1] for rank in range(world_size)]


def at_once(runs: Sequence[tuple[int, Callable[..., Any], Any]]) -> list[list[Any]]:
    """Run worlds of ranks at the same time: (world size, function, arguments) of each."""
    results: dict[int, Any] = {}

    def run(k: int, world_size: int, function: Callable[..., Any], args: Any) -> None:
        try:
            results[k] = run_ranks(world_size, function, *args)
        except BaseException as error:
            results[k] = error

    threads = [threading.Thread(target=run, args=(k, *of)) for k, of in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[k] for k in range(len(runs))]


def _collect(pipes: list[Any], processes: list[Any]) -> dict[int, tuple[bool, Any]]:
    """Wait for the ranks: (whether the rank ended well, its result or the error) by rank.

    Ranks that still run at the end are killed.
    """
    results: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + LIMIT
    while len(results) < len(pipes) and time.monotonic() < deadline:
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        for pipe in multiprocessing.connection.wait(
            waiting, timeout=max(0.0, deadline - time.monotonic())
        ):
            rank = pipes.index(pipe)
            try:
                results[rank] = pipe.recv()
            except EOFError:
                processes[rank].join(5)
                results[rank] = (
                    False,
                    f"died without a message, exit code {processes[rank].exitcode}",
                )
            if not results[rank][0]:  # the other ranks may wait for it for ever
                deadline = min(deadline, time.monotonic() + 5)
    for rank, process in enumerate(processes):
        if rank not in results:
            results[rank] = (False, f"still running when the test gave up (timeout {LIMIT} s)")
        process.join(0.0 if not results[rank][0] else max(5.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
            if results[rank][0]:
                results[rank] = (False, "did not exit after its function had returned")
        elif results[rank][0] and process.exitcode != 0:
            results[rank] = (False, f"exit code {process.exitcode} after its function had returned")
    return results


def _rank(
    rank: int, world_size: int, folder: str, port: int, pipe: Any, function: Callable, args: Any
) -> None:
    output = os.open(f"{folder}/output-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(
        ENVIRONMENT,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        import logging

        import deepspeed
        import torch

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
        deepspeed.init_distributed("gloo", verbose=False)
        result = (True, function(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    pipe.send(result)
    pipe.close()
    if result[0]:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        atexit._run_exitfuncs()  # a forked process does not run these functions itself
    else:
        sys.stdout.flush()
        os._exit(1)  # no teardown: the other ranks may have ended, or may wait in a collective


def launch(script: Path, *args: Any, num_gpus: int = 2) -> tuple[int, str]:
    """Run `script` through the `deepspeed` launcher on this host: (exit code, output of all ranks).

    The test fails if it takes longer than LIMIT seconds. The launcher and its ranks are killed
    then.
    """
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    with master_port() as port:
        command = [
            deepspeed,
            "--num_gpus",
            str(num_gpus),
            "--master_port",
            str(port),
            str(script),
            *map(str, args),
        ]
        return run_command(command, script.parent)


def options_of(**values: Any) -> list[str]:
    """Options of `zods.finetune` by name. True stands for an option without a value."""
    return [
        word
        for name, value in values.items()
        for word in ((f"--{name}",) if value is True else (f"--{name}", str(value)))
    ]


def run_command(command: list[str], cwd: Path, **variables: str) -> tuple[int, str]:
    """Run a launcher's command: (exit code, output of all processes).

    Its environment is that of ranks, with `variables`. The test fails if it takes longer than LIMIT
    seconds. All processes of its session are killed then.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment_of_ranks(**variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(
            f"{' '.join(command)} still ran after {LIMIT} s. It said:\n{output[-4000:]}",
            pytrace=False,
        )
    return process.returncode, output


def environment_of_ranks(**variables: str) -> dict[str, str]:
    """The environment of a launcher's command.

    It has the variables of this process, those of ranks, and `variables`.
    """
    restore_compilers()
    environment = {**os.environ, **ENVIRONMENT, **variables}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return environment


def restore_compilers() -> None:
    """Restore the compilers' variables of this process's start.

    PEFT 0.21 leaves CC and CXX at gcc if its CUDA extension for BOFT cannot be built. With another
    compiler than before, ranks would build DeepSpeed's operators again.
    """
    for name, value in COMPILERS.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def free_port() -> int:
    """A port of this host on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def master_port() -> Iterator[int]:
    """A free port. Its shared memory is removed at the end.

    DeepSpeed's CPU operator leaves 69 MB of shared memory per rank, named by the port. Locks of a
    build that a killed test left are removed at the start, because the ranks would wait for them.
    """
    for lock in build_locks.stale_locks():
        lock.unlink(missing_ok=True)
    port = free_port()
    try:
        yield port
    finally:
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            left.unlink(missing_ok=True)
