"""`"lr": "auto"` on real ranks: measured once, logged, scaled by the schedule, and the same anywhere."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import zods
from tests.distributed.models import configuration, opt_data, sha256, tiny_opt, whole
from tests.distributed.ranks import run_ranks
from tests.helpers import LogTexts, asked_for, sampled
from zods.comm.stop_request import StopRequested
from zods.core import annealing
from zods.trajectory.log import read_log
from zods.trajectory.records import Step, StepSize

BATCH = 12
DECAY = {
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_max_lr": "auto",
            "warmup_num_steps": 2,
            "total_num_steps": 9,
            "warmup_type": "linear",
        },
    }
}
DEFAULT = {"method": "mezo", "direction": "low_rank", "examples_per_direction": 1, "eps": 1e-3}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {**DEFAULT, "normalize": True},
    "not normalized": {**DEFAULT, "examples_per_direction": "all"},
    "svrg": {**DEFAULT, "method": "mezo_svrg", "anchor_directions": 4, "anchor_interval": 3},
    "sequential": {**DEFAULT, "normalize": True, "evaluation": "sequential"},
    "bf16": {**DEFAULT, "normalize": True, "bf16": True},
    "selector": {**DEFAULT, "selector": {"candidates": 16, "strategy": "random"}},
    "cpu": {**DEFAULT, "normalize": True, "offload": "cpu"},
}
DEFAULT_SETTINGS = ("default", "not normalized")


def build(**given: Any) -> Any:
    config = configuration(BATCH, **{"lr": "auto", **given})
    return zods.initialize(model=tiny_opt(), config=config, training_data=opt_data(40))[0]


def rank_of_settings(
    names: list[str],
) -> dict[str, tuple[float, StepSize, list[float], bool]]:
    found = {}
    for name in names:
        engine = build(**SETTINGS[name])
        before, weights = engine.get_lr()[0], sha256(whole(engine))
        engine._passes.measure_step_size()
        kept = sha256(whole(engine)) == weights
        engine.train_batch()
        found[name] = (before, engine.recorder.step_size, engine.get_lr(), kept)
        engine.close()
    return found


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> dict[int, list[Any]]:
    names = asked_for(request, "name", SETTINGS, DEFAULT_SETTINGS)
    return {ranks: run_ranks(ranks, rank_of_settings, names) for ranks in (1, 3)}


@pytest.mark.parametrize("name", sampled(SETTINGS, DEFAULT_SETTINGS))
def test_all_ranks_measure_one_step_size_before_the_first_step_and_change_no_weight(measured, name):
    for ranks in measured.values():
        before, found, after, kept = ranks[0][name]
        assert kept
        assert before != before  # NaN
        assert {tuple(rank[name][1:2]) for rank in ranks} == {(found,)}
        assert after == [found.lr]
        assert 1e-6 < found.lr < 1.0
        assert found.loss == pytest.approx(3.6, abs=0.3)  # near log(37)


@pytest.mark.parametrize(
    "name", sampled([name for name in SETTINGS if name != "bf16"], DEFAULT_SETTINGS)
)
def test_the_measured_step_size_does_not_depend_on_the_number_of_ranks(measured, name):
    alone, together = (measured[ranks][0][name][1] for ranks in (1, 3))
    # Float32 losses of other micro-batches differ in their last bits; where losses are known by
    # micro-batch only, so do the units of the spread.
    assert alone.lr == pytest.approx(together.lr, rel=0.05 if name != "sequential" else 0.5)
    assert alone.trace == pytest.approx(together.trace, rel=1e-2)


def rank_of_schedule(folder: Path) -> dict[str, Any]:
    # two steps to a window, and each
    annealing.WINDOW, annealing.ERRORS, annealing.RISING = (
        2,
        -math.inf,
        1,
    )  # each window but the first is a rise
    found: dict[str, Any] = {}
    for name, at in {"whole": None, "logged": 3, "saved": 3}.items():
        engine = build(**DEFAULT, normalize=True, top=DECAY)
        if name != "saved":
            engine.resume(folder / name)
        for _ in range(at or 6):
            engine.train_batch()
        if at is not None:
            engine.save_checkpoint(folder / "checkpoints" / name)
            engine.close()
            engine = build(**DEFAULT, normalize=True, top=DECAY)
            if name == "logged":
                engine.resume(folder / name)
            else:
                engine.load_checkpoint(folder / "checkpoints" / name)
            for _ in range(3):
                engine.train_batch()
        found[name] = (engine.recorder.step_size, sha256(whole(engine)))
        engine.close()
    return found


def test_schedule_and_backoff_scale_the_measured_step_size_and_a_restart_keeps_them(tmp_path):
    found = run_ranks(2, rank_of_schedule, tmp_path)[0]
    assert len(set(found.values())) == 1
    records = {
        name: read_log(tmp_path / name / "trajectory.log").records
        for name in found
        if name != "saved"
    }
    for of_log in records.values():
        (step_size,) = (record for record in of_log if isinstance(record, StepSize))
        lrs = [record.lr / step_size.lr for record in of_log if isinstance(record, Step)]
        # DeepSpeed's schedule has two steps at 0; the second window ends with the fourth step
        assert lrs == pytest.approx([0.0, 0.0, 0.5, 1.0, 6 / 7 / 2, 5 / 7 / 2])


def rank_of_changes(folder: Path) -> dict[str, Any]:
    """Restarts of a run with a checkpoint and a schedule under other settings."""
    found: dict[str, Any] = {}
    engine = build(**DEFAULT, normalize=True, top=DECAY)
    engine.resume(folder / "run")
    for _ in range(3):
        engine.train_batch()
    engine.save_checkpoint(folder / "run" / "checkpoints")
    found["first"] = (engine.recorder.step_size, sha256(whole(engine)))
    engine.close()
    for name, changed in {"number": {"lr": 1e-3}, "raw": {"normalize": False}}.items():
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            shutil.copytree(folder / "run", folder / name)
        torch.distributed.barrier()
        engine = build(**{**DEFAULT, "normalize": True, "top": DECAY, **changed})
        engine.resume(folder / name)
        restored = sha256(whole(engine))
        engine.train_batch()
        found[name] = (restored, engine.recorder.step_size, engine.last_step.lr)
        engine.close()
    engine = build(**DEFAULT, normalize=True, top=DECAY, lr=1e-3)
    with pytest.raises(ValueError, match=r".") as caught:
        engine.load_checkpoint(folder / "run" / "checkpoints")
    found["loaded"] = str(caught.value)
    engine.close()
    return found


def test_a_restart_with_other_settings_mixes_no_step_sizes(tmp_path):
    found = run_ranks(2, rank_of_changes, tmp_path)[0]
    measured, weights = found["first"]
    # the log brings the run back where the checkpoint holds factors in place of step sizes
    restored, _, lr = found["number"]
    assert (restored, lr) == (weights, 1e-3)
    restored, again, lr = found["raw"]
    assert restored == weights
    assert again.step == 3
    assert lr == again.lr != measured.lr
    assert "made with zeroth_order.lr = 'auto', this run has 0.001" in found["loaded"]


def rank_of_few_labels() -> list[float]:
    """Three of four examples have no label that counts; then a training set of three examples."""
    data = opt_data(40)
    for k, example in enumerate(data):
        if k % 4:
            example["labels"] = torch.full_like(example["labels"], -100)
    found = []
    for examples, batch in ((data, BATCH), (opt_data(3), 2)):
        config = configuration(batch, **{**DEFAULT, "lr": "auto", "normalize": True})
        engine = zods.initialize(model=tiny_opt(), config=config, training_data=examples)[0]
        engine._passes.measure_step_size()
        found.append(engine.recorder.step_size.lr)
        engine.close()
    return found


def test_few_labels_or_examples_are_enough():
    found = run_ranks(2, rank_of_few_labels)
    assert found[0] == found[1]
    assert all(1e-6 < lr < 1.0 for lr in found[0])


def rank_of_mistakes() -> list[str]:
    messages = []
    with pytest.raises(ValueError, match=r".") as caught:
        zods.initialize(model=tiny_opt(), config=configuration(BATCH, lr="auto", method="mezo"))
    messages.append(str(caught.value))
    for name, change in {"not a number": torch.nan, "constant": 0.0}.items():
        model = tiny_opt()
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(change)
        if name == "constant":
            for param in model.parameters():
                param.requires_grad_(False)
            model.model.decoder.layers[0].fc1.weight.requires_grad_(True)
        engine = zods.initialize(
            model=model,
            config=configuration(BATCH, **{**DEFAULT, "lr": "auto"}),
            training_data=opt_data(40),
        )[0]
        with pytest.raises(RuntimeError, match=r".") as failed:
            engine.train_batch()
        messages.append(str(failed.value))
        engine.close()
    engine = build(**DEFAULT)
    engine.stop.request("a test")
    with pytest.raises(StopRequested):
        engine.train_batch()
    messages.append(str(engine.recorder.step_size))
    engine.close()
    return messages


def test_what_cannot_be_measured_is_told_and_a_request_to_stop_ends_a_measurement():
    no_data, not_finite, constant, after_stop = run_ranks(2, rank_of_mistakes)[0]
    assert "training_data: missing" in no_data
    assert "lr" in no_data
    assert 'zeroth_order.lr: "auto" cannot be measured: the loss is not finite' in not_finite
    assert 'zeroth_order.lr: "auto" cannot be measured: the loss is 3.61' in constant
    assert "rises by 0 at a distance of 2.048 " in constant
    assert after_stop == "None"


def rank_of_warnings(lr: float) -> list[str]:
    said = LogTexts("zods.training.step_reporter", level=logging.WARNING)
    engine = build(**DEFAULT, normalize=True, lr=lr)
    for _ in range(80):
        engine.train_batch()
    return said.texts


def test_a_loss_that_rises_is_said_once_with_what_to_do():
    assert run_ranks(1, rank_of_warnings, 1e-2) == [[]]
    ((text,),) = run_ranks(1, rank_of_warnings, 1.0)
    assert "more than 2 times that of the first ones. The step size is too large" in text
