"""Real steps on two ranks against the dense reference, and the engine's interface."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupLR
from torch import nn

import zods
from tests.distributed.models import (
    Tiny,
    collate,
    configuration,
    global_batch,
    local_shards,
    numpy_of,
    opt_data,
    sha256,
    stored_digest,
    tiny_data,
    tiny_opt,
    train,
    whole,
)
from tests.distributed.ranks import run_ranks
from tests.helpers import asked_for, sampled
from tests.reference.dense import DenseReference, loss_of_module, named_parameters_of
from zods.core.directions import derive_seed
from zods.core.example_groups import part_starts
from zods.data.order import anchor_order

STEPS = 20
BATCH = 8
COMMON = {"eps": 1e-2, "lr": 1e-2, "seed": 7}
SVRG = {
    **COMMON,
    "method": "mezo_svrg",
    "anchor_interval": 6,
    "anchor_lr": 2e-2,
    "anchor_directions": 2,
    "anchor_split": False,
}
LOW_RANK = {"distribution": "low_rank", "rank": 2}
STORAGES = [
    ("device", "device"),
    ("cpu", "cpu"),
    ("nvme", "nvme"),
    ("terms", "terms"),
    ("cpu", "terms"),
    ("terms", "nvme"),
    ("device", "cpu"),
    ("nvme", "device"),
]
# (model, arguments of `configuration`) by name
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mezo": ("tiny", {**COMMON, "method": "mezo"}),
    "mezo-stage-0": ("tiny", {**COMMON, "method": "mezo", "stage": 0}),
    "mezo-many": (
        "tiny",
        {
            **COMMON,
            "method": "mezo",
            "num_directions": 3,
            "direction": "rademacher",
            "weight_decay": 0.3,
        },
    ),
    "mezo-accumulation": ("tiny", {**COMMON, "method": "mezo", "accumulation": 2}),
    "mezo-normalized": (
        "tiny",
        {**COMMON, "method": "mezo", "normalize": True, "weight_decay": 0.3, "num_directions": 2},
    ),
    "svrg-normalized": ("tiny", {**SVRG, "normalize": True}),
    "svrg-normalized-terms": (
        "tiny",
        {
            **SVRG,
            "normalize": True,
            "share_direction": False,
            "anchor": {"point": "terms", "gradient": "terms"},
        },
    ),
    "svrg-split": ("tiny", {**SVRG, "anchor_directions": 3, "anchor_split": True}),
    "svrg-split-examples": (
        "tiny",
        {
            **SVRG,
            "anchor_split": True,
            "anchor_examples": 7,
            "normalize": True,
            "anchor": {"point": "terms", "gradient": "terms"},
        },
    ),
    "svrg-examples": ("tiny", {**SVRG, "anchor_examples": 5}),
    "svrg-half-weight": ("tiny", {**SVRG, "anchor_weight": 0.5, "normalize": True}),
    "svrg-auto-weight": ("tiny", {**SVRG, "anchor_weight": "auto", "num_directions": 2}),
    "svrg-auto-weight-terms": (
        "tiny",
        {**SVRG, "anchor_weight": "auto", "anchor": {"point": "terms", "gradient": "terms"}},
    ),
    "svrg-stage-0": ("tiny", {**SVRG, "stage": 0, "anchor": {"point": "cpu", "gradient": "nvme"}}),
    "svrg-own-directions": (
        "tiny",
        {**SVRG, "share_direction": False, "num_directions": 2, "weight_decay": 0.3},
    ),
    "svrg-decay-terms": (
        "tiny",
        {**SVRG, "weight_decay": 0.3, "anchor": {"point": "terms", "gradient": "cpu"}},
    ),
    "mezo-sequential": (
        "tiny",
        {**COMMON, "method": "mezo", "evaluation": "sequential", "num_directions": 2},
    ),
    "mezo-lockstep": (
        "tiny",
        {**COMMON, "method": "mezo", "evaluation": "lockstep", "num_directions": 2},
    ),
    "low-rank-mezo": (
        "tiny",
        {**COMMON, "method": "mezo", "direction": "low_rank", "num_directions": 2},
    ),
    "low-rank-sequential": (
        "tiny",
        {**COMMON, "method": "mezo", "direction": LOW_RANK, "evaluation": "sequential"},
    ),
    "low-rank-svrg-decay-terms": (
        "tiny",
        {
            **SVRG,
            "direction": LOW_RANK,
            "weight_decay": 0.3,
            "anchor": {"point": "terms", "gradient": "terms"},
        },
    ),
    "low-rank-svrg-stored": ("opt", {**SVRG, "direction": LOW_RANK, "lr": 1e-3, "anchor_lr": 1e-3}),
    "opt-mezo": ("opt", {**COMMON, "method": "mezo", "lr": 1e-3}),
    "opt-from-pretrained-svrg": ("opt", {**SVRG, "lr": 1e-3, "anchor_lr": 1e-3}),
    **{
        f"svrg-{point}-{gradient}": (
            "tiny",
            {**SVRG, "anchor": {"point": point, "gradient": gradient}},
        )
        for point, gradient in STORAGES
    },
}
# The others are slow: each of their properties is in one of these.
DEFAULT = {
    *("mezo", "mezo-stage-0", "mezo-many", "mezo-normalized", "mezo-lockstep"),
    *("svrg-normalized-terms", "svrg-split-examples", "svrg-auto-weight", "svrg-own-directions"),
    *("low-rank-svrg-decay-terms", "opt-mezo", "opt-from-pretrained-svrg"),
    *("svrg-cpu-cpu", "svrg-terms-nvme", "svrg-nvme-device"),
}
MODELS = {"tiny": (Tiny, tiny_data), "opt": (tiny_opt, opt_data)}


def rank_of_cases(folder: Path, names: list[str]) -> dict[str, Any]:
    from transformers import OPTForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    found = {}
    for name in names:
        kind, arguments = CASES[name]
        make, make_data = MODELS[kind]
        data = make_data()
        nvme = folder / name
        nvme.mkdir(exist_ok=True)
        config = configuration(BATCH, nvme_path=nvme, **arguments)
        if "from-pretrained" in name:
            if torch.distributed.get_rank() == 0:
                make().save_pretrained(folder / "saved")
            torch.distributed.barrier()
            alive = HfDeepSpeedConfig(
                {key: value for key, value in config.items() if key != "zeroth_order"}
            )
            model = OPTForCausalLM.from_pretrained(folder / "saved")
            assert all(hasattr(p, "ds_tensor") for p in model.parameters())
            del alive
        else:
            model = make()
        engine = zods.initialize(model=model, config=config, training_data=data)[0]
        before = whole(engine)
        losses = train(engine, data, range(STEPS))
        found[name] = {
            "before": numpy_of(before),
            "after": numpy_of(whole(engine)),
            "losses": losses,
            "shards": [shard.name for shard in engine.sharded_parameters],
            "refreshed": engine.anchor_step,
            "measured": engine.last_step.measured,
            "training": any(module.training for module in engine.module.modules()),
        }
        if engine.anchor is not None:
            found[name]["bytes"] = (engine.anchor.device_bytes, engine.anchor.offloaded_bytes)
    return found


@pytest.fixture(scope="module")
def cases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    names = asked_for(request, "name", CASES, DEFAULT)
    return run_ranks(2, rank_of_cases, tmp_path_factory.mktemp("cases"), names)


def dense_run(name: str) -> tuple[DenseReference, list[float]]:
    """Make twenty steps of the reference in float64, from the same float32 parameters."""
    kind, arguments = CASES[name]
    make, make_data = MODELS[kind]
    model, data = make(), make_data()
    section = {
        k: v
        for k, v in arguments.items()
        if k not in ("stage", "accumulation", "anchor", "evaluation")
    }
    if section.get("direction") == LOW_RANK:
        section |= {"direction": LOW_RANK["distribution"], "rank": LOW_RANK["rank"]}
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    params = named_parameters_of(model)
    loss = loss_of_module(model.double(), lambda outputs, _: outputs["loss"])
    examples = section.pop("anchor_examples", None)
    number = section.get("anchor_directions", 1) if section.get("anchor_split") else 1

    def parts_of_refresh(step: int) -> list[tuple[Any, float]]:
        seed = derive_seed(section["seed"], "anchor_examples", step)
        order = anchor_order(len(data), examples=examples, shuffled=number > 1, seed=seed)
        bounds = [*part_starts(len(order), number), len(order)]
        parts = [
            collate([data[i] for i in order[start:stop].tolist()])
            for start, stop in itertools.pairwise(bounds)
        ]
        counts = [int((part["labels"] != -100).sum()) for part in parts]
        return [(part, n / sum(counts)) for part, n in zip(parts, counts, strict=True)]

    dense = DenseReference(
        params=params, loss=loss, trainable=trainable, parts=parts_of_refresh, **section
    )
    return dense, [dense.step(collate(global_batch(data, step, BATCH))) for step in range(STEPS)]


@pytest.mark.parametrize("name", sampled(CASES, DEFAULT))
def test_twenty_steps_agree_with_the_dense_reference(cases, name):
    """Compare within a tolerance that rounding explains.

    The reference is float64. A float32 loss of size L has an error of a few units in the last
    place, 2^-23 L. A projected gradient has that error over 2 eps. A step moves an element by lr
    |z| times the projected gradient, |z| < 4, for the evaluations at theta and at the anchor. The
    float32 additions to a parameter of size 1 round by 2^-24 each, and nothing amplifies these
    errors in so few steps. A factor of 8 allows for errors that add up in the forward. The
    tolerance is still 100 times below the distance that an element moves.
    """
    dense, dense_losses = dense_run(name)
    arguments = CASES[name][1]
    ulp_of_loss = 2.0**-23 * max(dense_losses)
    lr = max(arguments["lr"], arguments.get("anchor_lr", 0.0))
    tolerance = STEPS * (lr * 4 * 2 * 8 * ulp_of_loss / (2 * arguments["eps"]) + 2.0**-24)
    for rank in cases:
        found = rank[name]
        assert list(found["after"]) == list(dense.params)
        for key, expected in dense.params.items():
            error = np.abs(found["after"][key] - expected.numpy()).max()
            assert error <= tolerance, f"{key}: {error:.1e} > {tolerance:.1e}"
        moved = max(np.abs(found["after"][k] - found["before"][k]).max() for k in found["after"])
        assert moved > 100 * tolerance
        np.testing.assert_allclose(found["losses"], dense_losses, rtol=0, atol=40 * tolerance)


def test_a_step_reports_what_it_has_measured_for_its_update(cases):
    # the last step reports the noise of the estimates, too
    assert {"noise_scale", "direction_noise"} <= cases[0]["mezo"]["measured"].keys()
    measured = {
        name: {
            key: value
            for key, value in cases[0][name]["measured"].items()
            if key in ("rms", "anchor_weight")
        }
        for name in cases[0]
    }
    assert measured["mezo"] == measured["svrg-cpu-cpu"] == {}
    for name in ("mezo-normalized", "svrg-auto-weight"):
        dense, _ = dense_run(name)
        if "normalized" in name:
            assert measured[name] == {"rms": pytest.approx(dense.rms(), rel=1e-2)}
        else:
            dense.products.pop()  # the weight of the last step follows from those before it
            assert measured[name] == {"anchor_weight": pytest.approx(dense.weight(), rel=1e-2)}


def test_a_frozen_parameter_keeps_its_bits_and_has_no_shard(cases):
    for rank in cases:
        for name, found in rank.items():
            if CASES[name][0] == "tiny":
                assert not any("frozen" in shard for shard in found["shards"])
                for key in ("frozen.weight", "frozen.bias"):
                    assert np.array_equal(found["before"][key], found["after"][key])


def test_a_tied_head_has_one_shard_and_moves(cases):
    for name, key in (
        ("svrg-cpu-cpu", "embed.weight"),
        ("opt-mezo", "model.decoder.embed_tokens.weight"),
    ):
        for rank in cases:
            found = rank[name]
            assert (
                sum(
                    shard.endswith(("head.weight", "embed.weight", "embed_tokens.weight"))
                    for shard in found["shards"]
                )
                == 1
            )
            assert not np.array_equal(found["before"][key], found["after"][key])


def test_all_ranks_report_the_same_losses_to_the_bit(cases):
    for name in cases[0]:
        assert cases[0][name]["losses"] == cases[1][name]["losses"]
        assert not cases[0][name]["training"]


def test_svrg_adds_no_device_bytes_unless_a_part_is_kept_on_the_device(cases):
    trainable = {name: p for name, p in Tiny().named_parameters() if p.requires_grad}
    for point, gradient in STORAGES:
        if f"svrg-{point}-{gradient}" not in cases[0]:
            continue
        for rank_index, rank in enumerate(cases):
            numels = [
                min(max(p.numel() - rank_index * -(-p.numel() // 2), 0), -(-p.numel() // 2))
                for p in trainable.values()
            ]
            size = 4 * sum(numels)
            device, offloaded = rank[f"svrg-{point}-{gradient}"]["bytes"]
            places = [point, gradient]
            assert device == size * places.count("device")
            in_files = places.count("nvme")
            exact = size * places.count("cpu")
            assert (
                exact + in_files * size
                <= offloaded
                <= exact + in_files * (size + 4096 * len(numels))
            )


# --- gradient accumulation ------------------------------------------------------------------------


def rank_of_accumulation() -> list[Any]:
    data = tiny_data()
    found = []
    for accumulation in (1, 3):
        config = configuration(12, accumulation=accumulation, **COMMON, method="mezo")
        engine = zods.initialize(model=Tiny(), config=config)[0]
        losses = train(engine, data, range(5))
        found.append((engine.global_steps, engine.micro_steps, losses, numpy_of(whole(engine))))
    return found


def test_accumulated_micro_batches_are_one_big_batch():
    one, three = run_ranks(2, rank_of_accumulation)[0]
    assert (one[0], three[0]) == (5, 5)
    assert three[1] == 15
    # The losses are means over other groups of examples. They differ by float32 rounding, and so do
    # the parameters.
    np.testing.assert_allclose(one[2], three[2], rtol=1e-5)
    for key, value in one[3].items():
        np.testing.assert_allclose(value, three[3][key], rtol=0, atol=1e-4)
        assert (
            key.startswith("frozen")
            or np.abs(value - dict(Tiny().named_parameters())[key].detach().numpy()).max() > 1e-2
        )


# --- schedules and monitor ------------------------------------------------------------------------


class Announced(nn.Module):
    """A model whose loss is given by the batch: the mean of `losses`, for any parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, losses: torch.Tensor) -> torch.Tensor:
        return losses.mean() + 0.0 * self.weight.sum()


def announced(*losses: float) -> list[dict[str, torch.Tensor]]:
    return [{"losses": torch.tensor(loss)} for loss in losses]


def rank_of_schedules(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    warmup = {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": "auto",
        "warmup_num_steps": 4,
        "warmup_type": "linear",
    }
    top = {
        "scheduler": {"type": "WarmupLR", "params": warmup},
        "csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "run"},
    }
    engine = zods.initialize(
        model=Tiny(), config=configuration(BATCH, method="mezo", lr=0.5, top=top)
    )[0]
    found["lrs"] = []
    found["moved"] = []
    for step in range(7):
        before = whole(engine)["embed.weight"]
        found["losses"] = found.get("losses", []) + train(engine, tiny_data(), [step])
        found["lrs"].append(engine.last_step.lr)
        found["moved"].append(not torch.equal(before, whole(engine)["embed.weight"]))

    # Three epochs of two steps. The losses of the second epoch are higher than those of the first;
    # the third epoch has the losses of the second.
    data = announced(*[1.0] * 16)
    anneal = {"alpha": 4.0, "threshold": 1.05}
    config = configuration(BATCH, method="mezo", lr=0.5, anneal=anneal)
    engine, _, loader, _ = zods.initialize(model=Announced(), config=config, training_data=data)
    found["annealed"] = []
    for factor in (1.0, 1.04, 1.2, 1.2):
        for batch in loader:
            loss = engine({"losses": batch["losses"] * factor})
            engine.backward(loss)
            engine.step()
            found["annealed"].append(engine.get_lr()[0])
    return found


def test_scheduler_annealing_and_monitor_follow_the_steps(tmp_path):
    first, second = run_ranks(2, rank_of_schedules, tmp_path)
    assert first == second
    # the expected values, by DeepSpeed's scheduler alone
    bare = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    scheduler = WarmupLR(
        bare, warmup_min_lr=0.0, warmup_max_lr=0.5, warmup_num_steps=4, warmup_type="linear"
    )
    expected = []
    for _ in first["lrs"]:
        expected.append(bare.param_groups[0]["lr"])
        scheduler.step()
    assert first["lrs"] == expected
    assert expected[-3:] == [0.375, 0.5, 0.5]
    assert first["moved"] == [lr > 0 for lr in expected], (
        "a step moves the parameters by the scheduler's step size"
    )
    # Only the third epoch's mean is above 1.05 times the mean of the epoch before it. Annealing
    # acts from the end of that epoch on.
    assert first["annealed"] == pytest.approx([0.5] * 5 + [0.125] * 3)
    rows = {f.stem: list(csv.reader(f.open())) for f in (tmp_path / "run").glob("*.csv")}
    losses = next(rows[stem] for stem in rows if stem.endswith("loss"))[1:]
    assert [float(value) for _, value in losses] == pytest.approx(first["losses"])
    assert [int(samples) for samples, _ in losses] == [BATCH * (k + 1) for k in range(7)]
    assert {stem.rsplit("_Samples_", 1)[1] for stem in rows} == {"loss", "lr", "projected_grad"}


# --- losses that are no numbers -------------------------------------------------------------------


def rank_of_nonfinite_losses() -> dict[str, Any]:
    found: dict[str, Any] = {}
    rank = torch.distributed.get_rank()
    config = configuration(2, method="mezo", lr=0.1, max_nonfinite_steps=2)
    engine = zods.initialize(model=Tiny(), config=config)[0]
    good = collate(tiny_data()[:1])

    def step(bad: bool) -> None:
        original = engine.module.frozen.bias
        if bad and rank == 1:  # a non-finite loss on one rank is enough
            hook = engine.module.register_forward_hook(
                lambda *io: {k: v + math.inf for k, v in io[-1].items()}
            )
        loss = engine(good)
        engine.backward(loss)
        try:
            engine.step()
        finally:
            if bad and rank == 1:
                hook.remove()
        assert original is engine.module.frozen.bias

    step(bad=False)
    before = whole(engine)
    step(bad=True)
    step(bad=True)
    found["same bits"] = sha256(before) == sha256(whole(engine))
    found["counted"] = (engine.skipped_steps, engine.global_steps, engine.last_step.skipped)
    step(bad=False)
    found["moved"] = sha256(before) != sha256(whole(engine))
    found["not counted"] = (engine.skipped_steps, engine.last_step.skipped)
    step(bad=True)
    step(bad=True)
    with pytest.raises(RuntimeError, match="3 steps in a row") as error:
        step(bad=True)
    found["error"] = str(error.value)
    return found


def test_a_step_with_a_non_finite_loss_on_one_rank_is_skipped_and_several_in_a_row_are_an_error():
    first, second = run_ranks(2, rank_of_nonfinite_losses)
    assert first["same bits"] and second["same bits"]  # noqa: PT018
    assert first["counted"] == second["counted"] == (2, 3, True)
    assert first["moved"]
    assert first["not counted"] == (2, False)
    assert first["error"] == second["error"]
    assert "max_nonfinite_steps" in first["error"]


# --- the engine's interface -----------------------------------------------------------------------


def rank_of_interface() -> dict[str, Any]:
    found: dict[str, Any] = {}
    data = tiny_data()
    config = configuration(BATCH, method="mezo", agreement_interval=3, **COMMON)
    engine, optimizer, loader, scheduler = zods.initialize(
        model=Tiny(), config=config, training_data=data
    )
    found["tuple"] = (len(loader), scheduler is None, optimizer.param_groups[0]["lr"])
    batch = collate(data[:4])

    # a loss that is not the forward's
    loss = engine(batch)
    for wrong in (loss * 2, loss.clone(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="not the loss"):
            engine.backward(wrong)
    engine.backward(loss)
    engine.step()
    found["requires_grad"] = loss.requires_grad
    with pytest.raises(RuntimeError, match=r"without engine\.backward"):
        engine.step()

    # In eval mode the model's own output is returned.
    at = whole(engine)
    alone = Tiny()
    alone.load_state_dict({**alone.state_dict(), **at}, strict=True)
    with torch.no_grad():
        expected = alone(**batch)
    engine.eval()
    outputs = engine(batch)
    engine.train()
    found["eval"] = torch.equal(outputs["logits"], expected["logits"])

    # eval_batch returns the mean over the batches of all ranks.
    halves = [collate(data[:4]), collate(data[4:8])]
    value = engine.eval_batch(iter([halves[engine.global_rank]]))
    with torch.no_grad():
        found["eval_batch"] = (value, alone(**collate(data[:8]))["loss"].item())
    found["unchanged"] = sha256(at) == sha256(whole(engine))

    # train_batch is equal to the three lines.
    twin, _, twin_loader, _ = zods.initialize(model=Tiny(), config=config, training_data=data)
    own = zods.initialize(model=Tiny(), config=config, training_data=data)[0]
    losses = []
    for _ in range(2):
        for raw in twin_loader:
            loss = twin(raw)
            twin.backward(loss)
            twin.step()
            losses.append(twin.last_step.loss)
    found["train_batch"] = (losses, [own.train_batch() for _ in losses])
    found["twins"] = sha256(whole(twin)) == sha256(whole(own))

    # One rank has applied another update.
    if engine.global_rank == 1:
        engine.trajectory.head = "something else"
    train(engine, data, [0])
    with pytest.raises(
        RuntimeError, match="rank 1: what was applied up to step 3 differs"
    ) as error:
        train(engine, data, [1])
    found["disagreement"] = str(error.value)
    return found


def test_the_engine_has_deepspeeds_interface_and_refuses_calls_without_effect():
    first, second = run_ranks(2, rank_of_interface)
    for found in (first, second):
        assert found["tuple"] == (3, True, COMMON["lr"])
        assert not found["requires_grad"]
        assert found["eval"], "eval mode gives the outputs at the unperturbed parameters"
        assert found["eval_batch"][0] == pytest.approx(found["eval_batch"][1], rel=1e-6)
        assert found["unchanged"], "evaluation leaves the parameters as they were"
        assert found["train_batch"][0] == found["train_batch"][1]
        assert found["twins"]
    assert first["disagreement"] == second["disagreement"]


# --- stored weights are never perturbed -----------------------------------------------------------


def stored(engine: Any) -> list[str]:
    """Digests of the bytes that this rank stores.

    They are taken of the storage with its padding, of the shards, and of the gathered parameters.
    """
    return [stored_digest(engine), sha256(local_shards(engine)), sha256(whole(engine))]


def rank_of_evaluations(folder: Path) -> list[tuple[str, int, list[str], list[str]]]:
    found = []
    data = tiny_data()
    for stage, offload, point, evaluation in (
        (3, "none", "cpu", "stacked"),
        (3, "cpu", "terms", "lockstep"),
        (0, "none", "device", "stacked"),
        (3, "none", "terms", "sequential"),
    ):
        section = {
            "method": "mezo_svrg",
            "lr": 0.0,
            "anchor_interval": 20,
            "eps": 1e-2,
            "evaluation": evaluation,
        }
        arguments = {
            "stage": stage,
            "offload": offload,
            "bf16": True,
            "anchor": {"point": point, "gradient": "cpu"},
        }
        engine = zods.initialize(
            model=Tiny(), config=configuration(BATCH, **arguments, **section), training_data=data
        )[0]
        before = stored(engine)
        train(engine, data, range(50))
        found.append(
            (
                f"stage {stage} {offload} {evaluation}",
                4 * engine.global_steps,
                before,
                stored(engine),
            )
        )
    return found


def test_two_hundred_evaluations_with_lr_0_leave_every_stored_bit_in_bfloat16(tmp_path):
    for rank in run_ranks(2, rank_of_evaluations, tmp_path):
        for name, evaluations, before, after in rank:
            assert evaluations >= 200
            assert before == after, name


# --- who is trained -------------------------------------------------------------------------------


def rank_of_chosen_parameters() -> dict[str, bool]:
    model = Tiny()
    config = configuration(BATCH, method="mezo", **COMMON)
    engine = zods.initialize(
        model=model, config=config, model_parameters=[model.hidden.weight, model.norm.bias]
    )[0]
    before = whole(engine)
    train(engine, tiny_data(), range(3))
    return {name: not torch.equal(before[name], value) for name, value in whole(engine).items()}


def test_only_the_given_model_parameters_are_trained():
    for moved in run_ranks(2, rank_of_chosen_parameters):
        assert {name for name, yes in moved.items() if yes} == {"hidden.weight", "norm.bias"}


def test_the_adapter_was_written_for_the_installed_deepspeed():
    assert deepspeed.__version__.startswith("0.19"), (
        "read zods/params/zero3_adapter.py against this version, then raise this line"
    )
