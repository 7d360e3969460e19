"""Ranks that hang are named, and all ranks end.

There is no message about ranks that do not hang.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import zods
import zods.finetune
from tests.distributed.command_line import prompted_options, write_inputs
from tests.distributed.models import Tiny, configuration, tiny_data
from tests.distributed.ranks import (
    ENVIRONMENT,
    LIMIT,
    PRELOADED,
    launch,
    master_port,
    restore_compilers,
    run_command,
    run_ranks,
)
from zods.cli.arguments import parse_arguments
from zods.comm.communicator import Communicator
from zods.comm.stop_request import EXIT_CODE
from zods.comm.watchdog import AGAIN, Answer, Watchdog, verdict
from zods.forward.evaluator import Evaluator
from zods.training import checkpoint, resume

SCRIPTS = Path(__file__).parent / "scripts"
TIMEOUT = 2.0


@dataclass
class Ended:
    """Ranks that have ended, and ranks that still run.

    codes: the exit code of each rank, or None if the rank still runs or is stopped.
    said: the output of each rank.
    seconds: the time until all other ranks had ended.
    """

    codes: list[int | None]
    said: list[str]
    seconds: float


def end_of(
    function: Callable[[Watchdog, Communicator], Any],
    folder: Path,
    *,
    store: str,
    stays: int | None = None,
    between: Callable[[list[int]], None] = lambda pids: None,
) -> Ended:
    """Run `function` on three ranks that may die, until all but rank `stays` have ended.

    Ranks that are left after 30 s are killed.

    store: "file", or "tcp", which rank 0's process keeps.
    between: called with the process ids once all ranks have started.
    """
    os.environ.update(ENVIRONMENT)
    restore_compilers()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with master_port() as port:
        address = f"file://{folder}/store" if store == "file" else f"tcp://127.0.0.1:{port}"
        ready = context.Barrier(4)
        processes = [
            context.Process(target=_rank, args=(r, address, folder, ready, function))
            for r in range(3)
        ]
        for process in processes:
            process.start()
        ready.wait(LIMIT)
        began = time.monotonic()
        between([process.pid for process in processes])
        for rank, process in enumerate(processes):
            if rank != stays:
                process.join(max(0.0, began + 30 - time.monotonic()))
        seconds = time.monotonic() - began
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
    return Ended(codes, [(folder / f"output-{rank}").read_text() for rank in range(3)], seconds)


def _rank(rank: int, address: str, folder: Path, ready: Any, function: Callable[..., Any]) -> None:
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=3)
    comm = Communicator(torch.device("cpu"))
    comm.gather_scalars([0.0])
    watchdog = Watchdog(comm, TIMEOUT)
    watchdog.beat("step 17, evaluate")
    time.sleep(1.5)  # Give every attendant thread the time to connect to the store.
    watchdog.rest()
    ready.wait(LIMIT)
    function(watchdog, comm)
    watchdog.close()
    torch.distributed.barrier()
    os._exit(0)


def check_end(ended: Ended, *, stays: int | None = None) -> str:
    """Check the end of the other ranks, and return their one message.

    They end in time, with the exit code of a hang.
    """
    others = [rank for rank in range(3) if rank != stays]
    assert [ended.codes[rank] for rank in others] == [EXIT_CODE] * len(others), ended.said
    assert ended.seconds < TIMEOUT + 11
    messages = [text for text in ended.said if "zods:" in text]
    assert len(messages) == 1, ended.said
    assert not any("Traceback" in text or "TCPStore" in text for text in ended.said), ended.said
    assert messages[0].count("zods:") == 1
    assert AGAIN in messages[0]
    return messages[0]


def sleeps_in_its_own_code(watchdog: Watchdog, comm: Communicator) -> None:
    watchdog.beat("step 18, evaluate")
    if comm.rank == 2:
        time.sleep(1000)
    comm.gather_scalars([1.0])


def sleeps_at_rest(watchdog: Watchdog, comm: Communicator) -> None:
    if comm.rank == 0:
        time.sleep(1000)
    watchdog.beat("step 18, evaluate")
    comm.gather_scalars([1.0])


def rank_0_is_stopped(watchdog: Watchdog, comm: Communicator) -> None:
    stopped_rank(0, watchdog, comm)


def rank_1_is_stopped(watchdog: Watchdog, comm: Communicator) -> None:
    stopped_rank(1, watchdog, comm)


def stopped_rank(rank: int, watchdog: Watchdog, comm: Communicator) -> None:
    watchdog.beat("step 18, evaluate")
    if comm.rank == rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    comm.gather_scalars([1.0])


def works_on(watchdog: Watchdog, comm: Communicator) -> None:
    watchdog.beat("step 18, evaluate")
    time.sleep(1.5)  # this process is stopped meanwhile
    time.sleep(0.8)
    comm.gather_scalars([1.0])


def test_a_rank_that_sleeps_in_its_own_code_is_named_with_its_line(tmp_path: Path):
    said = check_end(end_of(sleeps_in_its_own_code, tmp_path, store="tcp"))
    assert "zods: rank 2 hangs: at step 18, evaluate, for " in said
    assert "in test_watchdog.py:" in said
    assert "sleeps_in_its_own_code. The others wait for it." in said


def test_a_resting_rank_is_named_when_others_wait_for_it(tmp_path: Path):
    said = check_end(end_of(sleeps_at_rest, tmp_path, store="file"))
    assert "zods: rank 0 hangs: at rest after step 17, evaluate, for " in said
    assert "sleeps_at_rest. The others wait for it." in said


def test_a_stopped_rank_is_named_as_not_answering(tmp_path: Path):
    said = check_end(end_of(rank_1_is_stopped, tmp_path, store="tcp", stays=1), stays=1)
    assert (
        "zods: rank 1 does not answer: its process is stopped or swapped out, or the host is gone."
        in said
    )
    assert "The others wait for it." in said


def test_rank_0_is_named_when_it_is_stopped_with_the_store(tmp_path: Path):
    ended = end_of(rank_0_is_stopped, tmp_path, store="tcp", stays=0)
    assert ended.codes[1:] == [EXIT_CODE] * 2, ended.said
    assert ended.seconds < TIMEOUT + 11
    for rank in (1, 2):
        assert "Traceback" not in ended.said[rank], ended.said
        assert (
            "zods: rank 0, which keeps the process group's store, does not answer: "
            in ended.said[rank]
        )
        assert f"Rank {rank} is at step 18, evaluate, for " in ended.said[rank]


def test_a_job_that_is_suspended_as_a_whole_and_resumed_does_not_hang(tmp_path: Path):
    def suspend(pids: list[int]) -> None:
        time.sleep(1.2)  # the clock has seen the beat by then
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2 * TIMEOUT)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    ended = end_of(works_on, tmp_path, store="tcp", between=suspend)
    assert ended.codes == [0, 0, 0], ended.said
    assert not any("zods:" in text for text in ended.said)


def test_the_launcher_ends_with_the_code_of_a_hang():
    code, output = launch(SCRIPTS / "hanging.py", "hangs")
    assert code == EXIT_CODE, output[-4000:]
    assert output.count("zods:") == 1
    assert "Traceback" not in output, output[-4000:]
    assert "zods: rank 1 hangs: at step 17, evaluate, for " in output
    assert "in hanging.py:" in output


@pytest.mark.slow
def test_a_closed_watchdog_needs_no_store():
    """The store ends with rank 0."""
    code, output = launch(SCRIPTS / "hanging.py", "ends")
    assert code == 0, output[-4000:]
    for sign in ("zods:", "TCPStore", "Traceback", "terminate"):
        assert sign not in output, output[-4000:]


def slow_but_alive() -> str:
    comm = Communicator(torch.device("cpu"))
    watchdog = Watchdog(comm, 1.5)
    watchdog.beat("step 0")
    for step in range(4):
        time.sleep(0.8 if comm.rank == 0 else 0.0)
        comm.gather_scalars([1.0])
        watchdog.beat(f"step {step + 1}")
    watchdog.rest()
    time.sleep(3.5)  # longer than the timeout, and no rank waits
    comm.gather_scalars([1.0])
    watchdog.close()
    return "went on"


def test_slow_ranks_that_beat_and_resting_ranks_do_not_hang():
    assert run_ranks(2, slow_but_alive) == ["went on"] * 2


def beats_of_evaluations(folder: Path) -> dict[str, list[str]]:
    config = configuration(12, method="mezo", eps=1e-2, lr=2e-2)
    engine = zods.initialize(model=Tiny(), config=config, training_data=tiny_data(40))[0]
    seen: list[str] = []
    engine._watchdog.beat = seen.append
    engine._watchdog.rest = lambda: seen.append("rest")
    found = {}

    def collate(rows: list[Any]) -> tuple[Any, Any]:
        batch = torch.utils.data.default_collate(rows)
        return batch, None

    def measure(outputs: Any, inputs: Any, targets: Any) -> dict[str, tuple[float, float]]:
        return {"loss": (float(outputs["loss"]), 1.0)}

    def failing(outputs: Any, inputs: Any, targets: Any) -> Any:
        raise OSError("no metric")

    engine.evaluate(tiny_data(24), collate, measure)
    found["evaluate"], seen[:] = list(seen), []
    engine.eval_batch(iter(engine.training_dataloader))
    found["eval_batch"], seen[:] = list(seen), []
    with pytest.raises(OSError, match="no metric"):
        engine.evaluate(tiny_data(24), collate, failing)
    found["failing"] = list(seen)
    return found


def test_evaluations_are_watched_batch_by_batch_and_rest_at_their_end(tmp_path: Path):
    (found,) = run_ranks(1, beats_of_evaluations, tmp_path)
    for name, seen in found.items():
        assert "step 0, evaluation" in seen, name
        assert seen[-1] == "rest", name
        assert seen.count("rest") == 1, name
    assert found["evaluate"].count("step 0, evaluation") == 1 + 2  # two micro-batches of 12


def rank_of_forwards() -> list[int]:
    """The number of the model's forwards in each beat of two steps, its renewals included."""
    section = {"method": "mezo", "eps": 1e-2, "lr": 2e-2, "num_directions": 2}
    config = configuration(12, evaluation="sequential", **section)
    engine = zods.initialize(model=Tiny(), config=config, training_data=tiny_data(24))[0]
    watch, beats = engine._watchdog._watch, []
    engine.module.register_forward_pre_hook(lambda *_: beats.append(watch.beat))
    for _ in range(2):
        engine.train_batch()
    assert not any(beat.resting for beat in beats)
    return [sum(beat is other for other in beats) for beat in beats]


def test_each_forward_of_a_step_has_the_whole_timeout():
    """Choosing the form on the first batch takes several forwards, and so do points one by one."""
    (found,) = run_ranks(1, rank_of_forwards)
    assert len(found) > 2 * 4
    assert set(found) == {1}


def threads_of_a_watch() -> list[int]:
    def running() -> int:
        return sum(thread.name.startswith("zods-watchdog") for thread in threading.enumerate())

    watchdog = Watchdog(Communicator(torch.device("cpu")), 60.0)
    counts = [running()]
    for what in ("step 0", "step 1"):
        watchdog.beat(what)
        counts.append(running())
    del watchdog
    gc.collect()
    return [*counts, running()]


def test_the_threads_start_at_the_first_beat_and_end_with_the_watchdog():
    assert run_ranks(2, threads_of_a_watch) == [[0, 2, 2, 0]] * 2


def test_a_single_rank_has_a_clock_and_nobody_to_ask():
    assert run_ranks(1, threads_of_a_watch) == [[0, 1, 1, 0]]


def test_a_single_rank_that_hangs_reports_itself_with_its_stack():
    code, output = run_command([sys.executable, str(SCRIPTS / "hanging.py"), "alone"], SCRIPTS)
    assert code == EXIT_CODE, output[-4000:]
    assert output.count("zods:") == 1
    assert "zods: rank 0 hangs: at step 17, evaluate, for " in output
    assert "in hanging.py:" in output
    assert "__getitem__" in output
    assert "The others wait" not in output


def rests_outside_of_zods() -> str:
    watchdog = Watchdog(Communicator(torch.device("cpu")), 0.5)
    watchdog.beat("step 0, forward")  # which an exception has ended
    time.sleep(4)
    watchdog.close()
    return "goes on"


def test_a_single_rank_whose_program_handles_an_error_does_not_hang():
    assert run_ranks(1, rests_outside_of_zods) == ["goes on"]


# --- what is watched beside steps -----------------------------------------------------------------


def stops(function: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """Make a function stop the process of a rank."""

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if torch.distributed.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        return function(*args, **kwargs)

    return stopping


def rank_of_stopped_run(options: list[str], where: str) -> None:
    holder, name = {
        "load_model": (zods.finetune, "load_model"),
        "resume": (resume, "describe"),
        "checkpoint": (checkpoint, "write_tensors"),
        "evaluation": (Evaluator, "outputs"),
    }[where]
    arguments = parse_arguments(options)
    if where != "evaluation":
        setattr(holder, name, stops(getattr(holder, name), 1))
    run = zods.finetune.start(arguments)
    if where == "evaluation":
        setattr(holder, name, stops(getattr(holder, name), 1))
    zods.finetune.finetune(arguments, *run)


@pytest.mark.parametrize(
    ("where", "timeouts"),
    [
        pytest.param(
            *("checkpoint", {"hang_timeout": 10, "load_timeout": 300}), marks=pytest.mark.slow
        ),
        pytest.param(
            *("load_model", {"hang_timeout": 300, "load_timeout": 20}), marks=pytest.mark.slow
        ),
        pytest.param(
            *("resume", {"hang_timeout": 300, "load_timeout": 20}), marks=pytest.mark.slow
        ),
        pytest.param(
            *("evaluation", {"hang_timeout": 10, "load_timeout": 300}), marks=pytest.mark.slow
        ),
    ],
)
def test_a_rank_that_is_stopped_outside_of_steps_is_named(
    tmp_path: Path, where: str, timeouts: dict[str, float]
):
    section = {"method": "mezo", "lr": 1e-4, **timeouts}
    write_inputs(
        tmp_path,
        {"train_batch_size": 8, "zero_optimization": {"stage": 3}, "zeroth_order": section},
    )
    options = prompted_options(tmp_path, tmp_path / "run", max_steps=1, save_interval=1)
    with pytest.raises(pytest.fail.Exception, match="exit code 75") as failed:
        run_ranks(2, rank_of_stopped_run, options, where)
    said = str(failed.value)
    assert said.count("zods: rank 1 does not answer: its process is stopped") == 1, said
    assert "The others wait for it." in said


def bytes_of_checkpoint(folder: Path) -> list[int]:
    config = configuration(12, method="mezo_svrg", anchor={"point": "cpu", "gradient": "cpu"})
    engine = zods.initialize(model=Tiny(), config=config, training_data=tiny_data(40))[0]
    engine.train_batch()
    written = engine.save_checkpoint(folder)
    engine.close()
    sizes = [file.stat().st_size for file in written.glob(f"*-rank{engine.global_rank:05d}-*")]
    return [checkpoint.bytes_per_rank(engine.run), sum(sizes)]


def test_the_time_for_a_checkpoint_is_the_same_on_all_ranks_and_grows_with_its_files(tmp_path):
    ranks = run_ranks(3, bytes_of_checkpoint, tmp_path)
    assert len({expected for expected, _ in ranks}) == 1
    for expected, written in ranks:
        assert written < 2 * expected + 20_000  # with headers
        assert expected < 2 * written


# --- the message ----------------------------------------------------------------------------------

WAITS = Answer(
    "step 3, reduce",
    20.0,
    resting=False,
    waits=True,
    frame="comm.py:4 gather",
    stack=["run.py:1 main"],
)
BUSY = replace(
    WAITS,
    what="step 3, evaluate",
    waits=False,
    frame="data.py:104 __iter__",
    stack=["data.py:104 __iter__"],
)


def test_all_ranks_that_hang_are_named_with_their_lines():
    said = verdict({0: BUSY, 1: WAITS, 2: BUSY}, 3)
    place = "at step 3, evaluate, for 20 s, in data.py:104 __iter__"
    assert (
        f"ranks 0, 2 hang: rank 0 {place}; rank 2 {place}. The others wait for them. {AGAIN}"
        in said
    )


def test_ranks_that_do_not_answer_are_named_before_those_that_are_busy():
    said = verdict({1: BUSY, 2: WAITS}, 4)
    assert "ranks 0, 3 do not answer: their processes are stopped" in said
    assert "hang" not in said
    assert "The others wait" not in said, "rank 1 is busy"


def test_ranks_that_all_wait_are_listed_with_their_lines():
    said = verdict({0: WAITS, 1: replace(WAITS, frame="comm.py:9 barrier")}, 2)
    assert "all ranks wait for each other" in said
    assert "rank 0 at step 3, reduce, for 20 s, in comm.py:4 gather" in said
    assert "rank 1 at step 3, reduce, for 20 s, in comm.py:9 barrier" in said
