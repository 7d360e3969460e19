"""Replicas: several DeepSpeed worlds that train one model together.

Replicas join late, leave and die.
"""

from __future__ import annotations

import functools
import math
import os
import random
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zods.finetune
from tests.distributed.command_line import (
    MODEL,
    prompted_options,
    refusals_on_ranks,
    write_inputs,
)
from tests.distributed.generated_texts import ONE, SECTION, WORDS, collate, data_of, word_tokenizer
from tests.distributed.models import (
    OF_THE_PAPER,
    Tiny,
    Wide,
    configuration,
    numpy_of,
    opt_data,
    sha256,
    tiny_data,
    tiny_of_file,
    tiny_opt,
    whole,
    wide_data,
)
from tests.distributed.ranks import LIMIT, at_once, free_port, launch, run_ranks
from tests.distributed.zoo import zoo_model
from tests.helpers import LogTexts
from zods.comm.authenticated import TOKEN_VARIABLE
from zods.comm.communicator import Communicator
from zods.config.schema import parse_section
from zods.config.selector_section import parse_selector
from zods.params.swap_files import PREFIX
from zods.training.log_checks import check_same_selector
from zods.training.replicas import Replicas
from zods.trajectory.log import parse_log, read_log, text_of
from zods.trajectory.records import Header, RunRecord, Step

STEPS = 12
COMMON: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "agreement_interval": 2}
RUNS: dict[str, dict[str, Any]] = {
    "mezo": {"method": "mezo", "num_directions": 2},
    "svrg": {
        "method": "mezo_svrg",
        "anchor_interval": 4,
        "anchor": {"point": "cpu", "gradient": "cpu"},
        "lr": "auto",
        "normalize": True,
    },
    "svrg as terms, bf16": {
        "method": "mezo_svrg",
        "anchor_interval": 4,
        "anchor": {"point": "terms", "gradient": "terms"},
        "bf16": True,
        "accumulation": 2,
        "examples_per_direction": 1,
    },
    "selected": {
        "method": "mezo_svrg",
        "anchor_interval": 4,
        "accumulation": 2,
        "examples_per_direction": 3,
        "selector": {"candidates": 20, "interval": 2, "features": "zo", "num_directions": 4},
    },
    "texts": {**SECTION, **ONE},
    "candidates": WORDS,
}
SLOW = ("mezo", "texts", "candidates")


def store_address() -> str:
    return f"127.0.0.1:{free_port()}"


def waits_for(path: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    torch.distributed.barrier()


def touch_when_it_asks(engine: Any, path: Path) -> None:
    """Make a file when this replica has asked the leader to take part, in a thread on rank 0."""
    follower = engine.replicas._follower
    if follower is None:
        return

    def wait() -> None:
        deadline = time.monotonic() + LIMIT
        while not (follower._has_asked_to_join or engine.replicas.members):
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        path.touch()

    threading.Thread(target=wait, daemon=True).start()


def build(name: str, replica: dict[str, Any] | None) -> Any:
    section = {**COMMON, **RUNS[name], "replicas": replica}
    config = configuration(12, **section)
    if "objective" in section:
        return zods.initialize(
            model=zoo_model("opt"),
            config=config,
            training_data=data_of(section["objective"]),
            collate_fn=collate,
            tokenizer=word_tokenizer(),
        )[0]
    selects = "selector" in section
    model, data = (tiny_opt(), opt_data(40)) if selects else (Tiny(), tiny_data(40))
    return zods.initialize(model=model, config=config, training_data=data)[0]


def seen(engine: Any) -> dict[str, Any]:
    return {
        "weights": sha256(whole(engine)),
        "values": numpy_of(whole(engine)),
        "head": engine.trajectory.head,
        "step": engine.global_steps,
        "members": [] if engine.replicas is None else list(engine.replicas.members),
    }


def rank_of_leader(
    name: str, folder: Path, store: str, pauses: dict[int, str], **replica: Any
) -> dict[str, Any]:
    """Train as the leader, and wait at some steps until a file exists.

    pauses: the file to wait for, by step.
    """
    engine = build(name, {"store": store, "index": 0, "silence_timeout": 3.0, **replica})
    engine.resume(folder / "log")
    (folder / "begun").touch()
    counts = []
    while engine.global_steps < STEPS:
        if engine.global_steps in pauses:
            waits_for(folder / pauses[engine.global_steps])
        engine.train_batch()
        counts.append(len(engine.replicas.members))
    found = {**seen(engine), "counts": counts}
    engine.close()
    return found


def rank_of_joiner(
    name: str, folder: Path, store: str, index: int, last: int, ready: str
) -> dict[str, Any]:
    """Join, and leave after step `last`.

    ready: the file to make when the replica has joined.
    """
    waits_for(folder / "begun")
    engine = build(name, {"store": store, "index": index, "silence_timeout": 30.0})
    touch_when_it_asks(engine, folder / ready)
    engine.resume(folder / "none")
    joined = engine.global_steps
    sizes = []
    while engine.global_steps < last:
        if engine.global_steps == last - 1:
            engine.stop.request("the test ends here")
        engine.train_batch()
        sizes.append(engine.training_dataloader.split[1])
    found = {**seen(engine), "joined": joined, "sizes": sizes}
    engine.close()
    return found


def rank_of_one(name: str, folder: Path) -> dict[str, Any]:
    engine = build(name, None)
    engine.resume(folder)
    while engine.global_steps < STEPS:
        engine.train_batch()
    return seen(engine)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS]
)
def test_a_replica_that_starts_late_joins_and_all_replicas_end_with_the_same_bits(name, tmp_path):
    store = store_address()
    leader, joiner = at_once(
        [
            (2, rank_of_leader, (name, tmp_path, store, {5: "ready"})),
            (1, rank_of_joiner, (name, tmp_path, store, 7, STEPS, "ready")),
        ]
    )
    assert joiner[0]["joined"] >= 1
    assert leader[0]["counts"][-2] == 2
    assert {rank["weights"] for rank in [*leader, *joiner]} == {leader[0]["weights"]}
    assert {rank["head"] for rank in [*leader, *joiner]} == {leader[0]["head"]}
    log = read_log(tmp_path / "log" / "trajectory.log")
    assert (log.num_steps, log.heads[-1]) == (STEPS, leader[0]["head"])
    (alone,) = run_ranks(1, rank_of_one, name, tmp_path / "alone")
    losses = [
        [r.loss for r in of.records if isinstance(r, Step)]
        for of in (log, read_log(tmp_path / "alone" / "trajectory.log"))
    ]
    np.testing.assert_allclose(*losses, rtol=0.05 if "bf16" in name else 1e-3)
    assert alone["step"] == STEPS


def rank_of_one_that_dies(name: str, folder: Path, store: str, at: int) -> Any:
    """Join, and die without a message in the middle of a step."""
    waits_for(folder / "begun")
    engine = build(name, {"store": store, "index": 3})
    touch_when_it_asks(engine, folder / "ready")
    engine.resume(folder / "none")
    while engine.global_steps < at:
        engine.train_batch()
    engine(next(engine.training_dataloader.forever()))
    os.kill(os.getpid(), signal.SIGKILL)


def rank_of_two_lives(name: str, folder: Path, store: str) -> list[dict[str, Any]]:
    """Join, leave, and join again with the same index."""
    first = rank_of_joiner(name, folder, store, 1, 7, "ready")
    second = rank_of_joiner(name, folder, store, 1, STEPS, "back")
    return [first, second]


DEATHS = ["svrg", pytest.param("svrg as terms, bf16", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", DEATHS)
def test_a_replica_that_dies_is_left_out_and_ends_with_the_same_bits_after_a_restart(
    name, tmp_path
):
    results: list[Any] = []
    pauses = {5: "ready", 10: "back"}

    def leader() -> None:
        results.extend(run_ranks(1, rank_of_leader, name, tmp_path, store, pauses))

    store = store_address()
    thread = threading.Thread(target=leader)
    thread.start()
    with pytest.raises(pytest.fail.Exception, match="exit code -9"):
        run_ranks(1, rank_of_one_that_dies, name, tmp_path, store, 8)
    (again,) = run_ranks(1, rank_of_joiner, name, tmp_path, store, 3, STEPS, "back")
    thread.join()
    (found,) = results
    assert found["counts"][8:10] == [1, 1], "the others went on"
    assert again["joined"] >= 10
    assert (again["step"], again["weights"]) == (STEPS, found["weights"])
    assert again["head"] == found["head"]
    assert read_log(tmp_path / "log" / "trajectory.log").heads[-1] == found["head"]


def test_a_replica_leaves_and_joins_again(tmp_path):
    store = store_address()
    leader, other = at_once(
        [
            (1, rank_of_leader, ("mezo", tmp_path, store, {5: "ready", 9: "back"})),
            (2, rank_of_two_lives, ("mezo", tmp_path, store)),
        ]
    )
    for first, second in other:
        assert first["step"] == 7
        assert second["joined"] >= 7
        assert second["weights"] == leader[0]["weights"]
    assert set(leader[0]["counts"]) == {1, 2}


def rank_of_one_that_waits(folder: Path, store: str) -> None:
    """Join a leader that makes no further step."""
    waits_for(folder / "begun")
    replica = {"store": store, "index": 1}
    section = {**COMMON, **RUNS["mezo"], "replicas": replica, "load_timeout": 40.0}
    config = configuration(12, **section)
    engine = zods.initialize(model=Tiny(), config=config, training_data=tiny_data(40))[0]
    engine.resume(folder / "none")


@pytest.mark.slow
def test_a_replica_that_waits_for_a_stopped_leader_ends_with_a_message(tmp_path):
    store, found = store_address(), []
    thread = threading.Thread(
        target=lambda: found.extend(
            run_ranks(1, rank_of_leader, "mezo", tmp_path, store, {1: "ready"})
        )
    )
    thread.start()
    try:
        with pytest.raises(pytest.fail.Exception, match="joining the leading replica"):
            run_ranks(1, rank_of_one_that_waits, tmp_path, store)
    finally:
        (tmp_path / "ready").touch()
        thread.join()
    assert found[0]["step"] == STEPS, "the leader goes on"


def rank_on_one_drive(folder: Path, store: str, index: int) -> tuple[dict[str, Any], list[int]]:
    """A replica with parameters on NVMe; all replicas have one nvme_path."""
    if index:
        waits_for(folder / "begun")
    else:
        (folder / "nvme").mkdir()
    section = {**COMMON, "method": "mezo", "replicas": {"store": store, "index": index}}
    config = configuration(4, offload="nvme", nvme_path=folder / "nvme", **section)
    engine = zods.initialize(model=Wide(), config=config, training_data=wide_data())[0]
    if index:
        touch_when_it_asks(engine, folder / "ready")
    engine.resume(folder / str(index))
    (folder / "begun").touch()
    in_use = []
    while engine.global_steps < STEPS // 2:
        if engine.global_steps == 1 and not index:
            waits_for(folder / "ready")
        if engine.global_steps == STEPS // 2 - 1:
            engine.stop.request("the test ends here")
        engine.train_batch()
        in_use.append(len(list((folder / "nvme").glob(PREFIX + "*"))))
    found = seen(engine)
    engine.close()
    return found, in_use


def test_replicas_on_one_host_with_one_nvme_path_do_not_change_each_other(tmp_path):
    store = store_address()
    ((leader, in_use),), ((joiner, _),) = at_once(
        [(1, rank_on_one_drive, (tmp_path, store, index)) for index in range(2)]
    )
    assert max(in_use) == 2, "each has a folder of its own"
    assert (leader["weights"], leader["head"]) == (joiner["weights"], joiner["head"])


def rank_of_other_configuration(folder: Path, store: str, index: int, **changed: Any) -> str:
    if index:
        waits_for(folder / "begun")
    model = tiny_opt()
    for name, value in changed.items():
        setattr(model.config, name, value)
    section = {**COMMON, "method": "mezo", "replicas": {"store": store, "index": index}}
    config = configuration(4, **section)
    engine = zods.initialize(model=model, config=config, training_data=opt_data())[0]
    try:
        engine.resume(folder / str(index))
        (folder / "begun").touch()
        waits_for(folder / "tried")
        return ""
    except ValueError as error:
        return str(error)
    finally:
        (folder / "tried").touch()
        engine.close()


def test_a_replica_whose_model_has_another_configuration_is_refused(tmp_path):
    store = store_address()
    gelu = functools.partial(rank_of_other_configuration, activation_function="gelu")
    _, (said,) = at_once(
        [(1, rank_of_other_configuration, (tmp_path, store, 0)), (1, gelu, (tmp_path, store, 1))]
    )
    assert 'activation_function is "relu" in the log, "gelu" here' in said


def rank_of_straggler(name: str, folder: Path, store: str) -> dict[str, Any]:
    """Join, and be slow in two steps: in the middle of a step, and where a refresh is due."""
    waits_for(folder / "begun")
    engine = build(name, {"store": store, "index": 1, "silence_timeout": 30.0})
    touch_when_it_asks(engine, folder / "ready")
    engine.resume(folder / "none")
    late, left_out = [6, 8], 0
    while engine.global_steps < STEPS and not engine.should_stop:
        if late and engine.global_steps >= late[0]:
            late.pop(0)
            threading.Timer(LATE + 1.0, (folder / f"back{len(late)}").touch).start()
            time.sleep(LATE)
        left_out += math.isnan(engine.train_batch())
    found = {**seen(engine), "left out": left_out}
    engine.close()
    return found


LATE = 3.0  # seconds


def rank_of_hasty_leader(name: str, folder: Path, store: str) -> dict[str, Any]:
    """Lead, wait for late replicas a fraction of LATE only, and until they are back."""
    pauses = {5: "ready", 8: "back1", 10: "back0"}
    return rank_of_leader(name, folder, store, pauses, straggler_timeout=LATE / 6)


@pytest.mark.parametrize("name", ["svrg", "svrg as terms, bf16", "selected"])
def test_a_straggler_is_left_out_and_catches_up_without_a_restart(name, tmp_path):
    store = store_address()
    leader, straggler = at_once(
        [
            (1, rank_of_hasty_leader, (name, tmp_path, store)),
            (2, rank_of_straggler, (name, tmp_path, store)),
        ]
    )
    assert {rank["weights"] for rank in [*leader, *straggler]} == {leader[0]["weights"]}
    assert {rank["head"] for rank in [*leader, *straggler]} == {leader[0]["head"]}
    assert {rank["step"] for rank in straggler} == {STEPS}
    for rank in straggler:
        assert rank["left out"] >= 1
    counts = leader[0]["counts"]
    assert set(counts) == {1, 2}
    assert counts.index(2) < len(counts) - 1 - counts[::-1].index(1), "it was there before"


def rank_of_leader_that_dies(folder: Path, store: str, name: str) -> None:
    engine = build(name, {"store": store})
    engine.resume(folder / "log")
    (folder / "begun").touch()
    while len(engine.replicas.members) == 1:
        engine.train_batch()
    engine.train_batch()
    os.kill(os.getpid(), signal.SIGKILL)


def leader_dies(folder: Path, store: str, name: str = "svrg") -> None:
    with pytest.raises(pytest.fail.Exception, match="exit code -9"):
        run_ranks(1, rank_of_leader_that_dies, folder, store, name)


def refusal_of_a_replica(folder: Path, store: str, seconds: float, match: str) -> str:
    """Take part until a step is refused. seconds: to wait for a leader that is gone."""
    waits_for(folder / "begun")
    engine = build("svrg", {"store": store, "index": 1, "leader_timeout": seconds})
    engine.resume(folder / "none")

    def train_for_ever() -> None:
        while True:
            engine.train_batch()

    with pytest.raises(ValueError, match=match) as error:
        train_for_ever()
    (folder / "tried").touch()
    engine.close()
    return str(error.value)


def rank_left_alone(folder: Path, store: str) -> str:
    said = refusal_of_a_replica(folder, store, 2.0, "the leading replica is gone for 2 s")
    return said.partition("(")[0]


def test_without_a_leader_the_others_end_after_leader_timeout_and_its_log_is_whole(tmp_path):
    store, said = store_address(), []
    thread = threading.Thread(
        target=lambda: said.extend(run_ranks(2, rank_left_alone, tmp_path, store))
    )
    thread.start()
    leader_dies(tmp_path, store)
    thread.join()
    assert said[0] == said[1]
    assert read_log(tmp_path / "log" / "trajectory.log").num_steps >= 1


def touch_when_it_is_back(engine: Any, path: Path) -> None:
    """Make a file when the replica has connected to another leader and has asked it to join."""
    first, deadline = engine.replicas._follower._channel, time.monotonic() + LIMIT
    while engine.replicas._follower._channel is first and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    path.touch()


def rank_that_outlives_the_leader(name: str, folder: Path, store: str) -> dict[str, Any]:
    waits_for(folder / "begun")
    engine = build(name, {"store": store, "index": 1, "leader_timeout": LIMIT})
    engine.resume(folder / "none")
    if torch.distributed.get_rank() == 0:
        threading.Thread(target=touch_when_it_is_back, args=(engine, folder / "ready")).start()
    left_out = 0
    while engine.global_steps < STEPS and not engine.should_stop:
        left_out += math.isnan(engine.train_batch())
    found = {**seen(engine), "left out": left_out}
    engine.close()
    return found


@pytest.mark.parametrize("name", DEATHS)
def test_the_others_survive_a_leader_that_is_killed_and_started_again(name, tmp_path):
    store, found = store_address(), []
    thread = threading.Thread(
        target=lambda: found.extend(
            run_ranks(2, rank_that_outlives_the_leader, name, tmp_path, store)
        )
    )
    thread.start()
    leader_dies(tmp_path, store, name)
    before = read_log(tmp_path / "log" / "trajectory.log").num_steps
    # it goes on alone for some steps, and pauses until the other is there again
    leader = run_ranks(1, rank_of_leader, name, tmp_path, store, {before + 2: "ready"})
    thread.join()
    assert {rank["weights"] for rank in [*leader, *found]} == {leader[0]["weights"]}
    assert {rank["head"] for rank in [*leader, *found]} == {leader[0]["head"]}
    assert leader[0]["counts"][-1] == 2
    assert found[0]["left out"] == 1


def rank_of_another_past(folder: Path, store: str) -> str:
    """Take part, until a leader with another log is at the same address."""
    return refusal_of_a_replica(folder, store, LIMIT, "replica 1: what it has applied is not in")


def test_a_leader_without_the_steps_that_others_have_applied_refuses_them(tmp_path):
    store, said = store_address(), []
    thread = threading.Thread(
        target=lambda: said.extend(run_ranks(1, rank_of_another_past, tmp_path, store))
    )
    thread.start()
    leader_dies(tmp_path, store)
    (tmp_path / "log" / "trajectory.log").unlink()
    # with the same seed its steps alone would be the same again
    other = functools.partial(rank_of_small_leader, seed=7)
    assert run_ranks(1, other, tmp_path, store, 1) == [1]
    thread.join()
    assert "Start it again to join anew" in said[0]


# --- strangers ------------------------------------------------------------------------------------


def rank_with_another_token(folder: Path, store: str) -> str:
    waits_for(folder / "begun")
    os.environ[TOKEN_VARIABLE] = "not the token of the tests"
    try:
        build("svrg", {"store": store, "index": 1, "leader_timeout": 2.0})
    except ValueError as error:
        return str(error)
    finally:
        (folder / "tried").touch()
    return ""


def test_a_replica_with_another_token_is_refused_and_the_leader_goes_on(tmp_path):
    store = store_address()
    leader, (said,) = at_once(
        [
            (1, rank_of_small_leader, (tmp_path, store, 1)),
            (1, rank_with_another_token, (tmp_path, store)),
        ]
    )
    assert leader == [1]
    assert "is the token the same?" in said


def rank_at_a_port(store: str) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        build("mezo", {"store": store})
    return str(error.value)


def test_a_port_in_use_is_one_error_on_all_ranks():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = run_ranks(2, rank_at_a_port, f"127.0.0.1:{taken.getsockname()[1]}")
    for text in said:
        assert "replicas.store: the leading replica cannot listen at 127.0.0.1:" in text
        assert "Address already in use" in text


def test_the_command_line_reads_the_token_before_the_model_is_loaded(tmp_path):
    replicas = {"token_file": str(tmp_path / "none")}
    config = {"train_batch_size": 8, "zeroth_order": {"lr": 1e-4, "replicas": replicas}}
    write_inputs(tmp_path, config)
    options = {"replica": 0, "replica_store": store_address(), "model": tmp_path / "model"}
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # loading would be another error
    for said in refusals_on_ranks(2, prompted_options(tmp_path, tmp_path / "run", **options)):
        assert "zeroth_order.replicas.token_file: " in said
        assert "cannot be read" in said


def attack(address: str, until: threading.Event) -> None:
    """Connect, say nonsense or nothing, and connect again."""
    host, port = address.split(":")
    kept: list[socket.socket] = []
    number = 0
    while not until.is_set():
        number += 1
        try:
            kept.append(socket.create_connection((host, int(port)), timeout=1))
            kept[-1].settimeout(1)
            kept[-1].sendall(random.Random(number).randbytes(number % 200))
        except OSError:
            time.sleep(0.05)  # the leader does not listen, or has closed the connection
        if len(kept) > 50:
            kept.pop(0).close()


def test_strangers_at_the_leaders_port_change_no_step_and_stop_nobody(tmp_path):
    store, over = store_address(), threading.Event()
    strangers = threading.Thread(target=attack, args=(store, over))
    strangers.start()
    try:
        leader, joiner = at_once(
            [
                (1, rank_of_leader, ("mezo", tmp_path, store, {5: "ready"})),
                (1, rank_of_joiner, ("mezo", tmp_path, store, 7, STEPS, "ready")),
            ]
        )
    finally:
        over.set()
        strangers.join()
    assert joiner[0]["weights"] == leader[0]["weights"]
    first = leader[0]["counts"].index(2)
    assert set(leader[0]["counts"][first:-1]) == {2}, "it took part to the end"


MISFITS: dict[str, tuple[dict[str, Any], int, str]] = {
    "another eps": ({"eps": 0.02}, 1, "zeroth_order.eps: 0.02, but 0.01 at the leading replica"),
    "another division of a refresh": (
        {"anchor_split": False},
        1,
        "zeroth_order.anchor_split: False, but True at the leading replica",
    ),
    "other examples of a refresh": ({"anchor_examples": 8}, 1, "zeroth_order.anchor_examples: 8,"),
    "another weight of the anchor": ({"anchor_weight": 0.5}, 1, "zeroth_order.anchor_weight: 0.5,"),
    "other sizes of steps": ({"normalize": False}, 1, "zeroth_order.normalize: False, but True"),
    "a step size": ({"lr": 1e-2}, 1, "zeroth_order.lr: 0.01, but auto at the leading replica"),
    "another batch": ({"batch": 24}, 1, "train_batch_size 12"),
    "another model": ({"seed_of_model": 1}, 1, "base weights"),
    "other data": ({"data": 44}, 1, "other training data"),
    "more ranks than examples": ({"accumulation": 6}, 2, "do not fit"),
    "the leader's form of the gradient": (
        {"anchor": {"point": "cpu", "gradient": "terms"}},
        1,
        "anchor.gradient",
    ),
}


def rank_of_misfits(names: list[str], folder: Path, store: str) -> dict[str, str]:
    waits_for(folder / "begun")
    said = {}
    for k, name in enumerate(names):
        changed = dict(MISFITS[name][0])
        model, data = Tiny(changed.pop("seed_of_model", 0)), tiny_data(changed.pop("data", 40))
        section = {
            **COMMON,
            **RUNS["svrg"],
            **changed,
            "replicas": {"store": store, "index": 10 + k},
        }
        config = configuration(section.pop("batch", 12), **section)
        engine = zods.initialize(model=model, config=config, training_data=data)[0]
        with pytest.raises(ValueError, match=r".") as error:
            engine.resume(folder / "none")
        said[name] = str(error.value)
        engine.close()
    (folder / "tried").touch()
    return said


def rank_of_small_leader(folder: Path, store: str, accumulation: int, **changed: Any) -> int:
    """Lead with micro-batches of 2 of the 6 examples, until the other replicas have tried."""
    section = {**COMMON, **RUNS["svrg"], "accumulation": accumulation, **changed}
    section["replicas"] = {"store": store}
    engine = zods.initialize(
        model=Tiny(), config=configuration(12, **section), training_data=tiny_data(40)
    )[0]
    engine.resume(folder / "log")
    (folder / "begun").touch()
    while not (folder / "tried").exists():
        engine.train_batch()
    engine.close()
    return len(engine.replicas.members)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_replica_that_does_not_fit_is_refused_with_the_reason_and_the_others_go_on(
    ranks, tmp_path
):
    names = [name for name, (_, of, _) in MISFITS.items() if of == ranks]
    store = store_address()
    leader, said = at_once(
        [
            (1, rank_of_small_leader, (tmp_path, store, 6 if ranks == 2 else 1)),
            (ranks, rank_of_misfits, (names, tmp_path, store)),
        ]
    )
    assert leader == [1]
    for name in names:
        assert MISFITS[name][2] in said[0][name]
        assert len({rank[name] for rank in said}) == 1


def rank_of_other_code(folder: Path, store: str) -> list[str]:
    """A replica whose model is of a file with one more comment than the leader's."""
    waits_for(folder / "begun")
    model = tiny_of_file(folder / "my_model.py", "# changed")
    section = {**COMMON, **RUNS["svrg"], "replicas": {"store": store, "index": 1}}
    config = configuration(12, **section)
    engine = zods.initialize(model=model, config=config, training_data=tiny_data(40))[0]
    texts = LogTexts("zods.training.log_checks")
    engine.resume(folder / "none")
    engine.stop.request("the test ends here")
    engine.train_batch()
    (folder / "tried").touch()
    engine.close()
    return texts.texts


def test_a_replica_with_other_code_says_so_in_one_line(tmp_path):
    store = store_address()
    _, ((text,),) = at_once(
        [
            (1, rank_of_small_leader, (tmp_path, store, 1)),
            (1, rank_of_other_code, (tmp_path, store)),
        ]
    )
    assert "runs other code than the leading one" in text
    assert "code.model" in text
    assert text.count("->") == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"replicas": {"store": "somewhere"}}, 'expected "host:port"'),
        ({"replicas": {"store": "h:1", "indx": 1}}, "Did you mean 'index'"),
    ],
)
def test_mistakes_in_the_section_of_replicas_are_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        parse_section({"method": "mezo", **changed})


@pytest.mark.parametrize(
    ("leading", "own", "said"),
    [
        (None, {}, "zeroth_order.selector: given, but none at the leading replica"),
        ({}, None, "zeroth_order.selector: none, but one at the leading replica"),
        ({"interval": 2}, {}, "zeroth_order.selector.interval: 1, but 2 at the leading replica"),
        ({"target_file": "/here/a.jsonl"}, {"target_file": "/there/a.jsonl"}, None),
    ],
)
def test_all_replicas_choose_by_the_same_selector(leading, own, said):
    selectors = [
        None if of is None else parse_selector({"candidates": 24, "strategy": "target", **of}, "")
        for of in (leading, own)
    ]
    if said is None:
        check_same_selector(*selectors)
        return
    with pytest.raises(ValueError, match=re.escape(said)):
        check_same_selector(*selectors)


# --- messages -------------------------------------------------------------------------------------


def rank_of_a_late_replica(address: str) -> dict[str, Any]:
    def replica(index: int) -> Replicas:
        config = parse_section(
            {"method": "mezo", "replicas": {"store": address, "index": index}}
        ).replicas
        assert config is not None
        return Replicas(config, Communicator(torch.device("cpu")))

    def publish(steps: range) -> None:
        for step in steps:
            leader.publish(text_of(Step(step, 0.5, 1e-6, (1.0,), (0, 1))))

    leader, late = replica(0), replica(1)
    leader.publish_log([])
    leader.publish(text_of(Header("Model", ())))
    leader.publish(text_of(RunRecord(0, parse_section({"method": "mezo"}), 8, 1, {})))
    publish(range(50_000))
    log = parse_log(late.read_log(), "log")
    for_log = late.sent_bytes
    publish(range(50_000, 52_000))
    caught_up = [late.to_catch_up(step, log.heads[-1]).step for step in range(50_000, 52_000)]
    late.close()
    leader.close()
    return {
        "steps": log.num_steps,
        "for the log": for_log,
        "to catch up": late.sent_bytes - for_log,
        "same": caught_up == list(range(50_000, 52_000)),
    }


def test_a_late_replica_reads_records_in_blocks():
    (found,) = run_ranks(1, rank_of_a_late_replica, store_address())
    assert found["steps"] == 50_000
    assert found["same"]
    assert found["for the log"] < 3000, "tens of requests"
    assert found["to catch up"] < 1000


def rank_that_counts_bytes(folder: Path, store: str, index: int, directions: int) -> list[int]:
    """Train with another replica, and count the bytes that this rank sends in each step."""
    if index:
        waits_for(folder / "begun")
    section = {**COMMON, "method": "mezo", "num_directions": directions}
    config = configuration(12, **section, replicas={"store": store, "index": index})
    engine = zods.initialize(model=Tiny(), config=config, training_data=tiny_data(40))[0]
    if index:
        touch_when_it_asks(engine, folder / "ready")
    engine.resume(folder / str(index))
    (folder / "begun").touch()
    sent = []
    while engine.global_steps < STEPS:
        if engine.global_steps == 2 and not index:
            waits_for(folder / "ready")
        if engine.global_steps == STEPS - 1:
            engine.stop.request("the test ends here")
        before = engine.replicas.sent_bytes
        engine.train_batch()
        sent.append(engine.replicas.sent_bytes - before)
    engine.close()
    return sent


@pytest.mark.parametrize("directions", [1, 20])
def test_a_step_sends_a_message_each_way_and_8_bytes_per_further_direction(directions, tmp_path):
    store = store_address()
    leader, follower = at_once(
        [
            (ranks, rank_that_counts_bytes, (tmp_path, store, k, directions))
            for k, ranks in enumerate((1, 2))
        ]
    )
    beat = 1 + 16 + 1
    # length, HMAC, kind, flags, tag, head; two sums and three counts
    fixed = 1 + 16 + 1 + 1 + 4 + 4 + 2 * 8 + 3 * 2
    post, notice = fixed + 8 * directions, 1 + 16 + 1 + 4 + 4

    def is_of_a_step(sent: int, expected: int) -> bool:
        """Whether it is the expected number of bytes and a few beats."""
        return (sent - expected) % beat == 0 and 0 <= sent - expected <= 10 * beat

    assert all(is_of_a_step(sent, post) for sent in follower[0][2:-2])
    # A thread sends the leader's messages, answers and notices by turns. Those of the first and of
    # the last step may be counted in the step after their own.
    sent, steps = sum(leader[0][-6:-2]), range(3, 6)
    assert any(
        is_of_a_step(sent, answers * post + notices * notice)
        for answers in steps
        for notices in steps
        if abs(answers - notices) <= 1
    )
    assert follower[1] == [0] * len(follower[1]), "rank 0 alone has the connection"


# --- through the launcher -------------------------------------------------------------------------


@pytest.mark.slow
def test_two_launches_of_the_command_line_train_one_model(tmp_path):
    anchor = {"anchor_interval": 50, "anchor": {"point": "terms", "gradient": "cpu"}}
    section = {**OF_THE_PAPER, "lr": 1e-4, **anchor}
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 3}, "zeroth_order": section}
    write_inputs(tmp_path, config)
    store, said = store_address(), {}

    def run(replica: int, ranks: int) -> None:
        said[replica] = launch(
            Path(zods.finetune.__file__),
            *prompted_options(
                tmp_path,
                tmp_path / str(replica),
                max_steps=100,
                save_model=True,
                replica=replica,
                replica_store=store,
            ),
            num_gpus=ranks,
        )

    threads = [threading.Thread(target=run, args=of) for of in ((0, 2), (1, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for code, output in said.values():
        assert code == 0, output[-4000:]
    assert "replica 1 (1 ranks) takes part from step" in said[0][1]
    models = [
        (tmp_path / replica / "model" / "model.safetensors").read_bytes() for replica in ("0", "1")
    ]
    assert models[0] == models[1]
    assert not (tmp_path / "1" / "trajectory.log").exists(), "the leader keeps the log"
