"""Part A of `benchmarks/attack.py`: signals at random moments of all kinds of run.

A trial starts a run, sends a signal after a random time, and repeats this up to three times. Then
it starts the run until it is finished. The run must have the weights, the log and the metrics of
the undisturbed run. The seed gives the moments in seconds, so that a trial strikes about the same
phases again, not the same instruction.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.distributed.attack_runs import (
    KINDS,
    LIMIT,
    LOG,
    RUN,
    Hooks,
    World,
    options,
    prepare,
    run,
    undisturbed,
)
from tests.distributed.attack_verdicts import (
    Attack,
    Ended,
    Verdict,
    compare,
    failed,
    is_finished,
    message,
    metrics_of,
    tracebacks,
)
from tests.distributed.command_line import MODEL
from tests.distributed.ranks import environment_of_ranks, free_port, master_port

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)
NOT_STRUCK = "ended before the signal"
MOST_STARTS = 5  # after the last signal
REPLICATED = "MeZO-SVRG, anchor on the CPU"
OF_LAUNCHER = REPLICATED


# --- ranks ----------------------------------------------------------------------------------------


def kill_trial(work: Path, name: str, seed: int) -> Verdict:
    """Signals to ranks of a run of the kind `name`.

    On a machine that has become faster since the undisturbed run, a run may end before its signal.
    It is then made again, with the signal earlier.
    """
    length = float((undisturbed(work, name) / "seconds").read_text())
    for part in (1.0, 0.5, 0.25):
        verdict = _kill_trial(work, name, seed, length * part)
        if NOT_STRUCK not in verdict.outcome:
            break
    return verdict


def _kill_trial(work: Path, name: str, seed: int, length: float) -> Verdict:
    """length: seconds within which the signals are sent."""
    rng, kind = random.Random(seed), KINDS[name]
    expected = undisturbed(work, name)
    here = work / "trial"
    shutil.rmtree(here, ignore_errors=True)
    prepare(here, kind)
    struck, output, planned = [], "", rng.choice((1, 1, 2, 3))
    again = rng.random() < 0.25  # start the finished run again
    for number in range(planned + MOST_STARTS):
        world = World(here, options(here, kind), kind.ranks)
        if number < planned:
            sent, rank = rng.choice(SIGNALS), rng.choice([None, *range(kind.ranks)])
            _sleep(rng.uniform(0.1, 1.0) * length, lambda: not world.is_alive)  # noqa: B023
            if world.signal(sent, rank):
                struck.append(f"{sent.name} of {'all ranks' if rank is None else f'rank {rank}'}")
        ended = world.wait()
        output += ended.output
        if ended.hung:
            return failed(f"start {number + 1} hangs", output)
        if number >= planned and not ended.succeeded:
            failure = f"start {number + 1} does not go on: {message(ended.output) or ended.codes}"
            return failed(failure, output)
        if is_finished(here / RUN):
            if not again:
                break
            again = False
    what = f"{', '.join(struck) or NOT_STRUCK}; {number + 1} starts"
    if not is_finished(here / RUN):
        return failed(f"{what}: not finished", output)
    return compare(here / RUN, expected / RUN, what, output)


def _sleep(seconds: float, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not until():
        time.sleep(0.01)


# --- the launcher ---------------------------------------------------------------------------------


def launcher_trial(work: Path, target: str, number: signal.Signals, seed: int) -> Verdict:
    """A signal to the `deepspeed` command ("runner"), to launch.py or to the ranks.

    In half of the trials it arrives while the ranks import, otherwise after some steps.
    """
    rng, kind = random.Random(seed), KINDS[OF_LAUNCHER]
    expected = undisturbed(work, OF_LAUNCHER)
    here = work / "trial"
    shutil.rmtree(here, ignore_errors=True)
    prepare(here, kind)
    early, steps, delay = rng.random() < 0.5, rng.randrange(1, 6), rng.uniform(0.0, 3.0)
    found: list[int] = []

    def strike(runner: subprocess.Popen[Any]) -> None:
        deadline = time.monotonic() + LIMIT
        while runner.poll() is None and time.monotonic() < deadline:
            found[:] = _targets(runner.pid, target)
            if found and (early or len(metrics_of(here / RUN)) >= steps):
                break
            time.sleep(0.02)
        time.sleep(delay if early else 0.0)
        for pid in found:
            _signal(pid, number)

    ended = launched(here, options(here, kind), strike)
    output = ended.output
    when = "while the ranks import" if early else f"after {steps} lines of metrics"
    what = f"{number.name} to {target} {when}; exit code {ended.codes[0]}"
    if ended.hung:
        failure = f"{what}: its ranks are left"
        return failed(failure, output)
    if early and target != "ranks" and is_finished(here / RUN):
        failure = f"{what}: the run went on to its end without its launcher"
        return failed(failure, output)
    for _ in range(MOST_STARTS):
        if is_finished(here / RUN):
            break
        again = run(here, options(here, kind), kind.ranks)
        output += again.output
        if not again.succeeded:
            failure = f"{what}: it does not go on: {message(again.output) or again.codes}"
            return failed(failure, output)
    return compare(here / RUN, expected / RUN, what, output)


def launched(
    folder: Path,
    words: list[str],
    strike: Callable[[subprocess.Popen[Any]], None],
    orphans_may_take: float = 120.0,
) -> Ended:
    """Start the run by the `deepspeed` command, call `strike`, and wait for all its processes.

    The start counts as hanging if processes are left `orphans_may_take` seconds after the command
    has ended.
    """
    began, command = time.monotonic(), str(Path(sys.executable).parent / "deepspeed")
    with master_port() as port, open(folder / "output-launcher", "w+") as output:
        process = subprocess.Popen(
            [*(command, "--num_gpus", "2", "--master_port", str(port)),
             *("--module", "zods.finetune"), *words],
            **{"env": environment_of_ranks(), "cwd": folder, "stdout": output},
            **{"stderr": subprocess.STDOUT, "start_new_session": True},
        )  # fmt: skip
        try:
            strike(process)
            hung = not _ended(process, LIMIT)
            deadline = time.monotonic() + orphans_may_take
            while (left := session_members(process.pid)) and time.monotonic() < deadline:
                time.sleep(0.1)
            hung = hung or bool(left)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        code = process.returncode
        return Ended((code,), output.read(), time.monotonic() - began, hung)


def _ended(process: subprocess.Popen[Any], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def session_members(session: int) -> list[int]:
    """The living processes of a session."""
    found = subprocess.run(["pgrep", "-s", str(session)], capture_output=True, text=True)
    return [pid for pid in map(int, found.stdout.split()) if not _is_zombie(pid)]


def _is_zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _targets(runner: int, target: str) -> list[int]:
    """The process ids of a signal's target; empty where they have not begun."""
    if target == "runner":
        return [runner] if children_of(runner) else []
    launchers = children_of(runner)[:1]
    if target == "launch.py":
        return launchers
    ranks = [rank for pid in launchers for rank in children_of(pid)]
    return ranks if len(ranks) == 2 else []


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# --- replicas -------------------------------------------------------------------------------------


def replica_trial(work: Path, victim: str, seed: int) -> Verdict:
    """Kill -9 of the "leader" or the "follower" of two replicas, which are started again.

    At the end the leader's export, the follower's and the replay of the leader's log must agree.
    """
    rng = random.Random(seed)
    kind = replace(
        KINDS[REPLICATED],
        section={**KINDS[REPLICATED].section, "replicas": {"silence_timeout": 3.0}},
        ranks=1,
    )
    here = work / "trial"
    shutil.rmtree(here, ignore_errors=True)
    address, worlds, output, starts = f"127.0.0.1:{free_port()}", {}, "", 0
    names = ("leader", "follower")
    for name in names:
        prepare(here / name, kind)

    def start(name: str) -> World:
        words = options(
            here / name, kind, max_steps=40, save_interval=10, eval_interval=None,
            replica=names.index(name), replica_store=address,
        )  # fmt: skip
        return World(here / name, words, 1, Hooks(pace=0.15))

    kills = [rng.uniform(1.0, 14.0) for _ in range(rng.choice((1, 2)))]
    strikes, began, deadline = 0, time.monotonic(), time.monotonic() + 2 * LIMIT
    done: dict[str, bool] = dict.fromkeys(names, False)
    refused = ""  # the message of a follower that could not join a living leader
    while not all(done.values()) and time.monotonic() < deadline:
        for name in names:
            if name not in worlds and not done[name]:
                worlds[name], starts = start(name), starts + 1
        if kills and time.monotonic() - began > kills[0]:
            strikes += victim in worlds and worlds[victim].signal(signal.SIGKILL)
            kills.pop(0)
            began = time.monotonic()
        for name in [name for name in worlds if not worlds[name].is_alive]:
            ended = worlds.pop(name).wait()
            output += f"--- {name}, codes {ended.codes}\n{ended.output}"
            said = message(ended.output) or f"codes {ended.codes}"
            # what a follower is told to do then is what happens here
            asked = ("no store can be reached", "Start this one again", "Start it again")
            early = any(text in said for text in asked)
            if name == victim == "follower" and ended.codes[0] > 0 and not early:
                refused = said
            # a follower that finds no leader any more cannot end well
            gone = name == "follower" and is_finished(here / "leader" / RUN)
            done[name] = is_finished(here / name / RUN) or gone or starts > 10
        time.sleep(0.02)
    for world in worlds.values():
        world.signal(signal.SIGKILL)
        world.wait()
    what = f"{strikes} kills of the {victim}, {starts} starts"
    if not is_finished(here / "leader" / RUN):
        return failed(f"{what}: not finished: {message(output)}", output)
    return _agreement(here, what, output, refused)


def _agreement(here: Path, what: str, output: str, refused: str) -> Verdict:
    """The verdict on replicas that have ended: their exports and the replay must be the same. A
    follower that was down at the leader's end has none.

    refused: the message of a follower that could not join, or "".
    """
    from safetensors.torch import load_file

    words = ["replay", "--base", MODEL, "--log", here / "leader" / LOG, "--out", here / "replayed"]
    replayed = World(here, list(map(str, words)), 1, program="trajectory").wait()
    output += replayed.output
    if not replayed.succeeded:
        failure = f"{what}: no replay: {message(replayed.output)}"
        return failed(failure, output)
    leader = load_file(here / "leader" / RUN / "model" / "model.safetensors")
    others = {"replay": here / "replayed", "follower": here / "follower" / RUN / "model"}
    odd = []
    for name, folder in others.items():
        if (folder / "model.safetensors").exists():
            there = load_file(folder / "model.safetensors")
            if any(not there[key].equal(leader[key]) for key in leader):
                odd.append(name)
    follower = is_finished(here / "follower" / RUN)
    if odd:
        text = f"{what}: SILENT, other weights: {', '.join(odd)}"
        return Verdict(text, 1, tracebacks(output), details=output[-6000:])
    agree = (
        "leader, follower and replay agree"
        if follower
        else "leader and replay agree, no follower at the end"
    )
    failure = f"{what}: a follower could not join: {refused}" if refused else ""
    seen = tracebacks(output)
    return Verdict(f"{what}: {agree}", 0, seen, failure, output[-6000:] if seen or failure else "")


# --- the trials -----------------------------------------------------------------------------------


QUICK = {
    *("MeZO-SVRG, anchor on NVMe", "parameters on NVMe", "bf16", "selector with weights"),
    *("LoRA", "AdamW, stage 1"),
}


def trials(number: int, *, quick: bool) -> list[Attack]:
    """The first `number` trials: ranks of each kind in turn, the launcher and the replicas.

    One trial in 10 strikes the launcher, one in 10 the replicas.
    """
    kinds = [name for name in KINDS if not quick or name in QUICK]
    launchers = [
        (target, sent)
        for sent in (signal.SIGTERM, signal.SIGKILL)
        for target in ("runner", "launch.py", "ranks")
    ]
    found: list[Attack] = []
    turn = {"launcher": 0, "replica": 0, "kind": 0}
    for k in range(number):
        label = f"kill trial {k + 1}"
        if k % 10 == 8:
            target, sent = launchers[turn["launcher"] % len(launchers)]
            turn["launcher"] += 1
            found.append(
                Attack(
                    f"{label}: launcher, {sent.name} to {target}",
                    lambda work, seed, t=target, s=sent: launcher_trial(work, t, s, seed),
                )
            )
        elif k % 10 == 6:
            victim = ("follower", "leader")[turn["replica"] % 2]
            turn["replica"] += 1
            found.append(
                Attack(
                    f"{label}: replicas, the {victim}",
                    lambda work, seed, v=victim: replica_trial(work, v, seed),
                )
            )
        else:
            name = kinds[turn["kind"] % len(kinds)]
            turn["kind"] += 1
            found.append(
                Attack(
                    f"{label}: {name}",
                    lambda work, seed, n=name: kill_trial(work, n, seed),
                )
            )
    return found
