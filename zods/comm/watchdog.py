"""Find the rank that hangs, name it, and end the run.

The main thread reports what it begins (`beat`). If one such thing takes longer than its limit on
some rank, the watchdog threads of all ranks hold a roll call: each writes the state of its main
thread to the process group's store. A rank hangs if it does not answer. If all answer, those hang
whose main thread does not wait for other ranks. One message names them, and every rank that
answered ends with EXIT_CODE. A run of one rank reports itself.

Each process has two threads. The clock counts seconds and never uses the store, because calls of
the store block while the process that keeps it (rank 0) is stopped. The attendant uses the store.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, NoReturn

from zods.comm.communicator import Communicator
from zods.comm.process import write_exit_status
from zods.comm.stop_request import EXIT_CODE
from zods.comm.store import Board

LOOK_SECONDS = 1.0
ANSWER_SECONDS = 4.0  # for a rank to answer a call; it looks for one every LOOK_SECONDS
VERDICT_SECONDS = 3.0  # for the rank that reports to write the message
LINGER_SECONDS = 1.5  # between the verdict and the process's end, for the others to read it
STORE_SECONDS = 5.0  # time for the store to take this rank's answer
WRITE_SECONDS = 2.0  # time for a write to standard output or error, or of the exit status
SLOWEST_DISK = 10e6  # bytes per second that a rank can write, at least
ROLL_CALL_SECONDS = ANSWER_SECONDS + VERDICT_SECONDS + LINGER_SECONDS + 3 * WRITE_SECONDS

AGAIN = "The run stops here; start it again with the same command to go on."


class Watchdog:
    """Times the main thread's work on each rank of `comm`. One per process is open at a time.

    timeout: seconds from one beat to the next, where the beat has no limit of its own. Time in
    which the process is stopped does not count: a job that is suspended as a whole and resumed does
    not hang.
    """

    def __init__(self, comm: Communicator, timeout: float) -> None:
        self.timeout = timeout
        self._watch = _Watch(comm)
        self._stop: weakref.finalize | None = None

    def beat(self, what: str, limit: float | None = None) -> None:
        """Report that the main thread begins `what`, e.g. "step 17, evaluate".

        limit: seconds that it may take, the same on all ranks; default: the timeout. The first beat
        starts the threads.
        """
        self._watch.beat = _Beat(what, False, self.timeout if limit is None else limit)
        if self._stop is None:
            self._start()

    def renew(self) -> None:
        """Report that the main thread goes on with what it began: its time starts anew.

        Of no effect at rest.
        """
        beat = self._watch.beat
        if not beat.resting:
            self._watch.beat = _Beat(*beat)

    def rest(self) -> None:
        """Report that no work is under way. This rank is then not timed, but it is named if others
        wait for it.
        """
        self._watch.beat = _Beat(self._watch.beat.what, resting=True)

    @contextmanager
    def watching(
        self, what: str, *, limit: float | None = None, num_bytes: int = 0
    ) -> Iterator[None]:
        """Watch a block, and rest after it.

        what, limit: as of `beat`. num_bytes: that the slowest rank writes in the block; they add to
        the limit.
        """
        seconds = self.timeout if limit is None else limit
        self.beat(what, seconds + num_bytes / SLOWEST_DISK)
        try:
            yield
        finally:
            self.rest()

    def close(self) -> None:
        """Stop the threads. Call it before any rank ends: the store ends with rank 0, and torch
        warns where it is read afterwards.
        """
        if self._stop is not None:
            self._stop()

    def _start(self) -> None:
        # The threads must end before the interpreter: a thread that returns from a call of the
        # store later aborts the process. A finalizer runs in time, and also when this object is
        # dropped.
        self._stop = weakref.finalize(self, self._watch.stop)
        self._watch.start()


class _Beat(NamedTuple):
    what: str
    resting: bool
    limit: float = math.inf


@dataclass(frozen=True)
class Answer:
    """A rank's answer to a roll call: the state of its main thread.

    what: the last beat. seconds: since that beat. resting: whether `rest` followed it. waits:
    whether the main thread waits for other ranks, in a collective. frame: "file:line function" of
    the innermost frame outside the libraries. stack: the same for all frames, innermost last.
    """

    what: str
    seconds: float
    resting: bool
    waits: bool
    frame: str
    stack: list[str]

    def __str__(self) -> str:
        at = "at rest after" if self.resting else "at"
        return f"{at} {self.what}, for {self.seconds:.0f} s, in {self.frame}"


class _Watch:
    """The state that the threads share.

    It has no reference to the Watchdog, so that the Watchdog can be dropped while the threads run.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.beat = _Beat("the start", resting=True)
        # the beat that the clock saw last, and for how long
        self._seen, self._seconds = self.beat, 0.0
        self._over = threading.Event()
        self._late = threading.Event()
        self._answered = threading.Event()
        self._clock = threading.Thread(target=self._count, name="zods-watchdog-clock", daemon=True)
        self._attendant = threading.Thread(
            target=self._attend, name="zods-watchdog-attendant", daemon=True
        )

    def start(self) -> None:
        if self.comm.world_size > 1:
            self._attendant.start()
        self._clock.start()

    def stop(self) -> None:
        self._over.set()
        self._late.set()  # wakes the attendant
        for thread in (self._clock, self._attendant):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(LOOK_SECONDS)

    def _count(self) -> None:
        """Run the clock thread: start a roll call if the main thread is late, and end the process
        if the attendant cannot.
        """
        while not self._over.wait(LOOK_SECONDS):
            # seconds are counted here, because a clock also runs while the process is stopped
            beat = self.beat
            self._seconds = self._seconds + LOOK_SECONDS if beat is self._seen else 0.0
            self._seen = beat
            if self._seconds > beat.limit and not beat.resting and self._is_at_work():
                break
        else:
            return
        if self.comm.world_size == 1:
            _say(verdict({0: self._answer()}, 1))
            _end()
        self._late.set()
        if self._answered.wait(STORE_SECONDS):
            self._attendant.join(ROLL_CALL_SECONDS)
        _end(
            "zods: rank 0, which keeps the process group's store, does not answer: its process is "
            f"stopped or gone, or its host is. Rank {self.comm.rank} is {self._answer()}. {AGAIN}"
        )

    def _is_at_work(self) -> bool:
        """Whether the main thread may hang. With one rank an exception may have ended what it did;
        then it is outside of zods, perhaps at a prompt.
        """
        innermost = sys._current_frames().get(threading.main_thread().ident or 0)
        modules = [
            frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_stack(innermost)
        ]
        return self.comm.world_size > 1 or any(module.startswith("zods.") for module in modules)

    def _attend(self) -> None:
        """Run the attendant thread: wait for a call, this rank's or another's, and answer it."""
        try:
            board = self.comm.board()
            while not self._late.wait(LOOK_SECONDS) and board.read("call") is None:
                pass
            if self._over.is_set():
                return
            board.pin("call", str(self.comm.rank))
            self._roll_call(board)
        except RuntimeError:
            if not self._answered.is_set():
                return
        _end()

    def _roll_call(self, board: Board) -> None:
        """Answer. The lowest rank that answers reports; if it ends before it has, another does."""
        me, ranks = self.comm.rank, range(self.comm.world_size)
        board.pin(f"answer/{me}", json.dumps(asdict(self._answer())))
        self._answered.set()
        _until(lambda: board.has(*(f"answer/{rank}" for rank in ranks)), ANSWER_SECONDS)
        first = next(rank for rank in ranks if rank == me or board.has(f"answer/{rank}"))
        if first != me and _until(lambda: board.has("verdict"), VERDICT_SECONDS):
            return
        if not board.first("reporter"):
            return
        texts = {rank: board.read(f"answer/{rank}") for rank in ranks}
        answers = {
            rank: Answer(**json.loads(text)) for rank, text in texts.items() if text is not None
        }
        _say(verdict(answers, len(ranks)))
        board.pin("verdict", "")

    def _answer(self) -> Answer:
        beat = self.beat
        innermost = sys._current_frames().get(threading.main_thread().ident or 0)
        walk = [] if innermost is None else list(traceback.walk_stack(innermost))[::-1]
        frames = [
            (frame.f_globals.get("__name__", ""), _described(frame, line)) for frame, line in walk
        ]
        own = [described for module, described in frames if not _of_a_library(module)]
        stack = [described for _, described in frames]
        return Answer(
            what=beat.what,
            seconds=round(self._seconds, 1) if beat is self._seen else 0.0,
            resting=beat.resting,
            waits=_waits([module for module, _ in frames]),
            frame=(own or stack or ["an unknown place"])[-1],
            stack=stack,
        )


def verdict(answers: Mapping[int, Answer], world_size: int) -> str:
    """The message that names the ranks that hang.

    answers: per rank that answered, at least one.
    """
    silent = [rank for rank in range(world_size) if rank not in answers]
    # a single rank may wait for other replicas, or for itself
    busy = [rank for rank, answer in answers.items() if not answer.waits or world_size == 1]
    if not silent and not busy:
        each = "\n".join(f"  rank {rank} {answer}" for rank, answer in answers.items())
        return (
            "zods: all ranks wait for each other: they are in different collectives, or a "
            "connection or a device is gone. "
            f"{AGAIN}\n{each}"
        )
    if silent:
        culprits, several = silent, len(silent) > 1
        said = (
            f"{_names(silent)} {'do' if several else 'does'} not answer: "
            f"{'their' if several else 'its'} {'processes are' if several else 'process is'} "
            "stopped or swapped out, or the host is gone."
        )
    else:
        culprits, several = busy, len(busy) > 1
        if several:
            each = "; ".join(f"rank {rank} {answers[rank]}" for rank in busy)
            said = f"{_names(busy)} hang: {each}."
        else:
            said = f"{_names(busy)} hangs: {answers[busy[0]]}."
    others = [rank for rank in answers if rank not in culprits]
    if others and all(answers[rank].waits for rank in others):
        said += f" The others wait for {'them' if several else 'it'}."
    shown = culprits[0] if culprits[0] in answers else min(answers)
    stack = "\n".join(f"  {frame}" for frame in answers[shown].stack)
    return f"zods: {said} {AGAIN}\nRank {shown}'s main thread, innermost last:\n{stack}"


def _names(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _waits(modules: list[str]) -> bool:
    """Whether a stack waits for other ranks. modules: of its frames, the innermost last.

    ZeRO-3 waits for its gathers on handles, without a frame of torch.distributed. On a GPU a
    collective returns before it is done; the main thread waits where it reads the numbers, for
    those of zods in `zods.comm.communicator`.
    """
    sends = any(
        (module + ".").startswith(
            (
                "torch.distributed.",
                "deepspeed.comm.",
                "zods.comm.communicator.",
                "zods.training.replica",
            )
        )
        for module in modules
    )
    # the innermost frames may be wrappers
    return sends or "deepspeed.runtime.zero.partition_parameters" in modules[-3:]


def _of_a_library(module: str) -> bool:
    top = module.split(".")[0]
    return top in ("torch", "deepspeed") or (top in sys.stdlib_module_names and top != "__main__")


def _described(frame: Any, line: int) -> str:
    # without the text of the line: to read the file may hang, too
    return f"{os.path.basename(frame.f_code.co_filename)}:{line} {frame.f_code.co_name}"


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition. Returns whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return met


def _say(text: str) -> None:
    _within(WRITE_SECONDS, os.write, 2, f"{text}\n".encode())


def _within(seconds: float, function: Callable[..., Any], *args: Any) -> None:
    """Call a function in a thread, and wait for it at most so long.

    A write can block for ever: nobody may read the pipe, or the main thread may hold the lock of
    `sys.stdout`.
    """
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    thread.join(seconds)


def _end(text: str = "") -> NoReturn:
    """End the process, and keep its main thread from running until then.

    When other ranks end, the main thread's connections break. Its errors would be printed after the
    message, and would give the launcher another exit code.
    """
    if text:
        _say(text)
    _within(WRITE_SECONDS, write_exit_status, EXIT_CODE)
    _within(WRITE_SECONDS, sys.stdout.flush)
    # no other thread gets the interpreter's lock within that interval
    sys.setswitchinterval(2 * LINGER_SECONDS)
    until = time.monotonic() + LINGER_SECONDS
    while time.monotonic() < until:
        pass
    os._exit(EXIT_CODE)
