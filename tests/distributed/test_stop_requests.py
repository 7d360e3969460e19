"""SIGTERM in a long evaluation and in a refresh of the anchor.

The pass is abandoned on all ranks and leaves no trace. The run that is started again ends as the
undisturbed one.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

import zods.finetune
from tests.distributed.command_line import prompted_options, write_inputs
from tests.distributed.models import OF_THE_PAPER
from tests.distributed.ranks import run_ranks
from zods.cli.arguments import parse_arguments
from zods.cli.run_folder import read_metrics
from zods.comm.communicator import Communicator
from zods.comm.stop_request import StopRequest, StopRequested
from zods.forward.evaluator import Evaluator
from zods.training import stop_poll
from zods.training.stop_poll import StopPoll

CONFIG: dict[str, Any] = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 3},
    "zeroth_order": {
        **OF_THE_PAPER,
        "lr": 1e-3,
        "anchor_interval": 2,
        "evaluation": "sequential",
        "anchor": {"point": "cpu", "gradient": "cpu"},
    },
}
SELECTOR = {"candidates": 12, "interval": 1, "strategy": "random"}
STEPS = 4
FIRST_ORDER = ["--optimizer", "adamw", "--lr", "1e-3"]
# what each batch of a pass calls
PASSES: dict[str, tuple[type, str]] = {
    "evaluation": (Evaluator, "outputs"),
    "refresh": (Evaluator, "loss_sums"),
    "first order": (deepspeed.DeepSpeedEngine, "forward"),
}


def options(folder: Path, output: str) -> list[str]:
    return prompted_options(
        folder,
        folder / output,
        validation_file=folder / "train.jsonl",
        max_length=32,
        max_steps=STEPS,
        eval_interval=2,
        save_interval=1,
        save_model=True,
        resume="auto",
    )


def striking(method: Callable[..., Any], due: Callable[[], bool]) -> Callable[..., Any]:
    """Make `method` send SIGTERM to this process, once, before a call at which `due`."""
    struck = []

    def struck_method(*args: Any, **kwargs: Any) -> Any:
        if not struck and due():
            struck.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return method(*args, **kwargs)

    return struck_method


def rank_of_run(given: list[str], where: str | None, step: int) -> dict[str, Any]:
    """Run the command line, with a SIGTERM to rank 1 in the second batch of a pass after `step`."""
    stop_poll.SECONDS = 1e-9  # ask at each batch
    request = StopRequest()
    engine, *others = zods.finetune.start(parse_arguments(given))
    engine.stop_on(request)
    request.listen()
    calls: list[int] = []

    def due() -> bool:
        if engine.comm.rank == 1 and engine.global_steps == step:
            calls.append(step)
        return len(calls) == 2

    if where is not None:
        owner, name = PASSES[where]
        setattr(owner, name, striking(getattr(owner, name), due))
    zods.finetune.finetune(parse_arguments(given), engine, *others)
    engine.close()
    return {"stopped": engine.should_stop, "reason": request.reason, "calls": len(calls)}


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs and a run that nothing disturbs. Its parameter: with a selector?"""
    folder = tmp_path_factory.mktemp("runs")
    section = {**CONFIG["zeroth_order"], **({"selector": SELECTOR} if request.param else {})}
    write_inputs(folder, {**CONFIG, "zeroth_order": section})
    run_ranks(2, rank_of_run, options(folder, "undisturbed"), None, 0)
    return folder


PLACES = [
    ("evaluation", 2),
    ("refresh", 2),
    ("evaluation", 0),
    ("evaluation", STEPS),
    ("refresh", 0),
]
# Each kind of pass, and a run with a selector and one without.
DEFAULT = {(False, "evaluation", 2), (True, "refresh", 2)}


@pytest.mark.parametrize(
    ("folder", "where", "step"),
    [
        pytest.param(*case, marks=[] if case in DEFAULT else pytest.mark.slow)
        for case in ((selector, *place) for selector in (False, True) for place in PLACES)
    ],
    indirect=["folder"],
)
def test_a_pass_that_sigterm_ends_leaves_no_trace_and_the_next_start_repeats_it(
    folder: Path, where: str, step: int
):
    check_pass(folder, options(folder, f"{where}-{step}"), where, step)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 0])
def test_an_evaluation_of_first_order_training_that_sigterm_ends_is_repeated(tmp_path, step: int):
    write_inputs(tmp_path, {"train_batch_size": 8, "zero_optimization": {"stage": 3}})
    run_ranks(2, rank_of_run, [*options(tmp_path, "undisturbed"), *FIRST_ORDER], None, 0)
    given = [*options(tmp_path, f"first order-{step}"), *FIRST_ORDER]
    check_pass(tmp_path, given, "first order", step)


def check_pass(folder: Path, given: list[str], where: str, step: int) -> None:
    """Send SIGTERM in a pass after `step`, start again, and compare with the undisturbed run."""
    found = run_ranks(2, rank_of_run, given, where, step)
    assert [rank["stopped"] for rank in found] == [True, True]
    assert [rank["reason"] for rank in found] == [None, "SIGTERM"]
    assert found[1]["calls"] == 2, "the pass ends at the next batch"
    run, undisturbed = folder / f"{where}-{step}", folder / "undisturbed"
    records = list(read_metrics(run))
    if where != "refresh":
        assert not [r for r in records if r["kind"] == "eval" and r["step"] == step]
    assert not any(r["kind"] == "summary" for r in records)
    if step:
        assert (run / "checkpoints" / "latest").read_text().strip() == f"global_step{step}"
    assert not run_ranks(2, rank_of_run, given, None, 0)[0]["stopped"]
    for name in ("trajectory.log", "model/model.safetensors"):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert untimed(run) == untimed(undisturbed)


def untimed(run: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "scalar_bytes", "selection_seconds")
    return [
        {key: value for key, value in record.items() if key not in timed}
        for record in read_metrics(run)
        if record["kind"] != "summary"
    ]


def rank_of_polls() -> list[Any]:
    comm = Communicator(torch.device("cpu"))
    asked_after = 7
    calls: list[int] = []
    poll = StopPoll(comm, lambda: comm.rank == 1 and len(calls) >= asked_after)
    sent = comm.scalar_bytes
    with contextlib.suppress(StopRequested):
        while len(calls) < 1000:
            calls.append(0)
            poll()
    return [len(calls), (comm.scalar_bytes - sent) // 16]


def test_ranks_agree_on_the_batch_at_which_they_stop_and_ask_rarely_where_batches_are_short():
    first, second = run_ranks(2, rank_of_polls)
    assert first == second
    calls, questions = first
    assert calls <= 1 + stop_poll.MOST_BATCHES
    assert questions == 2
