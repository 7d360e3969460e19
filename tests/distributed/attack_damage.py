"""Part B of `benchmarks/attack.py`: second starts, lost and foreign files, other data and models.

Each attack ends as the undisturbed run, or with one message that names what is wrong. A run that
ends otherwise without a message has changed its result in silence.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed.attack_runs import (
    KINDS,
    LIMIT,
    LOG,
    RUN,
    Hooks,
    World,
    copy_of,
    fill_disk,
    interrupted,
    options,
    prepare,
    rows_of,
    run,
    small_disk,
    undisturbed,
)
from tests.distributed.attack_verdicts import (
    Attack,
    Verdict,
    judged,
    message,
    metrics_of,
    together,
    tracebacks,
)
from tests.distributed.command_line import MODEL, write_rows
from tests.helpers import flip

PACE = 0.3  # seconds that a step takes longer, so that an attack arrives during the steps
MEZO, ADAMW = "MeZO", "AdamW, stage 1"
CHECKPOINTS = Path(RUN) / "checkpoints"


def wait_for_steps(folder: Path, number: int, world: World) -> None:
    deadline = time.monotonic() + LIMIT
    while world.is_alive and time.monotonic() < deadline:
        with contextlib.suppress(ValueError):
            if sum(r["kind"] == "train" for r in metrics_of(folder)) >= number:
                return
        time.sleep(0.02)


def fresh(work: Path, name: str, nvme: Path | None = None, folder: str = "trial") -> Path:
    here = work / folder
    shutil.rmtree(here, ignore_errors=True)
    prepare(here, KINDS[name], nvme)
    return here


# --- several starts -------------------------------------------------------------------------------


def second_start(work: Path, seed: int, name: str) -> Verdict:
    """The same command while the run is under way."""
    expected, here, kind = undisturbed(work, name), fresh(work, name), KINDS[name]
    first = World(here, options(here, kind), kind.ranks, Hooks(pace=PACE))
    wait_for_steps(here / RUN, 2, first)
    second = World(here, options(here, kind), kind.ranks)
    ended = [first.wait(), second.wait()]
    return together([judged(of, here / RUN, expected / RUN) for of in ended])


def one_nvme_path(work: Path, seed: int, name: str) -> Verdict:
    """A run with the nvme_path of a run that is under way."""
    kind, path = KINDS[name], work / "shared nvme"
    expected = undisturbed(work, name)
    shutil.rmtree(path, ignore_errors=True)
    folders = [fresh(work, name, path, f"trial {k}") for k in range(2)]
    worlds = []
    for here in folders:
        worlds.append(World(here, options(here, kind), kind.ranks, Hooks(pace=PACE)))
        if here == folders[0]:
            wait_for_steps(here / RUN, 2, worlds[0])
    return together(
        [
            judged(world.wait(), here / RUN, expected / RUN)
            for world, here in zip(worlds, folders, strict=True)
        ]
    )


def two_new_starts(work: Path, seed: int, forked: bool) -> Verdict:
    """Two starts at once in one new folder, with other step sizes. One of them may run.

    forked: both start from the checkpoint of another run.
    """
    here, kind = fresh(work, MEZO), KINDS[MEZO]
    source = str(interrupted(work, MEZO) / RUN) if forked else None
    rates = (1e-3, 2e-3)
    worlds = [
        World(here, options(here, kind, resume=source, lr=lr), kind.ranks, Hooks(pace=PACE / 3))
        for lr in rates
    ]
    ended = [world.wait() for world in worlds]
    output = "\n".join(of.output for of in ended)
    seen, won = tracebacks(output), [of.succeeded for of in ended]
    if any(of.hung for of in ended):
        return Verdict("", 0, seen, "hangs", output[-6000:])
    if all(won):
        return Verdict("SILENT: both ran in one folder", 1, seen, details=output[-6000:])
    losers = [of for of in ended if not of.succeeded]
    unsaid = [of.codes for of in losers if not message(of.output)]
    if unsaid or not any(won):
        failure = f"ended without a message: {unsaid}" if unsaid else "none of the two runs"
        return Verdict("", 0, seen, failure, output[-6000:])
    from zods.trajectory.log import read_log

    last = read_log(here / LOG).run_at_end()
    written = json.loads((here / RUN / "config.json").read_text())["zeroth_order"]["lr"]
    lr = rates[won.index(True)]
    steps = [r["step"] for r in metrics_of(here / RUN) if r["kind"] == "train"]
    if last is None or not last.section.lr == written == lr or len(steps) != len(set(steps)):
        text = f"SILENT: log of lr {last and last.section.lr}, config.json of {written}, run {lr}"
        return Verdict(text, 1, seen, details=output[-6000:])
    return Verdict(f"one runs, the other refused: {message(losers[0].output)}", 0, seen)


# --- damage before a restart ----------------------------------------------------------------------


def restarted(
    work: Path,
    seed: int,
    name: str,
    damage: Callable[[Path, random.Random], Any],
    *,
    told: str = "",
    must_differ: bool = False,
    **changes: Any,
) -> Verdict:
    """Damage the folder of an interrupted run, and start it again, with changed options."""
    kind, expected = KINDS[name], undisturbed(work, name)
    here = copy_of(interrupted(work, name), work / "trial", kind)
    ranks = changes.pop("ranks", kind.ranks)
    changed = damage(here, random.Random(seed))
    words = options(here, kind, **changes, **(changed or {}))
    ended = run(here, words, ranks)
    return judged(ended, here / RUN, expected / RUN, told=told, must_differ=must_differ)


def with_log(content: Callable[[bytes], bytes | None]) -> Callable[[Path, random.Random], None]:
    def damage(here: Path, rng: random.Random) -> None:
        data = content((here / LOG).read_bytes())
        (here / LOG).unlink()
        if data is not None:
            (here / LOG).write_bytes(data)

    return damage


LOGS: dict[str, Callable[[bytes], bytes | None]] = {
    "lost": lambda data: None,
    "empty": lambda data: b"",
    "zeroed": lambda data: bytes(len(data)),
    "of another program": lambda data: b"notes on trajectories\n" * 20,
    "without newlines": lambda data: data.replace(b"\n", b" "),
    "cut in its first line": lambda data: data[:100],
    "cut after its header": lambda data: data.partition(b"\n")[0] + b"\n",
    "without its last line": lambda data: b"".join(data.splitlines(keepends=True)[:-1]),
}


def files_of_another_checkpoint(here: Path, rng: random.Random) -> None:
    old, new = (here / CHECKPOINTS / f"global_step{step}" for step in (3, 6))
    names = [p.name for p in sorted(old.iterdir()) if p.suffix in (".safetensors", ".pt")]
    name = rng.choice([name for name in names if "rank" in name and "model_states" not in name])
    shutil.copy(old / name, new / name)


def flip_in(pattern: str) -> Callable[[Path, random.Random], None]:
    """Flip a bit in the middle half of a file of the newest checkpoint."""

    def damage(here: Path, rng: random.Random) -> None:
        path = rng.choice(sorted((here / CHECKPOINTS / "global_step6").glob(pattern)))
        size = path.stat().st_size
        flip(path, rng.randrange(size // 4, 3 * size // 4))

    return damage


def latest_is(content: bytes | None) -> Callable[[Path, random.Random], None]:
    def damage(here: Path, rng: random.Random) -> None:
        latest = here / CHECKPOINTS / "latest"
        latest.unlink()
        if content is not None:
            latest.write_bytes(content)

    return damage


def one_example_replaced(here: Path, rng: random.Random) -> None:
    rows = rows_of(KINDS[MEZO])
    rows[rng.randrange(len(rows))]["text"] = "print another value"
    write_rows(here / "train.jsonl", rows)


def all_examples_replaced(here: Path, rng: random.Random) -> None:
    rows = rows_of(KINDS[ADAMW])
    write_rows(here / "train.jsonl", [{**row, "text": f"add {row['text']}"} for row in rows])


def other_model(**changes: Any) -> Callable[[Path, random.Random], dict[str, Any]]:
    """Continue with a copy of the model whose config.json has other values."""

    def damage(here: Path, rng: random.Random) -> dict[str, Any]:
        folder = here / "model"
        shutil.copytree(MODEL, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return {"model": folder}

    return damage


def state_as_pipe(here: Path, rng: random.Random) -> None:
    path = here / CHECKPOINTS / "global_step6" / "state.json"
    path.unlink()
    os.mkfifo(path)


def no_state(here: Path, rng: random.Random) -> None:
    (here / CHECKPOINTS / "global_step6" / "state.json").unlink()


def nothing(here: Path, rng: random.Random) -> None:
    pass


def another_number_of_ranks(work: Path, seed: int) -> Verdict:
    """MeZO on one rank in place of two: the same values up to rounding."""
    from safetensors.torch import load_file

    verdict = restarted(work, seed, MEZO, nothing, ranks=1, told=".")
    runs = (work / "trial" / RUN, undisturbed(work, MEZO) / RUN)
    if not all((of / "model").is_dir() for of in runs):
        return verdict
    ours, theirs = (load_file(of / "model" / "model.safetensors") for of in runs)
    most = max(float((ours[key] - theirs[key]).abs().max()) for key in ours)
    if most > 1e-4:
        return Verdict(f"SILENT: weights differ by {most:.1e}", 1, verdict.traceback)
    return Verdict(f"goes on; weights differ by {most:.1e}", 0, verdict.traceback)


def a_finished_run(work: Path, seed: int, name: str) -> Verdict:
    """A finished run that is started again."""
    kind, expected = KINDS[name], undisturbed(work, name)
    here = copy_of(expected, work / "trial", kind)
    return judged(run(here, options(here, kind), kind.ranks), here / RUN, expected / RUN)


def symlinked_config(work: Path, seed: int) -> Verdict:
    """config.json of the run's folder is a link to a file outside it."""
    expected, here, kind = undisturbed(work, MEZO), fresh(work, MEZO), KINDS[MEZO]
    (here / RUN).mkdir()
    outside = here / "outside.json"
    outside.write_text("mine")
    (here / RUN / "config.json").symlink_to(outside)
    verdict = judged(run(here, options(here, kind), kind.ranks), here / RUN, expected / RUN)
    if outside.read_text() != "mine":
        return together([verdict, Verdict("SILENT: the linked file was written over", 1)])
    return verdict


# --- damage while the run is under way ------------------------------------------------------------


def under_way(
    work: Path, seed: int, name: str, damage: Callable[[Path, random.Random], None]
) -> Verdict:
    """Damage the folder of a run that has made two steps. If it ends, start it again."""
    expected, here, kind = undisturbed(work, name), fresh(work, name), KINDS[name]
    world = World(here, options(here, kind), kind.ranks, Hooks(pace=PACE))
    wait_for_steps(here / RUN, 2, world)
    damage(here, random.Random(seed))
    ended = world.wait()
    first = judged(ended, here / RUN, expected / RUN)
    if ended.succeeded or ended.hung:
        return first
    again = run(here, options(here, kind), kind.ranks)  # what was logged must be right
    return together([first, judged(again, here / RUN, expected / RUN)])


def remove_log(here: Path, rng: random.Random) -> None:
    (here / LOG).unlink()


def remove_folder(here: Path, rng: random.Random) -> None:
    shutil.rmtree(here / RUN)


def overwrite(pattern: str, size: int = 8192) -> Callable[[Path, random.Random], None]:
    """Write random bytes over a part of a file below the folder of the drive."""

    def damage(here: Path, rng: random.Random) -> None:
        path = rng.choice(sorted((here / "nvme").glob(pattern)))
        with open(path, "r+b") as file:
            file.seek(rng.randrange(path.stat().st_size // 2))
            file.write(rng.randbytes(size))

    return damage


def truncate(pattern: str) -> Callable[[Path, random.Random], None]:
    def damage(here: Path, rng: random.Random) -> None:
        path = rng.choice(sorted((here / "nvme").glob(pattern)))
        os.truncate(path, path.stat().st_size // 2)

    return damage


# --- full disks -----------------------------------------------------------------------------------


def full_disk(work: Path, seed: int, name: str, method: str) -> Verdict:
    """The disk is full when a method of the engine writes. With room the run can be started again."""
    expected, here, kind = undisturbed(work, name), fresh(work, name), KINDS[name]
    with small_disk(here / "disk", 96) as disk:
        words = options(here, kind, output_dir=disk / RUN)
        ended = run(here, words, kind.ranks, Hooks(fill=str(disk), fill_at=method))
        first = judged(ended, disk / RUN, expected / RUN)
        named = str(disk) in message(ended.output)
        (disk / "filler").unlink(missing_ok=True)
        second = judged(run(here, words, kind.ranks), disk / RUN, expected / RUN)
    if not named and not first.failure:
        first = together([first, Verdict("", 0, 0, "the message names no path")])
    return together([first, second])


def full_disk_of_a_command(work: Path, seed: int, command: str) -> Verdict:
    """The disk is full when `python -m zods.trajectory` writes."""
    expected, here = undisturbed(work, MEZO), fresh(work, MEZO)
    log = expected / LOG
    with small_disk(here / "disk", 2) as disk:
        if command == "merge":
            fill_disk(disk)
        words = {
            "replay": ["replay", "--base", MODEL, "--log", log, "--out", disk / "out"],
            "merge": ["merge", log, log, "--out", disk / "merged.log"],
        }[command]
        ended = World(here, list(map(str, words)), 1, program="trajectory").wait()
        left = [p.name for p in disk.rglob("*") if p.is_file() and not p.name.startswith(".")]
    seen, said = tracebacks(ended.output), message(ended.output)
    odd = [name for name in left if name.endswith((".safetensors", ".log"))]
    if ended.succeeded or odd:
        text = f"SILENT: exit code {ended.codes[0]}, left {', '.join(odd)}"
        return Verdict(text, 1, seen, details=ended.output[-3000:])
    failure = "" if said and str(disk) in said else f"no message that names the path: {said}"
    return Verdict(f"refused: {said}", 0, seen, failure, ended.output[-3000:] if seen else "")


# --- the list -------------------------------------------------------------------------------------


def _restart(
    name: str, kind: str, damage: Callable[..., Any], quick: bool = False, **others: Any
) -> Attack:
    return Attack(name, lambda work, seed: restarted(work, seed, kind, damage, **others), quick)


_LR = r"lr\b.*(0\.002|2e-0?3)"
_SWAP = "zods_run_*/**/rank0/*.swp"
ATTACKS: list[Attack] = [
    *(
        Attack(f"second start: {name}", lambda work, seed, n=name: second_start(work, seed, n), quick)
        for name, quick in ((MEZO, True), ("parameters on NVMe", True), (ADAMW, False))
    ),
    *(
        Attack(f"one nvme_path: {name}", lambda work, seed, n=name: one_nvme_path(work, seed, n), quick)
        for name, quick in (("parameters on NVMe", True), ("MeZO-SVRG, anchor on NVMe", False))
    ),
    Attack("two new starts at once", lambda work, seed: two_new_starts(work, seed, False), True),
    Attack("two forks at once", lambda work, seed: two_new_starts(work, seed, True)),
    _restart("a file of another checkpoint: MeZO", MEZO, files_of_another_checkpoint, True),
    _restart("a file of another checkpoint: AdamW", ADAMW, files_of_another_checkpoint, True),
    *(
        _restart(f"the log is {how}", MEZO, with_log(content), how in ("lost", "zeroed"))
        for how, content in LOGS.items()
    ),
    *(
        _restart(f"the log is {how}: AdamW", ADAMW, with_log(content))
        for how, content in LOGS.items() if how in ("lost", "without newlines")
    ),
    Attack("log removed under way", lambda work, seed: under_way(work, seed, MEZO, remove_log)),
    Attack("run folder removed under way",
           lambda work, seed: under_way(work, seed, MEZO, remove_folder), True),
    Attack("run folder removed under way: AdamW",
           lambda work, seed: under_way(work, seed, ADAMW, remove_folder)),
    Attack("8 KiB of a swap file overwritten",
           lambda work, seed: under_way(work, seed, "parameters on NVMe", overwrite(_SWAP)), True),
    Attack("a swap file truncated",
           lambda work, seed: under_way(work, seed, "parameters on NVMe", truncate(_SWAP))),
    Attack("8 KiB of the anchor overwritten",
           lambda work, seed: under_way(work, seed, "MeZO-SVRG, anchor on NVMe",
                                        overwrite("zods_anchor/rank0/*.bin"))),
    _restart("one of 200 examples replaced", MEZO, one_example_replaced, True),
    _restart("all examples replaced: AdamW", ADAMW, all_examples_replaced),
    _restart("other hidden_act", MEZO, other_model(hidden_act="gelu"), True),
    _restart("other rms_norm_eps", MEZO, other_model(rms_norm_eps=1e-3)),
    _restart("other rope_theta", MEZO,
             other_model(rope_parameters={"rope_theta": 500.0, "rope_type": "default"})),
    _restart("other hidden_act: AdamW", ADAMW, other_model(hidden_act="gelu")),
    _restart("a bit flipped in the optimizer's file", ADAMW, flip_in("*optim_states.pt"), True),
    _restart("a bit flipped in the model's states: AdamW", ADAMW, flip_in("*model_states.pt")),
    _restart("a bit flipped in a shard", MEZO, flip_in("parameters-rank*.safetensors")),
    _restart("other lr", MEZO, nothing, True, told=_LR, must_differ=True, lr=2e-3),
    _restart("other lr: AdamW", ADAMW, nothing, told=_LR, must_differ=True, lr=2e-3),
    Attack("another number of ranks", another_number_of_ranks),
    _restart("another number of ranks: AdamW", ADAMW, nothing, True, ranks=1),
    *(
        _restart(f"latest {how}: {kind}", kind, latest_is(content), kind == ADAMW and how == "empty")
        for kind in (MEZO, ADAMW)
        for how, content in (("empty", b""), ("missing", None), ("foreign", b"../../x\n\0\xff"))
    ),
    _restart("state.json is a named pipe", MEZO, state_as_pipe),
    _restart("state.json missing", MEZO, no_state),
    *(
        Attack(f"a finished run again: {name}",
               lambda work, seed, n=name: a_finished_run(work, seed, n), name == MEZO)
        for name in (MEZO, ADAMW)
    ),
    Attack("config.json is a link", symlinked_config),
    *(
        Attack(f"full disk at {method}: {name}",
               lambda work, seed, n=name, m=method: full_disk(work, seed, n, m), quick, is_root=True)
        for name, method, quick in (
            (MEZO, "save_pretrained", True), (MEZO, "save_checkpoint", False),
            (ADAMW, "save_pretrained", False), (ADAMW, "save_checkpoint", True),
        )
    ),
    *(
        Attack(f"full disk at {command}",
               lambda work, seed, c=command: full_disk_of_a_command(work, seed, c), True, is_root=True)
        for command in ("replay", "merge")
    ),
]  # fmt: skip
