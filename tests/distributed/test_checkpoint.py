"""Checkpoints: save and load on the same or another number of ranks, and export.

Also damaged checkpoints, crashes in a save, and full disks.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zods
from tests.distributed.models import (
    ANNEALED_SVRG,
    WARMUP,
    Tiny,
    anchor_point,
    batches_ahead,
    configuration,
    numpy_of,
    opt_data,
    sha256,
    state,
    tiny_data,
    tiny_opt,
    train,
    whole,
)
from tests.distributed.ranks import run_ranks
from tests.helpers import asked_for, flip, sampled
from zods.core.estimators import Term, Update
from zods.training.checkpoint_files import newest_checkpoints

BATCH = 12
# Arguments of `configuration` by name. Each of these runs is saved in the middle of an epoch, and
# between two refreshes of the anchor.
RUNS: dict[str, dict[str, Any]] = {
    "point stored": {"anchor": {"point": "cpu", "gradient": "cpu"}},
    "point on nvme": {"anchor": {"point": "nvme", "gradient": "nvme"}},
    "point as terms": {
        "anchor": {"point": "terms", "gradient": "terms"},
        "weight_decay": 0.2,
        "normalize": True,
    },
    "bf16": {
        "bf16": True,
        "anchor": {"point": "cpu", "gradient": "terms"},
        "anchor_weight": "auto",
    },
    "stage 0": {"stage": 0, "anchor": {"point": "device", "gradient": "cpu"}},
    "direction per example": {
        "anchor": {"point": "cpu", "gradient": "terms"},
        "anchor_directions": 2,
        "anchor_weight": "auto",
        "direction": {"distribution": "low_rank", "rank": 2},
        "examples_per_direction": 1,
    },
}
DEFAULT = tuple(name for name in RUNS if name != "direction per example")  # the others are slow


def build(name: str, folder: Path, **changed: Any) -> Any:
    arguments = {**ANNEALED_SVRG, **RUNS.get(name, {}), **changed}
    rank = torch.distributed.get_world_size() * 10 + len(list(folder.glob("nvme*")))
    torch.distributed.barrier()
    nvme = folder / f"nvme{rank}"
    nvme.mkdir(exist_ok=True, parents=True)
    torch.distributed.barrier()
    config = configuration(BATCH, nvme_path=nvme, top={"scheduler": WARMUP}, **arguments)
    return zods.initialize(model=Tiny(), config=config, training_data=tiny_data(40))[0]


def apply_given(engine: Any) -> str:
    """Make three updates with given scalars, and return the digest of the weights.

    The stored anchor gradient is a part of the updates.
    """
    for step in range(3):
        terms = (Term(2**64 - 5 - step, 1e-3), Term(99, -0.02 / (step + 1)))
        dense = 0.0 if engine.anchor.gradient is None else -1e-2
        engine.run.apply(
            Update(terms=terms, decay=0.999, anchor_grad_coefficient=dense, rounding_seed=step)
        )
    return sha256(whole(engine))


def rank_of_savers(folder: Path, names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        engine = build(name, folder)
        for _ in range(7):
            engine.train_batch()
        saved = engine.save_checkpoint(folder / name, client_state={"note": name})
        found[name] = {"saved": state(engine), "folder": saved.name}
        found[name]["losses"] = [engine.train_batch() for _ in range(8)]
        found[name]["end"] = state(engine)
        again = build(name, folder)
        again.load_checkpoint(folder / name)
        found[name]["given"] = apply_given(again)
        ahead = build(name, folder)
        ahead.load_checkpoint(folder / name)
        found[name]["ahead"] = batches_ahead(ahead)
    return found


def rank_of_resumers(folder: Path, names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        engine = build(name, folder)
        engine.train_batch()  # a step that the loaded checkpoint has to undo
        _, client = engine.load_checkpoint(folder / name)
        found[name] = {"client": client, "loaded": state(engine)}
        found[name]["losses"] = [engine.train_batch() for _ in range(8)]
        found[name]["end"] = state(engine)
        engine.load_checkpoint(folder / name, tag="global_step7")
        found[name]["given"] = apply_given(engine)
        engine.load_checkpoint(folder / name)
        found[name]["ahead"] = batches_ahead(engine)
    return found


@pytest.fixture(scope="module")
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    names = asked_for(request, "name", RUNS, DEFAULT)
    first, second = run_ranks(2, rank_of_savers, folder, names)
    assert first == second
    return folder, first


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(n, id=f"on-{n}-ranks", marks=pytest.mark.slow if n == 2 else [])
        for n in (1, 2, 3)
    ],
)
def resumed(request: pytest.FixtureRequest, saved: Any) -> tuple[int, dict[str, Any]]:
    ranks = run_ranks(request.param, rank_of_resumers, saved[0], list(saved[1]))
    assert all(rank == ranks[0] for rank in ranks)
    return request.param, ranks[0]


@pytest.mark.parametrize("name", sampled(RUNS, DEFAULT))
def test_a_checkpoint_of_two_ranks_restores_the_whole_state_on_one_two_and_three(
    saved, resumed, name
):
    before, after = saved[1][name], resumed[1][name]
    assert after["client"] == {"note": name}
    assert before["saved"]["step"] == 7
    assert before["saved"]["anchor step"] == 5
    for key, value in before["saved"].items():
        assert after["loaded"][key] == value, key


@pytest.mark.parametrize("name", sampled(RUNS, DEFAULT))
def test_given_scalars_after_a_resume_leave_the_same_bits_on_any_number_of_ranks(
    saved, resumed, name
):
    assert resumed[1][name]["given"] == saved[1][name]["given"]


@pytest.mark.parametrize("name", sampled(RUNS, DEFAULT))
def test_the_next_batches_after_a_resume_are_the_same_examples(saved, resumed, name):
    assert resumed[1][name]["ahead"] == saved[1][name]["ahead"]


@pytest.mark.parametrize("name", sampled(RUNS, DEFAULT))
def test_a_resumed_run_goes_on_as_the_undisturbed_one(saved, resumed, name):
    """On the same number of ranks the results have the same bits.

    On another number the losses differ by rounding, because sums are made in another order.
    """
    world_size, runs = resumed
    undisturbed, again = saved[1][name], runs[name]
    if world_size == 2:
        assert again["losses"] == undisturbed["losses"]
        assert again["end"] == undisturbed["end"]
        return
    # bfloat16 activations and losses have a mantissa of 8 bits, float32 ones of 24 bits.
    tolerance = 0.05 if name == "bf16" else 1e-3
    np.testing.assert_allclose(again["losses"], undisturbed["losses"], rtol=tolerance)
    for key in ("step", "counters", "anchor step", "loader", "lr", "scheduler"):
        assert again["end"][key] == undisturbed["end"][key], key
    assert undisturbed["end"]["annealing"].divisor >= 3.0, "annealing must have acted"


# --- another layout, another place ----------------------------------------------------------------


def rank_of_movers(folder: Path, at: Path) -> dict[str, Any]:
    moves = {
        "stage 0": ("point stored", {"stage": 0}),
        "stage 3": ("stage 0", {"stage": 3}),
        "place": ("point stored", {"anchor": {"point": "nvme", "gradient": "nvme"}}),
        "to terms": ("point stored", {"anchor": {"point": "terms", "gradient": "terms"}}),
        "from terms": ("point as terms", {"anchor": {"point": "cpu", "gradient": "cpu"}}),
    }
    found = {}
    for move, (name, changed) in moves.items():
        engine = build(name, at, **changed)
        engine.load_checkpoint(folder / name)
        found[move] = (name, state(engine), numpy_of(anchor_point(engine)))
        reference = build(name, at)
        reference.load_checkpoint(folder / name)
        found[move] += (numpy_of(anchor_point(reference)),)
    return found


def test_a_checkpoint_loads_with_another_stage_and_another_anchor_storage(saved, tmp_path):
    folder, before = saved
    found = run_ranks(2, rank_of_movers, folder, tmp_path)[0]
    for move, (name, now, point, expected) in found.items():
        for key, value in before[name]["saved"].items():
            if key != "point" or "terms" not in move:
                assert now[key] == value, f"{move}: {key}"
        for (
            key,
            value,
            # The point is computed from the weights: within a few roundings of numbers below 2.
        ) in expected.items():
            np.testing.assert_allclose(point[key], value, rtol=0, atol=8 * 2.0**-23)


# --- damage ---------------------------------------------------------------------------------------


def cut(file: Path, keep: float = 0.5) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


def edit_state(folder: Path, **changes: Any) -> None:
    loaded = json.loads((folder / "state.json").read_text())
    for key, value in changes.items():
        if value is None:
            del loaded[key]
        else:
            loaded[key] = value
    (folder / "state.json").write_text(json.dumps(loaded))


def rewrite(file: Path, change: Callable[[dict[str, Any], dict[str, str]], Any]) -> None:
    """Write a file of tensors again with changed tensors and metadata."""
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


FIRST, LAST = (f"parameters-rank0000{rank}-of-00002.safetensors" for rank in range(2))
DAMAGES: dict[str, Any] = {
    "a truncated file of a rank": lambda f: cut(f / LAST),
    "an empty file of a rank": lambda f: cut(f / LAST, 0),
    "a file cut in its header": lambda f: cut(f / LAST, 0.02),
    "a missing file of a rank": lambda f: (f / LAST).unlink(),
    "all files of the parameters missing": lambda f: [p.unlink() for p in f.glob("parameters*")],
    "a truncated anchor": lambda f: cut(f / "anchor_point-rank00000-of-00002.safetensors"),
    "a missing anchor": lambda f: [p.unlink() for p in f.glob("anchor_point*")],
    "a tensor missing in a file": lambda f: rewrite(
        f / LAST, lambda tensors, _: tensors.pop("hidden.weight")
    ),
    "a tensor of another dtype": lambda f: rewrite(
        f / LAST, lambda t, _: t.update({"norm.bias": t["norm.bias"].view(torch.int32)})
    ),
    "a tensor of two dimensions": lambda f: rewrite(
        f / LAST, lambda t, _: t.update({"norm.bias": t["norm.bias"][None]})
    ),
    "a tensor without a fingerprint": lambda f: rewrite(
        f / LAST, lambda _, metadata: metadata.pop("hidden.weight")
    ),
    "a file without metadata": lambda f: save_file(load_file(f / LAST), f / LAST),
    "the files of two ranks swapped": lambda f: swap(f / FIRST, f / LAST),
    "a state.json of a number too long": lambda f: (f / "state.json").write_text("1" * 5000),
    "a state.json too deep": lambda f: (f / "state.json").write_text("[" * 100_000),
    "a latest that is no text": lambda f: (f.parent / "latest").write_bytes(b"\xff\x00"),
    "a truncated state.json": lambda f: cut(f / "state.json"),
    "an empty state.json": lambda f: (f / "state.json").write_text(""),
    "no state.json": lambda f: (f / "state.json").unlink(),
    "a state.json that is a list": lambda f: (f / "state.json").write_text("[]"),
    "a state.json without a key": lambda f: edit_state(f, anchor=None),
    "a state.json without the parameters": lambda f: edit_state(f, parameters=None),
    "a state.json with a key of another type": lambda f: edit_state(f, global_steps="seven"),
    "a state.json with a torn digest": lambda f: edit_state(f, digest="zz"),
    "a state.json of another format": lambda f: edit_state(f, format=99),
    "another loader's place": lambda f: edit_state(f, loader={"epoch": 0, "examples": 5}),
    "no folder at all": shutil.rmtree,
}


def rank_of_damages(folders: dict[str, Path], at: Path) -> dict[str, Any]:
    engine = build("point stored", at)
    train(engine, tiny_data(40), range(2))
    said = {}
    for name, folder in folders.items():
        if name == "good":
            continue
        before = state(engine)
        try:
            engine.load_checkpoint(folder)
            said[name] = ("nothing", "", False)
        except Exception as error:
            said[name] = (type(error).__name__, str(error), state(engine) == before)
    found: dict[str, Any] = {"damages": said, "others": {}}

    class Another(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.back = torch.nn.Linear(13, 7, bias=False)

    good = folders["good"]
    others = {
        "another model": (Another(), {}),
        "another method": (Tiny(), {"method": "mezo", "anneal": None}),
        "another direction": (Tiny(), {"direction": "rademacher"}),
        "without a scheduler": (Tiny(), {"top": None}),
        "another dtype": (Tiny(), {"bf16": True}),
        "another batch": (Tiny(), {"batch": 8}),
    }
    for name, (model, changed) in others.items():
        section = {"batch": BATCH, **ANNEALED_SVRG, "top": {"scheduler": WARMUP}, **changed}
        if section["method"] == "mezo":
            section = {k: v for k, v in section.items() if not k.startswith("anchor")}
        other = zods.initialize(
            model=model, config=configuration(**section), training_data=tiny_data(40)
        )[0]
        weights, digest = sha256(whole(other)), other.trajectory.head
        try:
            other.load_checkpoint(good)
            found["others"][name] = ("nothing", "", False)
        except Exception as error:
            same = (
                weights == sha256(whole(other))
                and digest == other.trajectory.head
                and other.global_steps == 0
            )
            found["others"][name] = (type(error).__name__, str(error), same)
    engine.load_checkpoint(good)
    found["loads"] = engine.global_steps
    return found


@pytest.fixture(scope="module")
def damages(saved: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    at = tmp_path_factory.mktemp("damages")
    folders = {"good": saved[0] / "point stored"}
    for k, (name, damage) in enumerate(DAMAGES.items()):
        folders[name] = at / str(k)
        shutil.copytree(saved[0] / "point stored", folders[name])
        damage(folders[name] / "global_step7")
    return run_ranks(2, rank_of_damages, folders, at)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_clear_error_on_all_ranks_and_changes_nothing(damages, damage):
    kinds, texts, unchanged = zip(*(rank["damages"][damage] for rank in damages), strict=True)
    assert set(kinds) <= {"ValueError", "OSError", "FileNotFoundError"}, f"{kinds}: {texts}"
    assert texts[1] == texts[0]
    assert "checkpoint" in texts[0]
    assert all(unchanged), "the engine was changed"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("another model", "another model"),
        ("another method", "zeroth_order.method"),
        ("another direction", "zeroth_order.direction"),
        ("without a scheduler", "scheduler"),
        ("another dtype", "another model"),
        ("another batch", "train_batch_size"),
    ],
)
def test_a_checkpoint_of_another_run_is_one_clear_error_on_all_ranks_and_changes_nothing(
    damages, other, said
):
    for kind, text, unchanged in (rank["others"][other] for rank in damages):
        assert kind == "ValueError"
        assert said in text
        assert unchanged
    assert all(rank["loads"] == 7 for rank in damages), "the good one still loads"


def rank_of_interruptions(folder: Path) -> dict[str, Any]:
    import zods.training.checkpoint_files

    engine = build("point stored", folder)
    engine.train_batch()
    engine.save_checkpoint(folder / "run")
    old = state(engine)
    found: dict[str, Any] = {}
    original = zods.training.checkpoint_files.save_tensors
    for tag in (None, "global_step1"):  # a new tag, then the tag that `latest` names
        engine.train_batch()

        def failing(tensors: Any, path: Any, metadata: Any) -> None:
            if engine.global_rank == 1:
                Path(path).write_bytes(b"half")
                raise OSError(28, "No space left on device")
            original(tensors, path, metadata)

        zods.training.checkpoint_files.save_tensors = failing
        with pytest.raises(OSError, match="No space left") as error:
            engine.save_checkpoint(folder / "run", tag=tag)
        zods.training.checkpoint_files.save_tensors = original
        found[str(tag)] = str(error.value)
        found[f"{tag} left"] = sorted(entry.name for entry in (folder / "run").iterdir())
        torch.distributed.barrier()
        twin = build("point stored", folder)
        at, _ = twin.load_checkpoint(folder / "run")
        found[f"{tag} loads"] = (at.name, state(twin) == old)
    engine.save_checkpoint(folder / "run")
    found["next"] = (folder / "run" / "latest").read_text()
    return found


def test_an_interrupted_save_is_an_error_on_all_ranks_and_leaves_latest_on_the_old_checkpoint(
    tmp_path,
):
    for found in run_ranks(2, rank_of_interruptions, tmp_path):
        for tag in ("None", "global_step1"):
            assert "No space left" in found[tag]
            assert found[f"{tag} loads"] == ("global_step1", True)
            assert found[f"{tag} left"] == ["global_step1", "latest"]
        assert found["next"] == "global_step3"


# --- flipped bits ---------------------------------------------------------------------------------


def rank_of_flips(folder: Path, at: Path) -> dict[str, Any]:
    """The errors of loads with one flipped bit, in each 7th byte of the files."""
    engine = build("point stored", at)
    engine.train_batch()
    before = state(engine)
    said: dict[str, dict[int, tuple[str, str]]] = {}
    for file in sorted((folder / "global_step7").glob("*.safetensors")):
        said[file.name] = {}
        for position in range(0, file.stat().st_size, 7):
            torch.distributed.barrier()
            if engine.global_rank == 0:
                flip(file, position)
            torch.distributed.barrier()
            try:
                engine.load_checkpoint(folder)
                said[file.name][position] = ("nothing", "")
            except Exception as error:
                said[file.name][position] = (type(error).__name__, str(error))
            torch.distributed.barrier()
            if engine.global_rank == 0:
                flip(file, position)
    torch.distributed.barrier()
    unchanged = state(engine) == before
    engine.load_checkpoint(folder)
    return {"said": said, "unchanged": unchanged, "loads": engine.global_steps}


@pytest.mark.parametrize(
    "world_size",
    [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)],
)
def test_one_flipped_bit_anywhere_in_the_files_is_an_error_on_all_ranks_that_names_file_and_tensor(
    saved, tmp_path, world_size
):
    shutil.copytree(saved[0] / "point stored", tmp_path / "run")
    names = [
        name
        for name, _, _ in json.loads((tmp_path / "run/global_step7/state.json").read_text())[
            "parameters"
        ]
    ]
    ranks = run_ranks(world_size, rank_of_flips, tmp_path / "run", tmp_path)
    for rank in ranks:
        assert rank == ranks[0]
        assert len(rank["said"]) == 4
        for file, positions in rank["said"].items():
            header = 8 + int.from_bytes(
                (tmp_path / "run/global_step7" / file).read_bytes()[:8], "little"
            )
            assert len([position for position in positions if position >= header]) > 80
            for position, (kind, text) in positions.items():
                assert kind == "ValueError", f"{file}, byte {position}"
                assert file in text
                if position >= header:
                    assert any(f": {name}: damaged" in text for name in names), text
        assert rank["unchanged"]
        assert rank["loads"] == 7


class WithScalar(Tiny):
    """A model with a scalar parameter, whose shard on the second of two ranks is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = torch.nn.Parameter(torch.ones(1))


def rank_of_empty_shards(folder: Path) -> tuple[int, str]:
    config = configuration(BATCH, method="mezo", lr=1e-2)
    engine = zods.initialize(model=WithScalar(), config=config, training_data=tiny_data(40))[0]
    engine.save_checkpoint(folder)
    file = folder / "global_step0" / LAST
    elements = load_file(file)["scalar"].numel()
    torch.distributed.barrier()
    if engine.global_rank == 0:
        rewrite(file, lambda _, metadata: metadata.update({"scalar": "0"}))
    torch.distributed.barrier()
    with pytest.raises(ValueError, match="another checkpoint, or damaged") as error:
        engine.load_checkpoint(folder)
    return elements, str(error.value)


def test_a_changed_fingerprint_of_an_empty_shard_is_an_error_too(tmp_path):
    first, second = run_ranks(2, rank_of_empty_shards, tmp_path)
    assert first == second
    assert first[0] == 0


# --- crashes --------------------------------------------------------------------------------------

# The functions of `os` in which a crash is tried.
STEPS_OF_A_SAVE = (
    "mkdir",
    "rename",
    "replace",
    "unlink",
    "rmdir",
    "fsync",
)


class Crash(BaseException):
    """A crash that no code catches, as with a power cut."""


def counted(monkeypatch: pytest.MonkeyPatch, crash_at: int | None) -> list[str]:
    """Record the operations of `os` that change names or flush.

    crash_at: the number of the operation that is replaced by a Crash.
    """
    events: list[str] = []

    def wrapped(name: str, original: Callable) -> Callable:
        def operation(*arguments: Any, **keywords: Any) -> Any:
            subject = (
                os.readlink(f"/proc/self/fd/{arguments[0]}")
                if name == "fsync"
                else str(arguments[0])
            )
            if len(events) == crash_at:
                raise Crash
            events.append(f"{name} {Path(subject).name}")
            return original(*arguments, **keywords)

        return operation

    for name in STEPS_OF_A_SAVE:
        monkeypatch.setattr(os, name, wrapped(name, getattr(os, name)))
    return events


def rank_of_crashes(folder: Path) -> dict[str, Any]:
    engine = build("point stored", folder)
    twin = build("point stored", folder)
    states = {}
    for _ in range(2):
        engine.train_batch()
        engine.save_checkpoint(folder / "before")
        states[engine.global_steps] = state(engine)
    engine.train_batch()
    states[3] = state(engine)
    found = {}
    for tag in ("global_step3", "global_step2"):  # a new tag, then the tag that `latest` names
        for crash_at in range(1000):
            run = folder / f"{tag}-{crash_at}"
            shutil.copytree(folder / "before", run)
            with pytest.MonkeyPatch.context() as monkeypatch:
                events = counted(monkeypatch, crash_at)
                try:
                    engine.save_checkpoint(run, tag, {}, keep=1)
                    crashed = False
                except Crash:
                    crashed = True
            loaded = []
            for at in [None, *newest_checkpoints(run)[0]]:
                if at is None:
                    twin.load_checkpoint(run)
                else:
                    twin.load_checkpoint(at.parent, at.name)
                loaded.append(twin.global_steps)
                assert state(twin) == states[twin.global_steps], f"{tag}: crash after {events}"
            assert loaded[0] in (2, 3)
            assert loaded[1:] == sorted(loaded[1:], reverse=True)
            assert loaded[0] in loaded[1:]
            twin.save_checkpoint(run)  # the run continues, and cleans up
            left = [entry.name for entry in run.iterdir()]
            assert not [
                name for name in left if name.startswith(".") and name != ".latest.partial"
            ], left
            shutil.rmtree(run)
            if not crashed:
                break
        found[tag] = events
    return found


def test_a_crash_at_any_moment_of_a_save_leaves_whole_checkpoints_and_a_latest_that_loads(
    tmp_path,
):
    (found,) = run_ranks(1, rank_of_crashes, tmp_path)
    for tag, events in found.items():
        assert len(events) > 15, tag
        # Check that each file is flushed before it gets its name: a power cut loses data that are
        # not flushed.
        files = {
            f"fsync {role}-rank00000-of-00001.safetensors"
            for role in ("parameters", "anchor_point")
        }
        partial = f"fsync .{tag}.partial"
        assert files | {"fsync state.json"} <= set(events[: events.index(partial)])
        renamed = events.index(f"rename .{tag}.partial")
        named = events.index("replace .latest.partial")
        parent = [k for k, event in enumerate(events) if event.startswith(f"fsync {tag}-")]
        assert (
            events.index(partial)
            < renamed
            < parent[0]
            < events.index("fsync .latest.partial")
            < named
            < parent[1]
        )
        removals = [k for k, event in enumerate(events) if event.startswith(("unlink", "rmdir"))]
        assert parent[1] < min(removals), (
            "old checkpoints are removed after the new one has its name"
        )


# --- old checkpoints ------------------------------------------------------------------------------


def rank_of_keepers(folder: Path) -> dict[str, Any]:
    engine = build("point stored", folder)
    run = folder / "run"
    found: dict[str, Any] = {"kept": []}

    def names() -> list[str]:
        torch.distributed.barrier()
        found = sorted(entry.name for entry in run.iterdir())
        torch.distributed.barrier()  # all ranks have looked before the next save begins
        return found

    if engine.global_rank == 0:
        for foreign in (
            "global_step0",
            "global_stepping",
            ".hidden",
            ".global_step9.partial",
            ".global_step9.removed",
        ):
            (run / foreign).mkdir(parents=True)
            (run / foreign / "state.json").write_text("{}")
    for _ in range(2):
        engine.train_batch()
        engine.save_checkpoint(run, None, {})
    engine.save_checkpoint(run, "best", {})
    found["without"] = names()
    for _ in range(4):
        engine.train_batch()
        engine.save_checkpoint(run, None, {}, keep=3)
        found["kept"].append(names())
    found["newest"] = [at.name for at in newest_checkpoints(run)[0]]
    engine.load_checkpoint(run, tag="global_step4")
    engine.train_batch()
    with pytest.raises(ValueError, match="keep is 0"):
        engine.save_checkpoint(run, None, {}, keep=0)
    # older than the newest of the same step
    engine.save_checkpoint(run, "global_step3", {}, keep=1)
    found["one"] = names()
    # A folder that cannot be removed does not make the save fail, and is not a checkpoint.
    original = shutil.rmtree

    def failing(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(39, "Directory not empty")
        original(path, ignore_errors)

    shutil.rmtree = failing
    engine.train_batch()
    engine.save_checkpoint(run, "global_step7", {}, keep=1)
    shutil.rmtree = original
    found["failing"] = names()
    found["newest then"] = [at.name for at in newest_checkpoints(run)[0]]
    engine.save_checkpoint(run, "global_step8", {}, keep=2)
    found["next"] = names()
    (run / "global_step8" / LAST).unlink(missing_ok=True)
    torch.distributed.barrier()
    whole_ones = []
    for at in newest_checkpoints(run)[0]:
        try:
            engine.load_checkpoint(at.parent, at.name)
            whole_ones.append(at.name)
        except ValueError:
            continue
    found["fell back to"] = whole_ones
    found["of no folder"] = newest_checkpoints(run / "nothing")[0]
    return found


def test_old_checkpoints_are_removed_but_the_last_ones_and_what_is_not_of_that_kind(tmp_path):
    first, second = run_ranks(2, rank_of_keepers, tmp_path)
    assert first == second
    foreign = [".hidden", "best", "global_step0", "global_stepping", "latest"]
    assert first["without"] == sorted([*foreign, "global_step1", "global_step2"]), (
        "leftovers of crashes are removed"
    )
    for step, kept in enumerate(first["kept"], start=3):
        assert kept == sorted([*foreign, *(f"global_step{k}" for k in range(step - 2, step + 1))])
    assert first["newest"] == ["global_step6", "global_step5", "global_step4", "best"]
    assert first["one"] == sorted([*foreign, "global_step3", "global_step6"])
    assert first["failing"] == sorted(
        [*foreign, ".global_step3.removed", ".global_step6.removed", "global_step7"]
    )
    assert first["newest then"] == ["global_step7", "best"]
    assert first["next"] == sorted([*foreign, "global_step7", "global_step8"])
    assert first["fell back to"] == ["global_step7", "best"]
    assert first["of no folder"] == []


# --- a full disk ----------------------------------------------------------------------------------


def rank_of_full_disks(folder: Path, drive: Path | None) -> list[Any]:
    engine = build("point stored", folder)
    twin = build("point stored", folder)
    run = (drive or folder) / "run"
    engine.train_batch()
    engine.save_checkpoint(run)
    old = state(engine)
    engine.train_batch()
    found: list[Any] = []
    filler, limits = run.parent / "filler", resource.getrlimit(resource.RLIMIT_FSIZE)
    for pages in range(12):  # the pages that are left; a save needs one for each of six files
        torch.distributed.barrier()
        if drive is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (600 * pages, limits[1]))
        elif engine.global_rank == 0:
            filler.unlink(missing_ok=True)
            free = os.statvfs(drive).f_bavail
            filler.write_bytes(bytes((free - pages) * os.statvfs(drive).f_bsize))
        torch.distributed.barrier()
        try:
            engine.save_checkpoint(run)
            said = ("nothing", "")
        except Exception as error:
            said = (type(error).__name__, str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        torch.distributed.barrier()
        at, _ = twin.load_checkpoint(run)
        same = state(twin) == (state(engine) if said[0] == "nothing" else old)
        left = [
            entry.name for entry in run.iterdir() if entry.name.startswith(".") and entry.is_dir()
        ]
        found.append((*said, at.name, same, left))
        if said[0] == "nothing":
            break
    return found


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Path | None]:
    """A drive of 1 MiB, or None where this process may not mount."""
    path = tmp_path / "drive"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    yield path if mounted else None
    if mounted:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("limit", ["drive", "file size"])
def test_a_full_disk_is_an_error_on_all_ranks_and_earlier_checkpoints_stay_whole(
    tmp_path, drive, limit
):
    if limit == "drive" and drive is None:
        pytest.skip("this process may not mount a drive")
    first, second = run_ranks(2, rank_of_full_disks, tmp_path, drive if limit == "drive" else None)
    assert first == second
    *full, last = first
    assert len(full) >= 4
    for kind, text, at, same, left in full:
        assert kind == "OSError"
        assert ("No space left" if limit == "drive" else "File too large") in text
        assert (at, same, left) == ("global_step1", True, [])
    assert last == ("nothing", "", "global_step2", True, [])


# --- the export -----------------------------------------------------------------------------------


def rank_of_exports(folder: Path) -> dict[str, Any]:
    found = {}
    for bf16 in (False, True):
        for stage in (0, 3):
            config = configuration(8, stage=stage, bf16=bf16, method="mezo", lr=1e-2)
            engine = zods.initialize(model=tiny_opt(), config=config)[0]
            train(engine, opt_data(), range(3))
            engine.save_pretrained(folder / f"{bf16}-{stage}")
            train(engine, opt_data(), range(1))  # the engine can continue
            twin = zods.initialize(model=tiny_opt(), config=config)[0]
            train(twin, opt_data(), range(3))
            found[bf16, stage] = sha256(whole(twin))
    return found


def test_an_export_is_read_back_by_from_pretrained_with_equal_bits(tmp_path):
    from transformers import OPTForCausalLM

    first, second = run_ranks(2, rank_of_exports, tmp_path)
    assert first == second
    for (bf16, stage), digest in first.items():
        model = OPTForCausalLM.from_pretrained(tmp_path / f"{bf16}-{stage}", dtype="auto")
        assert model.dtype is (torch.bfloat16 if bf16 else torch.float32)
        assert sha256(dict(model.named_parameters())) == digest
        assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
        names = load_file(tmp_path / f"{bf16}-{stage}" / "model.safetensors")
        assert not {"lm_head.weight", "model.decoder.embed_tokens.weight"} <= set(names), (
            "tied weights are stored once"
        )
