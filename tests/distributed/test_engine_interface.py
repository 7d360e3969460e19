"""Loops written for DeepSpeed's engine and for Hugging Face models run on the engine unchanged."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import zods
from tests.distributed.models import (
    Tiny,
    collate,
    configuration,
    global_batch,
    local_shards,
    numpy_of,
    sha256,
    tiny_data,
    tiny_opt,
    train,
    whole,
)
from tests.distributed.ranks import run_ranks
from tests.helpers import LogTexts
from tests.reference.dense import DenseReference, loss_of_module, named_parameters_of

BATCH = 8
SECTION = {"method": "mezo", "eps": 1e-2, "lr": 1e-2, "seed": 7}
SVRG = {
    **SECTION,
    "method": "mezo_svrg",
    "anchor_interval": 2,
    "anchor_directions": 2,
    "anchor_split": False,
}
RANKS = [(1, 0), (2, 0), (2, 3)]


def build(model: nn.Module, data: Any = None, **arguments: Any) -> Any:
    return zods.initialize(
        model=model, config=configuration(BATCH, **{**SECTION, **arguments}), training_data=data
    )[0]


def error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def mine(engine: Any, step: int) -> dict[str, Tensor]:
    """This rank's part of a step's global batch."""
    size = engine.train_micro_batch_size_per_gpu()
    rows = global_batch(tiny_data(), step, BATCH)[engine.global_rank * size :][:size]
    return collate(rows)


# --- a loop as those of Hugging Face and DeepSpeed ------------------------------------------------


def rank_of_loop(stage: int) -> dict[str, Any]:
    engine = build(Tiny(), stage=stage)
    losses = []
    engine.train()
    engine.to(engine.device).float()
    for step in range(3):
        batch = {key: value.to(engine.device) for key, value in mine(engine, step).items()}
        with engine.no_sync():
            outputs = engine(**batch)
        loss = outputs.loss.mean()
        engine.backward(outputs if step == 1 else loss)
        engine.zero_grad()
        engine.step()
        losses.append(loss.item())
    found: dict[str, Any] = {"losses": losses, "weights": sha256(whole(engine))}
    again = build(Tiny(), stage=stage)
    train(again, tiny_data(), range(3))
    found["expected"] = sha256(whole(again))
    found["state"] = {name: value.numpy() for name, value in engine.state_dict().items()}
    values = engine.module.state_dict(keep_vars=True)
    with deepspeed.zero.GatheredParameters(list(engine.parameters()), enabled=stage == 3):
        found["expected state"] = {
            name: value.detach().clone().numpy() for name, value in values.items()
        }
    found["names"] = [name for name, _ in engine.named_parameters()] == [
        n for n, _ in Tiny().named_parameters()
    ]
    found["interface"] = (
        engine.train_batch_size(),
        engine.zero_optimization_stage(),
        engine.global_steps,
        engine.get_global_grad_norm(),
        engine.optimizer.param_groups[0]["lr"],
        engine.was_step_applied(),
        engine.hidden is engine.module.hidden,
        engine.monitor.enabled,
        engine.lr_scheduler,
    )
    found["errors"] = [
        error_of(call)
        for call in (
            lambda: engine(**batch).loss.backward(),
            lambda: engine(**batch).logits,
            lambda: engine.backward(2 * engine(**batch).loss),
            lambda: engine.half(),
            lambda: engine.to("meta"),
            lambda: engine.load_state_dict({}),
            lambda: engine.no_such_thing,
            lambda: engine(**batch, text=["a"]),
        )
    ]
    return found


@pytest.mark.parametrize(("ranks", "stage"), RANKS)
def test_a_loop_on_outputs_trains_as_the_three_lines_do(ranks: int, stage: int):
    for rank, found in enumerate(run_ranks(ranks, rank_of_loop, stage)):
        assert found["weights"] == found["expected"]
        assert all(isinstance(loss, float) for loss in found["losses"])
        assert found["names"]
        assert found["interface"] == (BATCH, stage, 3, None, SECTION["lr"], True, True, False, None)
        expected = found["expected state"] if rank == 0 else {}
        assert list(found["state"]) == list(expected)
        assert all((found["state"][name] == expected[name]).all() for name in expected)
        for text, said in zip(
            found["errors"],
            (
                "RuntimeError: loss.backward(): the loss has no graph",
                "AttributeError: outputs.logits: in training mode",
                "ValueError: engine.backward(loss): this is not the loss",
                "ValueError: engine.to(torch.float16): found parameters of torch.float32",
                "ValueError: engine.to(meta): the engine is on cpu",
                "ValueError: engine.load_state_dict()",
                "AttributeError: ZerothOrderEngine has no attribute 'no_such_thing', nor has its "
                "module",
                "ValueError: the batch: Tiny.forward takes no text; it takes ids, labels.",
            ),
            strict=True,
        ):
            assert text.startswith(said)


# --- forwards that no backward follows ------------------------------------------------------------


def rank_of_probes(stage: int) -> dict[str, Any]:
    found = {}
    for name, section in (("mezo", {"accumulation": 2}), ("svrg", SVRG)):
        for probes in (False, True):
            data = tiny_data()
            engine = build(Tiny(), data, stage=stage, **section)
            reports, errors, failed = [], [], []
            other = collate(data[16:19])
            batches = engine.training_dataloader.forever()
            for _ in range(3):
                for _ in range(engine.gradient_accumulation_steps()):
                    if probes:
                        with torch.no_grad():
                            engine(other)
                        errors.append(error_of(engine.step))
                    batch = next(batches)
                    first = engine(batch)
                    loss = engine(batch) if probes else first
                    if probes:
                        errors.append(error_of(partial(engine.backward, first)))
                        failed.append(error_of(partial(engine, ids=batch["ids"])))
                    engine.backward(loss)
                    errors.append(error_of(partial(engine.backward, loss)))
                    if probes:
                        engine(other)
                    engine.step()
                reports.append(
                    (engine.last_step.loss, engine.last_step.projected_grad, engine.global_samples)
                )
            place, weights = engine.training_dataloader.epoch_and_step, sha256(whole(engine))
            found[name, probes] = (reports, place, weights, engine.anchor_step, engine.micro_steps)
            assert "nothing" not in failed
            found[name, probes, "errors"] = sorted({text.split("(")[0] for text in errors})
    return found


@pytest.mark.parametrize(("ranks", "stage"), RANKS)
def test_a_forward_without_a_backward_is_not_part_of_a_step(ranks: int, stage: int):
    for found in run_ranks(ranks, rank_of_probes, stage):
        for name in ("mezo", "svrg"):
            assert found[name, True] == found[name, False]
            assert found[name, False, "errors"] == ["ValueError: engine.backward"]
            assert found[name, True, "errors"] == [
                "RuntimeError: engine.step",
                "ValueError: engine.backward",
            ]


def rank_of_two_forwards(stage: int) -> dict[str, Any]:
    """Steps with two forwards before each backward, and plain steps on the second batches."""
    engine, plain = (build(Tiny(), stage=stage, agreement_interval=1) for _ in range(2))
    errors = []
    for step in range(3):
        first, second = engine(**mine(engine, step)), engine(**mine(engine, step + 1))
        errors += [
            error_of(partial(engine.backward, loss))
            for loss in (first, first + second, second, second)
        ]
        engine.step()
    train(plain, tiny_data(), range(1, 4))
    return {"errors": errors, "weights": sha256(whole(engine)), "expected": sha256(whole(plain))}


@pytest.mark.parametrize(("ranks", "stage"), RANKS)
def test_of_two_forwards_before_one_backward_only_the_second_can_become_the_step(
    ranks: int, stage: int
):
    refused = (
        "ValueError: engine.backward(loss): this is not the loss that the last engine(batch) "
        "returned"
    )
    for found in run_ranks(ranks, rank_of_two_forwards, stage):
        assert [text.partition(", or")[0] for text in found["errors"]] == [
            refused,
            refused,
            "nothing",
            refused,
        ] * 3
        assert found["weights"] == found["expected"]


# --- two engines on one model ---------------------------------------------------------------------


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def rank_of_successors(stage: int) -> dict[int, tuple[str, str, float]]:
    """Compare a second engine on a first one's model with an engine on an equal model.

    Returns the results of three steps, by the number of steps that the second engine made before
    the first one was closed.
    """
    found = {}
    for closed_before in (0, 1, 3):
        model, own = Tiny(), Tiny()
        hooks = num_hooks(model)
        first = build(model, stage=stage)
        train(first, tiny_data(), range(2))
        for value, param in zip(whole(first).values(), own.parameters(), strict=True):
            param.data.copy_(value)
        if closed_before == 0:
            first.close()
            assert num_hooks(model) == hooks, "close() leaves hooks on the model"
        second, alone = (build(each, stage=stage, seed=8) for each in (model, own))
        for step in range(3):
            if step == closed_before > 0:
                first.close()
            train(second, tiny_data(), [step])
            train(alone, tiny_data(), [step])
        found[closed_before] = (
            sha256(whole(second)),
            sha256(whole(alone)),
            second.last_step.projected_grad,
        )
        if closed_before == 3:
            first.close()
    return found


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3)])
def test_a_second_engine_on_a_model_makes_its_own_steps_whether_the_first_is_open_or_closed(
    ranks: int, stage: int
):
    for found in run_ranks(ranks, rank_of_successors, stage):
        for second, alone, projected_grad in found.values():
            assert second == alone
            assert abs(projected_grad) > 0.1, "the parameters must have been perturbed"


def rank_of_hooks() -> tuple[str, str]:
    model = Tiny()
    model.hidden.register_forward_pre_hook(lambda module, inputs: None)
    first = build(model)
    train(first, tiny_data(), range(1))
    refused = error_of(lambda: build(model))
    first.close()
    return refused, error_of(lambda: build(model))


def test_a_second_engine_on_a_model_with_hooks_is_refused_while_the_first_is_open():
    assert run_ranks(1, rank_of_hooks) == [
        (
            "ValueError: model: another zods engine runs the hooks of its modules. Call close() "
            "of that engine first.",
            "nothing",
        )
    ]


# --- all of a batch -------------------------------------------------------------------------------


class Masked(nn.Module):
    """A language model that is called by position, and by keyword for rare arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_opt()

    def forward(
        self, ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Any:
        return self.inner(input_ids=ids, labels=labels, attention_mask=attention_mask)


def rank_of_mixed_arguments(stage: int) -> dict[str, Any]:
    rows = BATCH // torch.distributed.get_world_size()
    ids = torch.randint(3, 37, (BATCH, 9), generator=torch.Generator().manual_seed(3))
    ids = ids[torch.distributed.get_rank() * rows :][:rows]
    mask = torch.ones_like(ids)
    mask[::2, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    calls = {
        "mixed": ((ids, labels), {"attention_mask": mask}),
        "positions": ((ids, labels, mask), {}),
        "dict": (({"attention_mask": mask, "labels": labels, "ids": ids},), {}),
    }
    found = {}
    for name, (args, kwargs) in calls.items():
        engine = build(Masked(), stage=stage)
        engine.backward(engine(*args, **kwargs))
        engine.step()
        engine.eval()
        same = torch.equal(engine(*args, **kwargs).logits, engine.module(ids, labels, mask).logits)
        found[name] = (
            engine.last_step.loss,
            engine.last_step.projected_grad,
            engine.evaluation,
            same,
        )
    return found


@pytest.mark.parametrize(("ranks", "stage"), RANKS)
def test_positions_and_keywords_together_reach_the_model_in_training_and_evaluation(
    ranks: int, stage: int
):
    for found in run_ranks(ranks, rank_of_mixed_arguments, stage):
        assert found["mixed"] == found["positions"] == found["dict"]
        assert found["mixed"][2:] == ("stacked", True)


# --- parameters of odd shapes and layouts, and compiled models ------------------------------------


class Odd(nn.Module):
    """A model with parameters that have no dimensions, are transposed or are expanded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.layer = nn.Linear(5, 6)
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.wide = nn.Parameter(torch.randn(1, 4).expand(3, 4))
        self.frozen = nn.Parameter(torch.tensor(0.7), requires_grad=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.scale * torch.tanh(self.layer(x)) @ self.turned + self.frozen * self.wide.sum(
            0
        )
        return functional.cross_entropy(logits, labels)


def odd_data() -> list[dict[str, Tensor]]:
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(2))
    return [{"x": row, "labels": row.argmax() % 4} for row in x]


def rank_of_odd_parameters(folder: Path, stage: int) -> dict[str, Any]:
    data = odd_data()
    engine = build(Odd(), stage=stage)
    train(engine, data, range(3))
    engine.save_checkpoint(folder, 3)
    engine.save_pretrained(folder / "export")
    twin = build(Odd(), stage=stage)
    twin.load_checkpoint(folder, 3)
    weights = whole(engine)
    return {
        "weights": numpy_of(weights),
        "loaded": sha256(local_shards(twin)) == sha256(local_shards(engine)),
        "shapes": {name: tuple(value.shape) for name, value in weights.items()},
    }


@pytest.mark.parametrize(("ranks", "stage"), [*RANKS, (1, 3)])
def test_scalars_and_parameters_that_are_not_contiguous_train_save_and_export(
    tmp_path: Path, ranks: int, stage: int
):
    from safetensors.torch import load_file

    model = Odd().double()
    loss = loss_of_module(model, lambda outputs, _: outputs)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    dense = DenseReference(named_parameters_of(model), loss, trainable=trainable, **SECTION)
    for step in range(3):
        batch = collate(global_batch(odd_data(), step, BATCH))
        dense.step({"x": batch["x"].double(), "labels": batch["labels"]})
    for found in run_ranks(ranks, rank_of_odd_parameters, tmp_path, stage):
        assert found["loaded"]
        assert found["shapes"] == {name: tuple(value.shape) for name, value in dense.params.items()}
        for name, value in dense.params.items():
            assert found["weights"][name] == pytest.approx(value.numpy(), rel=1e-4, abs=1e-5)
    exported = load_file(tmp_path / "export" / "model.safetensors")
    Odd().load_state_dict(exported, assign=True)
    assert exported["scale"].item() == pytest.approx(dense.params["scale"].item(), rel=1e-4)


def rank_of_compiled() -> dict[str, Any]:
    found = {}
    ways = {"none": lambda m: m, "around": torch.compile, "in place": lambda m: (m.compile(), m)[1]}
    for name, way in ways.items():
        engine = build(way(Tiny()))
        train(engine, tiny_data(), range(2))
        found[name] = (
            type(engine.module).__name__,
            [shard.name for shard in engine.sharded_parameters],
            sha256(whole(engine)),
        )
    return found


def test_a_compiled_model_trains_as_the_plain_one():
    (found,) = run_ranks(1, rank_of_compiled)
    assert found["around"] == found["in place"] == found["none"]
    assert found["none"][0] == "Tiny"


# --- checkpoints ----------------------------------------------------------------------------------


def trained(engine: Any) -> str:
    """The values of Tiny's trained parameters. A checkpoint has no frozen ones."""
    weights = whole(engine)
    return sha256(
        {name: value for name, value in weights.items() if "frozen" not in name and name != "extra"}
    )


def rank_of_checkpoints(folder: Path, stage: int) -> dict[str, Any]:
    said = LogTexts("zods.training.checkpoint").texts
    top = {
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.1, "warmup_num_steps": 9},
        }
    }
    section = {**SVRG, "lr": 0.1, "stage": stage, "top": top}
    engine = build(Tiny(), tiny_data(), **section)
    found: dict[str, Any] = {
        "nothing": engine.load_checkpoint(folder / "empty"),
        "warned": list(said),
    }
    train(engine, tiny_data(), range(1))
    tags = [engine.save_checkpoint(folder, tag).name for tag in (0, 7, 2.5, "best", None)]
    found["tags"] = tags
    found["at 7"] = engine.load_checkpoint(folder, 7)[0].name
    train(engine, tiny_data(), range(1, 3))
    engine.save_checkpoint(folder, "aside", {"note": 5}, False, True)
    found["latest"] = (folder / "latest").read_text()
    expected = trained(engine)

    def loaded(**keywords: Any) -> tuple[Any, ...]:
        twin = build(Tiny(1), tiny_data(), **section)
        client = twin.load_checkpoint(folder, "aside", **keywords)[1]
        lr = twin.lr_scheduler.last_batch_iteration
        state = (trained(twin) == expected, client, twin.global_steps, twin.anchor_step, lr)
        train(twin, tiny_data(), range(1))
        return (*state, twin.anchor_step, twin.last_step.skipped)

    found["all"] = loaded()
    found["module"] = loaded(load_module_only=True)
    found["no optimizer"] = loaded(load_optimizer_states=False)
    found["no scheduler"] = loaded(load_lr_scheduler_states=False)
    bigger = Tiny(1)
    bigger.extra = nn.Parameter(torch.ones(4))
    other = build(bigger, tiny_data(), **section)
    found["errors"] = [
        error_of(call)
        for call in (
            lambda: other.load_checkpoint(folder, "aside", load_module_only=True),
            lambda: other.load_checkpoint(folder, "aside", load_module_strict=False),
            lambda: other.load_checkpoint(folder, "aside", custom_load_fn=print),
            lambda: other.load_checkpoint(folder, "no such"),
            lambda: engine.save_checkpoint(folder, "a/b"),
            lambda: engine.save_checkpoint(folder, "latest"),
            lambda: engine.save_checkpoint(folder, ""),
        )
    ]
    other.load_checkpoint(folder, "aside", load_module_only=True, load_module_strict=False)
    found["not strict"] = trained(other) == expected
    found["said"] = [text for text in said if "not in both" in text]
    other.resume(folder / "run")
    found["logged"] = error_of(lambda: other.load_checkpoint(folder, "aside"))
    other.close()
    return found


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3)])
def test_checkpoints_take_the_tags_and_keywords_of_deepspeed(
    tmp_path: Path, ranks: int, stage: int
):
    for rank, found in enumerate(run_ranks(ranks, rank_of_checkpoints, tmp_path, stage)):
        assert found["nothing"] == (None, None)
        assert ["no file `latest`; nothing is loaded" in text for text in found["warned"]] == [
            True
        ] * (rank == 0)
        assert found["tags"] == ["0", "7", "2.5", "best", "global_step1"]
        assert found["at 7"] == "7"
        assert found["latest"] == "global_step1"
        note = {"note": 5}
        assert found["all"] == (True, note, 3, 2, 2, 2, False)
        assert found["module"] == (True, note, 0, None, -1, 0, False)
        assert found["no optimizer"] == (True, note, 3, None, 2, 3, False)
        assert found["no scheduler"] == (True, note, 3, 2, -1, 2, False)
        for text, said in zip(
            found["errors"],
            (
                "it is of another model",
                "load_module_strict=False: a run goes on with all",
                "custom_load_fn: must be None",
                "no state.json",
                "the tag 'a/b' cannot be",
                "the tag 'latest' cannot be",
                "the tag '' cannot be",
            ),
            strict=True,
        ):
            assert said in text
        assert found["not strict"]
        assert ["not loaded, as not in both: extra" in text for text in found["said"]] == [True] * (
            rank == 0
        )
        assert "this run writes a log" in found["logged"]


# --- parameter groups -----------------------------------------------------------------------------


def rank_of_groups(stage: int) -> tuple[set[str], str]:
    model = Tiny()
    groups = [
        {"params": [model.hidden.weight], "weight_decay": 0.0},
        ("norm.bias", model.norm.bias),
    ]
    config = configuration(BATCH, stage=stage, **SECTION)
    engine = zods.initialize(model=model, config=config, model_parameters=groups)[0]
    before = whole(engine)
    train(engine, tiny_data(), range(2))
    moved = {name for name, value in whole(engine).items() if not torch.equal(before[name], value)}
    other = [{"params": list(Tiny().parameters())}]
    return moved, error_of(
        lambda: zods.initialize(model=Tiny(), config=config, model_parameters=other)
    )


def test_parameters_in_groups_are_those_that_are_trained():
    for moved, error in run_ranks(2, rank_of_groups, 3):
        assert moved == {"hidden.weight", "norm.bias"}
        assert "is not a parameter of the model" in error
