"""A run that was stopped anywhere resumes from its log and, if there is one, a whole checkpoint.

On the same number of ranks it ends as the undisturbed run. On another number it resumes with the
same bits, and continues within rounding.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zods
import zods.kernels
from tests.distributed.models import (
    ANNEALED_SVRG,
    WARMUP,
    Tiny,
    Wide,
    batches_ahead,
    configuration,
    opt_data,
    sha256,
    state,
    tiny_data,
    tiny_opt,
    whole,
    wide_data,
)
from tests.distributed.ranks import run_ranks
from tests.helpers import LogTexts, asked_for, sampled
from zods.training.resume import CHECKPOINTS, INITIAL, LOG_NAME
from zods.trajectory.log import Log, read_log
from zods.trajectory.records import Evaluation, Refresh, RunRecord

# An epoch has three steps. Checkpoints are written at the steps of SAVED.
BATCH, STEPS, SAVED = 24, 11, (4, 7)
MEZO = {"method": "mezo", "anchor_interval": None, "anchor": None}


def kept(point: str, gradient: str, **others: Any) -> dict[str, Any]:
    return {"anchor": {"point": point, "gradient": gradient}, **others}


SELECTOR = {"candidates": 32, "interval": 2, "strategy": "highest_loss", "warmup_steps": 1}
WARMUP_OF_AUTO = {**WARMUP, "params": {**WARMUP["params"], "warmup_max_lr": "auto"}}
LOW_RANK = {"distribution": "low_rank", "rank": 2}
# Arguments of `configuration` by name.
RUNS: dict[str, dict[str, Any]] = {
    "mezo, micro-batches": {**MEZO, "accumulation": 2, "weight_decay": 0.2},
    "device": kept("device", "device", anchor_directions=2),
    "cpu, bf16": kept("cpu", "cpu", bf16=True),
    "nvme, low rank": kept("nvme", "nvme", direction=LOW_RANK, share_direction=False),
    "terms, decay": kept("terms", "terms", weight_decay=0.2, num_directions=2),
    "point as terms, bf16": kept("terms", "cpu", bf16=True, direction=LOW_RANK),
    "normalized": kept("terms", "cpu", normalize=True, anchor_directions=2, anchor_weight="auto"),
    "direction per example": kept(
        "terms",
        "terms",
        direction=LOW_RANK,
        examples_per_direction=1,
        anchor_weight="auto",
        anchor_directions=2,
    ),
    "measured step size": kept(
        "terms", "cpu", normalize=True, lr="auto", top={"scheduler": WARMUP_OF_AUTO}
    ),
    "replicated": kept("cpu", "terms", stage=0, direction="rademacher", bf16=True),
    "selected": kept("cpu", "cpu", selector=SELECTOR, anneal=None),
    "offloaded": kept("cpu", "cpu", offload="cpu", anneal=None),
    "offloaded to nvme": {**MEZO, "offload": "nvme", "bf16": True, "anneal": None},
}
# The others are slow: each of their settings is in one of these, or in a test of the setting.
DEFAULT = (
    *("mezo, micro-batches", "nvme, low rank", "point as terms, bf16", "measured step size"),
    *("device", "selected", "offloaded to nvme"),
)
WORLD_SIZE = 2
# On other numbers of ranks these models have shards too small for NVMe.
BARE = (
    "offloaded",
    "offloaded to nvme",
)


def build(name: str, folder: Path, **changed: Any) -> Any:
    """An engine of run `name`, whose NVMe files are in a new folder below `folder`."""
    given = {"batch": BATCH, **ANNEALED_SVRG, "top": {"scheduler": WARMUP}, **RUNS[name], **changed}
    given = {key: value for key, value in given.items() if value is not None}
    data, model = given.pop("data", None), given.pop("model", None)
    if name in BARE:
        data, model, given["batch"] = data or wide_data(), model or Wide(), 4
    elif "selector" in given:
        data, model = data or opt_data(80), model or tiny_opt()
    torch.distributed.barrier()
    nvme = folder / f"nvme{len(list(folder.glob('nvme*')))}"
    torch.distributed.barrier()
    nvme.mkdir(exist_ok=True, parents=True)
    config = configuration(nvme_path=nvme, **given)
    return zods.initialize(
        model=model or Tiny(), config=config, training_data=data or tiny_data(80)
    )[0]


def go_on(engine: Any, until: int = STEPS) -> list[float]:
    return [engine.train_batch() for _ in range(engine.global_steps, until)]


def close(engine: Any) -> None:
    """Close an engine, so that the next one may log in its folder."""
    engine.close()
    torch.distributed.barrier()


# --- stopped, and started again -------------------------------------------------------------------


def rank_of_runs(folder: Path, names: list[str]) -> dict[str, Any]:
    """Undisturbed runs with checkpoints.

    One checkpoint is written between two micro-batches.
    """
    found: dict[str, Any] = {}
    for name in names:
        engine = build(name, folder)
        engine.resume(folder / name)
        states, losses = {}, []
        for step in range(STEPS):
            losses.append(engine.train_batch())
            states[step + 1] = state(engine)
            if step + 1 in SAVED:
                if engine.gradient_accumulation_steps() > 1:
                    engine.forward(next(engine._position.batches()))
                engine.save_checkpoint(folder / name / CHECKPOINTS)
                if engine.gradient_accumulation_steps() > 1:
                    engine.training_dataloader.position -= 1
                    engine.restart_loader()
        close(engine)
        ahead = build(name, folder)
        ahead.load_checkpoint(folder / name / CHECKPOINTS)
        found[name] = {
            "states": states,
            "losses": losses,
            "ahead": None if name == "selected" else batches_ahead(ahead),
        }
    return found


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder, names = tmp_path_factory.mktemp("runs"), asked_for(request, "name", RUNS, DEFAULT)
    first, second = run_ranks(WORLD_SIZE, rank_of_runs, folder, names)
    assert first == second
    return folder, first


def stopped(run: Path, to: Path, num_records: int, checkpoints: tuple[int, ...] = ()) -> bytes:
    """Write to `to` the files of a run that dies with `num_records` records on the disk.

    Returns the bytes of its log.
    """
    log = read_log(run / LOG_NAME)
    data = (run / LOG_NAME).read_bytes()[: log.ends[num_records]]
    to.mkdir(parents=True)
    (to / LOG_NAME).write_bytes(data)
    for step in checkpoints:
        shutil.copytree(
            run / CHECKPOINTS / f"global_step{step}", to / CHECKPOINTS / f"global_step{step}"
        )
    return data


def after(log: Log, steps: int) -> int:
    """The number of records in the log after `steps` steps."""
    return len(log.until(steps))


def stops_of(log: Log) -> dict[str, tuple[int, tuple[int, ...]]]:
    """The moments at which a run is stopped, by name.

    Each is (number of records, steps of the existing checkpoints).
    """
    last = max(
        k
        for k, record in enumerate(log.records)
        if isinstance(record, (RunRecord, Evaluation, Refresh))
    )
    found = {
        "before the first step": (1, ()),
        "before the first anchor": (2, ()),
        "in an epoch": (after(log, 1), ()),
        "in an anchor's life": (after(log, 8), ()),
        "after a checkpoint": (after(log, 9), SAVED),
        "at a checkpoint": (after(log, 7), SAVED),
    }
    if isinstance(log.records[last], Refresh):
        found["between a refresh and its step"] = (last + 1, ())
        found["between a refresh and its step, with checkpoints"] = (last + 1, SAVED)
    return found


AFTER_A_STEP = (
    *("in an epoch", "in an anchor's life", "after a checkpoint", "at a checkpoint"),
    *("newest damaged", "all damaged"),
)


def damage(checkpoint: Path) -> None:
    file = checkpoint / "parameters-rank00001-of-00002.safetensors"
    if not file.exists():
        file = checkpoint / "parameters-rank00000-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)


def rank_of_restarts(folder: Path, at: dict[str, dict[str, Path]]) -> dict[str, dict[str, Any]]:
    warnings, found = LogTexts("zods.training.resume", logging.WARNING), {}
    for name, stops in at.items():
        found[name] = {}
        for where, stop in stops.items():
            warnings.texts.clear()
            engine = build(name, folder)
            engine.resume(stop)
            resumed = state(engine)
            losses = go_on(engine)
            end = state(engine)
            close(engine)
            found[name][where] = (
                resumed,
                losses,
                end,
                (stop / LOG_NAME).read_bytes(),
                list(warnings.texts),
            )
    return found


@pytest.fixture(scope="module")
def restarts(
    runs: Any, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, Any]]]:
    folder, at = tmp_path_factory.mktemp("restarts"), {}
    for name in runs[1]:
        at[name] = {
            where: folder / name / where for where in stops_of(read_log(runs[0] / name / LOG_NAME))
        }
        for where, (num_records, checkpoints) in stops_of(
            read_log(runs[0] / name / LOG_NAME)
        ).items():
            stopped(runs[0] / name, at[name][where], num_records, checkpoints)
        for where, damaged in (("newest damaged", SAVED[1:]), ("all damaged", SAVED)):
            at[name][where] = folder / name / where
            stopped(
                runs[0] / name,
                at[name][where],
                after(read_log(runs[0] / name / LOG_NAME), 9),
                SAVED,
            )
            for step in damaged:
                damage(at[name][where] / CHECKPOINTS / f"global_step{step}")
    return run_ranks(WORLD_SIZE, rank_of_restarts, folder, at)


@pytest.mark.parametrize("name", sampled(RUNS, DEFAULT))
def test_a_run_stopped_anywhere_ends_with_the_bits_and_the_log_of_the_undisturbed_one(
    runs, restarts, name
):
    undisturbed, log = runs[1][name], (runs[0] / name / LOG_NAME).read_bytes()
    for rank in restarts:
        for where, (resumed, losses, end, written, _) in rank[name].items():
            made = resumed["step"]
            if where in AFTER_A_STEP:
                assert resumed == undisturbed["states"][made], where
            assert losses == undisturbed["losses"][made:], where
            assert end == undisturbed["states"][STEPS], where
            assert written == log, where


@pytest.mark.parametrize("name", sampled(RUNS, DEFAULT))
def test_a_damaged_checkpoint_is_skipped_with_a_warning_and_an_older_one_or_the_log_is_used(
    restarts, name
):
    first = restarts[0][name]
    assert first["after a checkpoint"][4] == []
    for where, number in (("newest damaged", 1), ("all damaged", 2)):
        said = first[where][4]
        assert len(said) == number, said
        assert f"global_step{SAVED[1]}" in said[0]
        assert all("its fingerprint is not the one it was saved with" in text for text in said)
        assert all(
            text.endswith("It is left out; an older one or the log serves.") for text in said
        )


# --- on another number of ranks -------------------------------------------------------------------


def rank_of_others(folder: Path, at: dict[str, dict[str, Path]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, stops in at.items():
        found[name] = {}
        for where, stop in stops.items():
            engine = build(name, folder)
            engine.resume(stop)
            found[name][where] = {
                "resumed": state(engine),
                "losses": go_on(engine),
                "end": state(engine),
            }
            close(engine)
        ahead = build(name, folder)
        ahead.load_checkpoint(
            next(iter(stops.values())).parent / "after a checkpoint" / CHECKPOINTS,
            f"global_step{SAVED[-1]}",
        )
        found[name]["ahead"] = {} if name == "selected" else {"batches": batches_ahead(ahead)}
    return found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(n, id=f"on-{n}-ranks", marks=pytest.mark.slow if n == 4 else [])
        for n in (1, 3, 4)
    ],
)
def others(
    request: pytest.FixtureRequest, runs: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder, at = tmp_path_factory.mktemp("others"), {}
    for name in runs[1]:
        if name in BARE:
            continue
        log = read_log(runs[0] / name / LOG_NAME)
        at[name] = {}
        for where, checkpoints in (("the log alone", ()), ("after a checkpoint", SAVED)):
            at[name][where] = folder / name / where
            stopped(runs[0] / name, at[name][where], after(log, 8), checkpoints)
    ranks = run_ranks(request.param, rank_of_others, folder, at)
    assert all(rank == ranks[0] for rank in ranks)
    return ranks[0]


@pytest.mark.parametrize("name", sampled([name for name in RUNS if name not in BARE], DEFAULT))
def test_on_another_number_of_ranks_a_run_resumes_with_the_same_bits_and_ends_within_rounding(
    runs, others, name
):
    undisturbed = runs[1][name]
    for where in ("the log alone", "after a checkpoint"):
        again = others[name][where]
        assert again["resumed"] == undisturbed["states"][8], where
        # The tolerances are those of test_checkpoint.py.
        tolerance = 0.05 if RUNS[name].get("bf16") else 1e-3
        np.testing.assert_allclose(again["losses"], undisturbed["losses"][8:], rtol=tolerance)
        for key in ("step", "counters", "anchor step", "loader", "lr", "scheduler"):
            assert again["end"][key] == undisturbed["states"][STEPS][key], (where, key)
    assert others[name]["ahead"].get("batches") == undisturbed["ahead"]


# --- what starts anew -----------------------------------------------------------------------------


def headed(seed: int) -> Tiny:
    """Tiny with one layer that is drawn with another seed."""
    model = Tiny()
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.hidden.weight)
    return model


def rank_of_heads(folder: Path) -> tuple[list[str], str]:
    name, digests = "cpu, bf16", []
    engine = build(name, folder, model=headed(1))
    engine.resume(folder / "run", new=["hidden.weight"])
    go_on(engine)
    digests.append(sha256(whole(engine)))
    close(engine)
    for seed in (1, 2):
        engine = build(name, folder, model=headed(seed))
        engine.resume(folder / "run")
        digests.append(sha256(whole(engine)))
        close(engine)
    if engine.global_rank == 0:
        shutil.rmtree(folder / "run" / INITIAL.parent)
    torch.distributed.barrier()
    with pytest.raises(ValueError, match="another base weights") as error:
        build(name, folder, model=headed(2)).resume(folder / "run")
    return digests, str(error.value)


def test_a_new_head_is_restored_from_the_run_folder_and_not_drawn_again(tmp_path):
    first, second = run_ranks(2, rank_of_heads, tmp_path)
    assert first == second
    assert len(first[0]) == 3
    assert len(set(first[0])) == 1
    assert "hidden.weight" in first[1]


def rank_without_the_kernel(stop: Path, folder: Path) -> dict[str, Any]:
    zods.kernels.cpu_module = lambda: None
    assert zods.kernels.backend() == "reference"
    engine = build("point as terms, bf16", folder)
    engine.resume(stop)
    return state(engine)


def test_without_the_compiled_kernel_a_run_resumes_with_the_same_bits(runs, tmp_path):
    name = "point as terms, bf16"
    stopped(runs[0] / name, tmp_path / "run", after(read_log(runs[0] / name / LOG_NAME), 8))
    for rank in run_ranks(WORLD_SIZE, rank_without_the_kernel, tmp_path / "run", tmp_path):
        assert rank == runs[1][name]["states"][8]


def rank_of_another_configuration(folder: Path, name: str) -> list[str]:
    """Resume a run of five steps, with a checkpoint after three, with another configuration.

    Returns the weights.
    """
    engine = build(name, folder, weight_decay=0.1, seed=1)
    engine.resume(folder / "run")
    go_on(engine, 3)
    engine.save_checkpoint(folder / "run" / "checkpoints")
    go_on(engine, 5)
    digests = [sha256(whole(engine))]
    close(engine)
    changed = build(
        name, folder, weight_decay=0.0, seed=2, stochastic_rounding=False, num_directions=2
    )
    changed.resume(folder / "run")
    digests.append(sha256(whole(changed)))
    go_on(changed, 7)
    digests.append(sha256(whole(changed)))
    close(changed)
    again = build(
        name, folder, weight_decay=0.0, seed=2, stochastic_rounding=False, num_directions=2
    )
    again.resume(folder / "run", checkpoints=folder / "none")
    return [*digests, sha256(whole(again))]


def test_the_log_is_replayed_with_the_configuration_that_it_was_made_with(tmp_path):
    """From a checkpoint, and from the base weights.

    After the checkpoint the log does not repeat the configuration.
    """
    for before, after, further, again in run_ranks(
        2, rank_of_another_configuration, tmp_path, next(iter(RUNS))
    ):
        assert after == before
        assert again == further


# --- mistakes -------------------------------------------------------------------------------------


def another_layer() -> Tiny:
    model = Tiny()
    model.back = torch.nn.Linear(13, 7, bias=False)
    return model


def frozen_norm() -> Tiny:
    model = Tiny()
    model.norm.requires_grad_(False)
    return model


def with_other_example(index: int) -> Any:
    data = tiny_data(80)
    data[index] = {**data[index], "labels": 1 - data[index]["labels"] % 2}
    return data


MISFITS: dict[
    str, tuple[dict[str, Any], tuple[str, ...]]
] = {  # The run's changed arguments, and the error's message.
    "model": ({"model": another_layer}, ("another model", "back.bias")),
    "shape": (
        {"model": lambda: Tiny(inner=14)},
        ("another shape", "hidden.weight", "(13, 7)", "(14, 7)"),
    ),
    "base weights": ({"model": lambda: Tiny(seed=1)}, ("embed.weight", "another base weights")),
    "trained": (
        {"model": frozen_norm},
        ("norm.weight", "another trained (True there, False here)"),
    ),
    "dtype": ({"bf16": True}, ("another dtype (float32 there, bfloat16 here)",)),
    "data": ({"data": lambda: tiny_data(79)}, ("other training data", "80 examples", "79")),
    "examples": ({"data": lambda: tiny_data(80)[::-1]}, ("other training data", "digest")),
    "one example": ({"data": lambda: with_other_example(4)}, ("other training data", "digest")),
    "method": ({**MEZO, "anchor_directions": None}, ("zeroth_order.method = mezo_svrg", "mezo")),
    "direction": ({"direction": "rademacher"}, ("zeroth_order.direction", "rademacher")),
    "batch": (
        {"batch": 12},
        ("train_batch_size 24", "has 12 on 2 ranks", '"train_batch_size": 24', "_gpu 12"),
    ),
    "selector": (
        {"selector": {"candidates": 48, "strategy": "random"}, "anneal": None},
        ("made without zeroth_order.selector",),
    ),
}


@contextmanager
def said(found: dict[str, Any], what: str, log: Path) -> Iterator[None]:
    """Record a raised error, and whether the log is as it was."""
    torch.distributed.barrier()
    before = log.read_bytes()
    try:
        yield
    except Exception as error:
        found[what] = (type(error).__name__, str(error), log.read_bytes() == before)
    torch.distributed.barrier()


def rank_of_mistakes(
    folder: Path, run: Path, damaged: dict[str, Path]
) -> dict[str, tuple[str, str, bool]]:
    name, found = "device", {}
    for what, (changed, _) in MISFITS.items():
        made = {key: value() if callable(value) else value for key, value in changed.items()}
        engine = build(name, folder, **made)
        with said(found, what, run / LOG_NAME):
            engine.resume(run)
        if what == "batch":  # The same process may try again.
            with said(found, "batch again", run / LOG_NAME):
                build(name, folder, **made).resume(run)
    for what, at in damaged.items():
        with said(found, what, at / LOG_NAME):
            build(name, folder).resume(at)
    engine = build(name, folder)
    engine.train_batch()
    with said(found, "steps", run / LOG_NAME):
        engine.resume(run)
    engine = build(name, folder)
    engine.resume(run)  # no mistake has left anything behind
    with said(found, "twice", run / LOG_NAME):
        engine.resume(run)
    found["at"] = engine.global_steps
    close(engine)
    return found


def test_the_log_of_another_run_is_one_error_on_all_ranks_and_stays_as_it_is(runs, tmp_path):
    data = (runs[0] / "device" / LOG_NAME).read_bytes()
    damages = {
        "a byte": data[:2000] + bytes([data[2000] ^ 1]) + data[2001:],
        "a lost line": b"".join(
            line for k, line in enumerate(data.splitlines(keepends=True)) if k != 5
        ),
        "another file": b"hello\nworld\n",
    }
    damaged = {what: tmp_path / "damaged" / what for what in damages}
    for what, at in damaged.items():
        at.mkdir(parents=True)
        (at / LOG_NAME).write_bytes(damages[what])
    stopped(runs[0] / "device", tmp_path / "run", after(read_log(runs[0] / "device" / LOG_NAME), 8))
    first, second = run_ranks(WORLD_SIZE, rank_of_mistakes, tmp_path, tmp_path / "run", damaged)
    assert first == second
    assert first.pop("at") == 8
    expected = {what: parts for what, (_, parts) in MISFITS.items()}
    expected |= {
        "batch again": expected["batch"],
        "a byte": ("line ", "checksum"),
        "a lost line": ("line 6 ", "checksum"),
    }
    expected |= {
        "another file": ("line 1 ",),
        "steps": ("has made steps",),
        "twice": ("has made steps",),
    }
    assert first.keys() == expected.keys()
    for what, (kind, text, untouched) in first.items():
        assert kind == "ValueError", what
        assert untouched, what
        for part in expected[what]:
            assert part in text, f"{what}: {text}"
