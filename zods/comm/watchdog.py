"""A rank that hangs is named, and the run ends.

The main thread says what it begins (`beat`). Where that takes longer than the timeout on some rank,
all ranks' watchdog threads hold a roll call through the process group's store, which needs no main
thread: each pins up what its main thread does. A rank hangs if it does not answer, or else if its
main thread does not wait for other ranks. One message names such ranks; then every rank that
answered ends with EXIT_CODE.

Two threads per process: one counts the seconds and never touches the store, whose calls block for
ever while the process that keeps it (rank 0) is stopped; the other attends to the store.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, NoReturn

from zods.comm.communicator import Communicator
from zods.comm.store import Board

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not the user's mistake, try again
LOOK_SECONDS = 1.0
ANSWER_SECONDS = 4.0  # time for a rank to answer a call; it looks for one every LOOK_SECONDS
VERDICT_SECONDS = 3.0  # the other ranks wait so long for the rank that reports
# a rank stays so long after the verdict, until the others know the verdict, too; see `_end`
LINGER_SECONDS = 1.5
STORE_SECONDS = 5.0  # time for the store to take this rank's answer
WRITE_SECONDS = 2.0  # time for a write to standard output or error
ROLL_CALL_SECONDS = ANSWER_SECONDS + VERDICT_SECONDS + LINGER_SECONDS + 2 * WRITE_SECONDS

AGAIN = "The run stops here; start it again with the same command to go on."


class Watchdog:
    """Times what the main thread does, on all ranks of `comm`. One per process.

    timeout: seconds that one thing may take. Only time in which this process runs is counted: a job
    that is suspended as a whole and resumed does not count as hanging.
    """

    def __init__(self, comm: Communicator, timeout: float) -> None:
        self._watch = _Watch(comm, timeout)
        self._stop: weakref.finalize | None = None

    def beat(self, what: str) -> None:
        """The main thread begins `what`, e.g. "step 17, evaluate".

        The first beat starts the watch if there are others.
        """
        self._watch.beat = _Beat(what, resting=False)
        if self._stop is None:
            self._start()

    def rest(self) -> None:
        """Mark that no work is under way. This rank is not timed then, but it is named if others
        wait for it.
        """
        self._watch.beat = _Beat(self._watch.beat.what, resting=True)

    def close(self) -> None:
        """The watch ends. To be called before any rank ends: the store goes with rank 0, and torch
        complains where it is read.
        """
        if self._stop is not None:
            self._stop()

    def _start(self) -> None:
        # Threads must end before the interpreter does: one that returns from a call of the store
        # after that aborts the process. A finalizer is called then too, and where this object is
        # dropped.
        self._stop = weakref.finalize(self, self._watch.stop)
        self._watch.start()


class _Beat(NamedTuple):
    what: str
    resting: bool


@dataclass(frozen=True)
class Answer:
    """A rank's answer to a roll call: the state of its main thread.

    what: the last beat; seconds: since then; resting: after it. waits: for other ranks, in a
    collective. frame: "file:line function" of the innermost frame outside the libraries. stack:
    the same of all frames, innermost last.
    """

    what: str
    seconds: float
    resting: bool
    waits: bool
    frame: str
    stack: list[str]

    def __str__(self) -> str:
        return f"{'at rest after' if self.resting else 'at'} {self.what}, for {self.seconds:.0f} s, in {self.frame}"


class _Watch:
    """What the threads share.

    It does not refer to the Watchdog, so that this may be dropped while they run.
    """

    def __init__(self, comm: Communicator, timeout: float) -> None:
        self.comm = comm
        self.timeout = timeout
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
            # looks are counted, not read off a clock, which goes on while the process is stopped
            beat = self.beat
            self._seconds = self._seconds + LOOK_SECONDS if beat is self._seen else 0.0
            self._seen = beat
            if self._seconds > self.timeout and not beat.resting:
                break
        else:
            return
        self._late.set()
        if self._answered.wait(STORE_SECONDS):
            self._attendant.join(ROLL_CALL_SECONDS)
        _end(
            "zods: rank 0, which keeps the process group's store, does not answer: its process is "
            f"stopped or gone, or its host is. Rank {self.comm.rank} is {self._answer()}. {AGAIN}"
        )

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
        """Answer, and let the lowest rank that answers report; the next one, where that one dies
        over it.
        """
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

    `answers`: of the ranks that answered, at least one.
    """
    silent = [rank for rank in range(world_size) if rank not in answers]
    busy = [rank for rank, answer in answers.items() if not answer.waits]
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
            said = f"{_names(busy)} hang: {'; '.join(f'rank {rank} {answers[rank]}' for rank in busy)}."
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
    """Whether a stack, of these modules from the outermost to the innermost, waits for other ranks.

    What ZeRO-3 gathers is awaited on handles, without a frame of torch.distributed. On a GPU a
    collective returns before it is done, and the main thread waits for the device where it needs
    the numbers: those of zods' own in `zods.comm.communicator`.
    """
    sends = any(
        (module + ".").startswith(
            (
                "torch.distributed.",
                "deepspeed.comm.",
                "zods.comm.communicator.",
                "zods.training.replicas.",
            )
        )
        for module in modules
    )
    # its wrappers may be innermost
    return sends or "deepspeed.runtime.zero.partition_parameters" in modules[-3:]


def _of_a_library(module: str) -> bool:
    top = module.split(".")[0]
    return top in ("torch", "deepspeed") or (top in sys.stdlib_module_names and top != "__main__")


def _described(frame: Any, line: int) -> str:
    # Without the line's text: reading the file may hang, like what the main thread waits for.
    return f"{os.path.basename(frame.f_code.co_filename)}:{line} {frame.f_code.co_name}"


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true within that time."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return met


def _say(text: str) -> None:
    _within(WRITE_SECONDS, os.write, 2, f"{text}\n".encode())


def _within(seconds: float, function: Callable[..., Any], *args: Any) -> None:
    """Call it, but wait no longer: nobody may read the pipe, and the main thread may hold the lock
    of `sys.stdout`.
    """
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    thread.join(seconds)


def _end(text: str = "") -> NoReturn:
    """End the process, with the main thread held: as other ranks end, its connections break, and
    its errors would follow the message and give the launcher another exit code."""
    if text:
        _say(text)
    _within(WRITE_SECONDS, sys.stdout.flush)
    # nobody takes the interpreter's lock from a thread that keeps it so long
    sys.setswitchinterval(2 * LINGER_SECONDS)
    until = time.monotonic() + LINGER_SECONDS
    while time.monotonic() < until:
        pass
    os._exit(EXIT_CODE)
