"""The weights of a run from its log, to the bit.

They are replayed by a dense reference and by `python -m zods.trajectory replay`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zods
from tests.distributed.models import (
    Tiny,
    Wide,
    configuration,
    opt_data,
    tiny_data,
    tiny_opt,
    whole,
    wide_data,
)
from tests.distributed.ranks import ENVIRONMENT, LIMIT, REPOSITORY, run_ranks
from tests.distributed.zoo import ZOO, zoo_batch
from tests.helpers import asked_for, sampled
from tests.reference.replay import replayed
from zods.cli.load_model import load_model, save_configuration
from zods.cli.options import ModelArguments
from zods.cli.pretrained import find_model
from zods.config.deepspeed_json import read_config
from zods.config.schema import parse_section
from zods.kernels import fingerprint
from zods.training.resume import INITIAL, LOG_NAME
from zods.trajectory.__main__ import main
from zods.trajectory.log import Log, LogFile, Trajectory, read_log
from zods.trajectory.records import Evaluation, Header, ParameterRecord, Refresh, RunRecord, Step
from zods.trajectory.replay import INDEX, replay

STEPS, EARLIER = 7, 4
SECTION = {"method": "mezo", "eps": 1e-2, "lr": 2e-2, "seed": 7}
SVRG = {
    **SECTION,
    "method": "mezo_svrg",
    "anchor_interval": 3,
    "anchor_lr": 3e-2,
    "weight_decay": 0.3,
}
WARMUP = {
    "type": "WarmupLR",
    "params": {"warmup_max_lr": 2e-2, "warmup_num_steps": 5, "warmup_type": "linear"},
}


def kept(point: str, gradient: str, **others: Any) -> dict[str, Any]:
    return {**SVRG, "anchor": {"point": point, "gradient": gradient}, **others}


LOW_RANK = {"distribution": "low_rank", "rank": 2}
# (ranks, model, arguments of `configuration`) by name
RUNS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "mezo": (2, "tiny", SECTION),
    "three directions, decay, micro-batches": (
        3,
        "tiny",
        {"num_directions": 3, "weight_decay": 0.3, "accumulation": 2},
    ),
    "rademacher, bf16, to nearest": (
        2,
        "tiny",
        {"direction": "rademacher", "bf16": True, "stochastic_rounding": False},
    ),
    "low rank, bf16, decay": (
        3,
        "tiny",
        {"direction": LOW_RANK, "bf16": True, "weight_decay": 0.3},
    ),
    "a direction per example": (
        4,
        "tiny",
        {"examples_per_direction": 1, "num_directions": 2, "bf16": True},
    ),
    "groups of examples, normalized": (
        2,
        "tiny",
        {"examples_per_direction": 3, "normalize": True, "direction": LOW_RANK},
    ),
    "warm-up from zero": (2, "tiny", {"top": {"scheduler": WARMUP}, "direction": LOW_RANK}),
    "normalized, decay": (2, "tiny", {"normalize": True, "weight_decay": 0.3}),
    "svrg, normalized": (3, "tiny", kept("cpu", "cpu", normalize=True, bf16=True)),
    "svrg, normalized, terms": (2, "tiny", kept("terms", "terms", normalize=True)),
    "svrg, no weight": (2, "tiny", kept("cpu", "cpu", anchor_weight=0)),
    "svrg, auto weight": (2, "tiny", kept("cpu", "cpu", anchor_weight="auto", num_directions=2)),
    "svrg, auto weight, terms": (
        2,
        "tiny",
        kept("terms", "terms", anchor_weight="auto", normalize=True, bf16=True),
    ),
    "replicated": (2, "tiny", {"stage": 0, "bf16": True}),
    "skipped": (2, "fragile", SECTION),
    "svrg, device": (1, "tiny", kept("device", "device", anchor_directions=3)),
    "svrg, cpu": (3, "tiny", kept("cpu", "cpu", bf16=True, anchor_directions=3)),
    "svrg, nvme": (2, "tiny", kept("nvme", "nvme", bf16=True)),
    "svrg, terms": (4, "tiny", kept("terms", "terms", bf16=True, num_directions=2)),
    "svrg, gradient as terms": (
        2,
        "tiny",
        kept("cpu", "terms", share_direction=False, num_directions=2),
    ),
    "svrg, point as terms": (
        2,
        "tiny",
        kept("terms", "nvme", share_direction=False, direction=LOW_RANK),
    ),
    "svrg, groups of examples": (
        4,
        "tiny",
        kept("cpu", "device", examples_per_direction=2, share_direction=False),
    ),
    "svrg, a direction per example, terms": (
        2,
        "tiny",
        kept("terms", "terms", examples_per_direction=1, anchor_weight="auto", bf16=True),
    ),
    "svrg, replicated, rademacher": (
        2,
        "tiny",
        kept("cpu", "cpu", stage=0, direction="rademacher", bf16=True),
    ),
    "svrg, skipped, to nearest": (
        2,
        "fragile",
        kept("cpu", "terms", bf16=True, stochastic_rounding=False),
    ),
    "offloaded to cpu": (
        2,
        "wide",
        kept("cpu", "cpu", offload="cpu", direction="rademacher", bf16=True),
    ),
    "offloaded to nvme": (2, "wide", {"offload": "nvme", "direction": "rademacher", "bf16": True}),
    "svrg, offloaded to nvme": (
        1,
        "wide",
        kept("nvme", "nvme", offload="nvme", direction="rademacher"),
    ),
    "svrg, low rank, offloaded to nvme": (
        2,
        "wide",
        kept("terms", "terms", offload="nvme", direction=LOW_RANK),
    ),
    "before it goes on": (2, "tiny", kept("cpu", "terms")),
    "goes on on three ranks": (
        3,
        "tiny",
        kept(
            "terms", "cpu", lr=1e-2, seed=8, weight_decay=0.1, num_directions=3, anchor_directions=2
        ),
    ),
    "opt": (2, "opt", kept("cpu", "cpu")),
    "opt, shards": (3, "opt in shards", {"direction": "rademacher"}),
    "opt, float32 files, bf16 run": (2, "opt", {"bf16": True}),
    "bert, new head": (2, "bert", kept("cpu", "terms", bf16=True)),
    "adapters": (2, "opt with adapters", kept("cpu", "cpu")),
    "adapters and a head, bf16": (1, "bert with adapters", {"bf16": True, "direction": LOW_RANK}),
}
CONTINUES = {"goes on on three ranks": "before it goes on"}
# those that other tests need, and one of each kind of direction, of storage and of offload
DEFAULT = (
    *("opt", "opt, shards", "bert, new head", "adapters", "warm-up from zero"),
    *("a direction per example", "svrg, skipped, to nearest", "svrg, auto weight, terms"),
    *("rademacher, bf16, to nearest", "groups of examples, normalized"),
    *("svrg, low rank, offloaded to nvme", "before it goes on", "goes on on three ranks"),
)


class Fragile(Tiny):
    """A model whose losses are not numbers while `broken` is set."""

    broken = False

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        factor = math.nan if self.broken else 1.0
        return {key: factor * value for key, value in super().forward(ids, labels).items()}


OWN: dict[str, Callable[[], nn.Module]] = {
    "tiny": Tiny,
    "fragile": Fragile,
    "wide": partial(Wide, num_layers=1, has_unused=False),
}


def write_bases(folder: Path) -> None:
    for kind, make in OWN.items():
        (folder / kind).mkdir(parents=True)
        save_file(dict(make().named_parameters()), folder / kind / "model.safetensors")
    tiny_opt().save_pretrained(folder / "opt")
    tiny_opt().save_pretrained(folder / "opt in shards", max_shard_size="8KB")
    torch.manual_seed(0)
    ZOO["bert"]().bert.save_pretrained(folder / "bert")


def loaded(kind: str, bases: Path, config: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """A model as the command line loads it.

    Also the names of the weights that its base lacks.
    """
    if kind in OWN:
        return OWN[kind](), []
    base, _, adapters = kind.partition(" with ")
    cls = (
        transformers.AutoModelForSequenceClassification
        if base == "bert"
        else transformers.AutoModelForCausalLM
    )
    task: Any = SimpleNamespace(
        name="classification" if base == "bert" else "prompted",
        auto_class=lambda: cls,
        model_kwargs=lambda: {"num_labels": 3} if base == "bert" else {},
    )
    rank = 2 if adapters else None
    arguments = ModelArguments(model=str(bases / base), output_dir="", lora_rank=rank)
    run = read_config(config, torch.distributed.get_world_size())
    return load_model(arguments, run, task, find_model(arguments))


def data_of(kind: str) -> list[dict[str, Tensor]]:
    if kind == "wide":
        return wide_data(24)
    if kind.startswith("bert"):
        batch = zoo_batch("bert", 24)
        return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    return opt_data() if kind.startswith("opt") else tiny_data()


def break_some(engine: Any) -> None:
    """Break the losses of step 2, and those of the refresh at step 3.

    The losses of the step after the refresh are whole.
    """
    engine.module.broken = engine.global_steps == 2
    refresh = type(engine).refresh_anchor

    def broken() -> None:
        engine.module.broken = engine.global_steps == 3
        refresh(engine)
        engine.module.broken = False

    engine.refresh_anchor = broken


def rank_of_runs(folder: Path, names: list[str]) -> None:
    for name in names:
        _, kind, arguments = RUNS[name]
        arguments = {**SECTION, **arguments}
        run = folder / name
        if torch.distributed.get_rank() == 0:
            run.mkdir()
            if name in CONTINUES:
                shutil.copy(folder / CONTINUES[name] / LOG_NAME, run)
        torch.distributed.barrier()
        config = configuration(12, nvme_path=run, **arguments)
        model, new = loaded(kind, folder / "bases", config)
        engine = zods.initialize(model=model, config=config, training_data=data_of(kind))[0]
        save(engine, run / "start.safetensors")
        engine.resume(run, new=new)
        if new and engine.global_rank == 0:
            save_configuration(model, run / INITIAL.parent)
        for step in range(engine.global_steps, engine.global_steps + STEPS):
            if kind == "fragile":
                break_some(engine)
            engine.train_batch()
            if step + 1 == EARLIER:
                save(engine, run / "earlier.safetensors")
                engine.save_pretrained(run / "exported earlier")
        save(engine, run / "end.safetensors")
        engine.save_pretrained(run / "exported end")


def save(engine: Any, path: Path) -> None:
    params = whole(engine)
    if engine.global_rank == 0:
        save_file({name: value.contiguous() for name, value in params.items()}, path)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs, each in a folder with its name, and of their base models."""
    folder = tmp_path_factory.mktemp("runs")
    write_bases(folder / "bases")
    asked = asked_for(request, "name", RUNS, DEFAULT)
    # A run that continues another run has more ranks than that run.
    for world_size in (1, 2, 3, 4):
        names = [name for name in asked if RUNS[name][0] == world_size]
        run_ranks(world_size, rank_of_runs, folder, names)
    return folder


def base_of(folder: Path, name: str) -> Path:
    return folder / "bases" / RUNS[name][1].partition(" with ")[0]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal in every bit."""
    return one.keys() == other.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and a.view(torch.uint8).equal(b.view(torch.uint8))
        for a, b in ((one[key].view(-1), other[key].view(-1)) for key in one)
    )


def by_reference(log: Log, base: dict[str, Tensor], until: int | None = None) -> dict[str, Tensor]:
    records = [record for record in log.records if until is None or record.step < until]
    trained = {parameter.name for parameter in log.header.parameters if parameter.trained}
    return replayed({p.name: base[p.name] for p in log.header.parameters}, trained, records)


def read(path: Path, kind: str) -> dict[str, Tensor]:
    """The parameters of a folder, read without any knowledge of the run."""
    if kind in OWN:
        tensors = load_file(path / "model.safetensors")
        return {name: tensors[name] for name, _ in OWN[kind]().named_parameters()}
    if "adapters" in kind:
        return load_file(path / "adapter_model.safetensors")
    cls = getattr(transformers, json.loads((path / "config.json").read_text())["architectures"][0])
    model, info = cls.from_pretrained(path, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    return model.state_dict()


@pytest.mark.parametrize("name", sampled(RUNS, DEFAULT))
def test_the_weights_of_a_run_are_those_of_a_dense_replay_of_its_log(folder, name):
    log, base = read_log(folder / name / LOG_NAME), load_file(folder / name / "start.safetensors")
    if name not in CONTINUES:
        assert same(
            by_reference(log, base, EARLIER), load_file(folder / name / "earlier.safetensors")
        )
    end = load_file(folder / name / "end.safetensors")
    assert same(by_reference(log, base), end)
    assert log.num_steps == STEPS * (2 if name in CONTINUES else 1)
    trained = [parameter.name for parameter in log.header.parameters if parameter.trained]
    assert all(not end[key].equal(base[key]) for key in trained if base[key].numel() > 1)


@pytest.mark.parametrize("name", sampled(RUNS, DEFAULT))
def test_the_command_line_writes_the_weights_of_a_run_at_any_step(folder, name, tmp_path):
    kind, run = RUNS[name][1], folder / name
    command = [
        "replay",
        "--base",
        str(base_of(folder, name)),
        "--log",
        str(run / LOG_NAME),
        "--out",
    ]
    for when, options in {"earlier": ["--until", str(EARLIER)], "end": []}.items():
        if name in CONTINUES and when == "earlier":
            continue
        assert main([*command, str(tmp_path / when), *options]) == 0
        assert same(read(tmp_path / when, kind), read(run / f"exported {when}", kind)), when
        if "adapters" in kind:
            written, exported = (
                adapter_config(tmp_path / when),
                adapter_config(run / f"exported {when}"),
            )
            assert written == exported
            cls = getattr(transformers, written["auto_mapping"]["base_model_class"])
            model = peft.PeftModel.from_pretrained(
                cls.from_pretrained(base_of(folder, name), num_labels=3), tmp_path / when
            )
            found = peft.get_peft_model_state_dict(model)
            written = read(tmp_path / when, kind)
            assert same(
                {key: found[key].to(value.dtype) for key, value in written.items()}, written
            )


def adapter_config(path: Path) -> dict[str, Any]:
    """The configuration of a saved adapter without its key `inference_mode`.

    PEFT sets the key in a saved adapter, so that the adapter is only trained further on request.
    """
    config = json.loads((path / "adapter_config.json").read_text())
    return {**config, "target_modules": sorted(config["target_modules"]), "inference_mode": None}


def test_the_runs_have_the_records_that_these_tests_need(folder):
    log = read_log(folder / "svrg, skipped, to nearest" / LOG_NAME)
    steps = {record.step: record for record in log.records if isinstance(record, Step)}
    refreshes = {
        record.step: record.coefficients for record in log.records if isinstance(record, Refresh)
    }
    assert [step for step, record in steps.items() if record.skipped] == [2]
    assert [step for step, coefficients in refreshes.items() if not coefficients] == [3]
    assert list(refreshes) == [0, 3, 6]
    assert read_log(folder / "warm-up from zero" / LOG_NAME).records[2].lr == 0.0
    assert (
        len(read_log(folder / "a direction per example" / LOG_NAME).records[-1].coefficients)
        == 12 * 2
    )
    assert (folder / "bases" / "opt in shards" / INDEX).is_file()
    names = {
        key.partition(".")[0] for key in load_file(folder / "bases" / "bert" / "model.safetensors")
    }
    assert names == {"embeddings", "encoder", "pooler"}, (
        "the base's keys must not have the prefix of the run's"
    )


# --- several processes ----------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return (
        {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        if folder.exists()
        else {}
    )


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", ["opt, shards", "bert, new head", "adapters"])
def test_several_processes_write_what_one_does(folder, name, world_size, tmp_path, monkeypatch):
    command = [
        "replay",
        "--base",
        str(base_of(folder, name)),
        "--log",
        str(folder / name / LOG_NAME),
    ]
    for rank in reversed(range(world_size)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
    exported, tensors = folder / name / "exported end", {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(path)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= world_size
    if RUNS[name][1].endswith("adapters"):
        assert same(tensors, read(exported, RUNS[name][1]))
    else:
        assert same(read(tmp_path / "out", RUNS[name][1]), read(exported, RUNS[name][1]))


def test_replays_at_the_same_time_do_not_disturb_each_other(folder, tmp_path):
    name = "opt, shards"
    files = (
        "--base",
        base_of(folder, name),
        "--log",
        folder / name / LOG_NAME,
        "--out",
        tmp_path / "out",
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "zods.trajectory", "replay", *files],
            cwd=REPOSITORY,
            env={**os.environ, **ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    assert [process.wait(LIMIT) for process in processes] == [0, 0]
    assert same(read(tmp_path / "out", "opt"), read(folder / name / "exported end", "opt"))


# --- mistakes -------------------------------------------------------------------------------------


def edited(base: Path, to: Path, change: Any) -> Path:
    """A copy of a base with a change in its only file of tensors."""
    shutil.copytree(base, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def cut(base: Path, to: Path, keep: float) -> Path:
    shutil.copytree(base, to)
    os.truncate(to / "model.safetensors", int((to / "model.safetensors").stat().st_size * keep))
    return to


def indexed(base: Path, to: Path, index: str) -> Path:
    shutil.copytree(base, to)
    (to / INDEX).write_text(index)
    return to


FC1 = "model.decoder.layers.1.fc1.weight"
WRONG_BASES: dict[str, tuple[Any, str]] = {
    "one element": (
        lambda b, t: edited(b, t, lambda x: x[FC1][3].mul_(1.01)),
        "other weights than the run started from",
    ),
    "a frozen place": (
        lambda b, t: edited(b, t, lambda x: x[FC1].view(-1)[5].neg_()),
        "fc1.weight",
    ),
    "shape": (
        lambda b, t: edited(b, t, lambda x: x.update({FC1: x[FC1].T.contiguous()})),
        "is of shape (20, 36)",
    ),
    "missing": (lambda b, t: edited(b, t, lambda x: x.pop(FC1)), "fc1.weight"),
    "truncated": (lambda b, t: cut(b, t, 0.6), "damaged"),
    "cut in its header": (lambda b, t: cut(b, t, 0.001), "damaged"),
    "emptied": (lambda b, t: cut(b, t, 0.0), "damaged"),
    "an index of nothing": (lambda b, t: indexed(b, t, "[]"), "damaged"),
    "an index of no file": (
        lambda b, t: indexed(b, t, '{"weight_map": {"x": "none.safetensors"}}'),
        "damaged",
    ),
    "no folder": (lambda b, t: t / "nowhere", "neither a folder nor a model"),
    "an empty folder": (lambda b, t: t.mkdir() or t, "not in its safetensors files"),
}


@pytest.mark.parametrize("what", WRONG_BASES)
def test_a_wrong_base_is_one_error_and_leaves_no_weights(folder, what, tmp_path, capsys):
    damage, said = WRONG_BASES[what]
    base = damage(folder / "bases" / "opt", tmp_path / "base")
    before = files_of(base)
    code = main(
        [
            "replay",
            "--base",
            str(base),
            "--log",
            str(folder / "opt" / LOG_NAME),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2
    assert len(error) == 1
    assert said in error[0]
    assert files_of(base) == before
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    "holds", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
)
def test_a_folder_with_a_model_is_not_written_into(
    folder, world_size, holds, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    (out / holds).write_bytes(b"precious")
    (out / "config.json").write_text("{}")
    before = files_of(out)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        base, log = folder / "bases" / "opt", folder / "opt" / LOG_NAME
        assert main(["replay", "--base", str(base), "--log", str(log), "--out", str(out)]) == 2
        assert f"holds {holds} already" in capsys.readouterr().err
    assert files_of(out) == before


def test_more_steps_than_there_are_are_refused(folder, tmp_path, capsys):
    for until in ("8", "-1"):
        command = [
            "replay",
            "--base",
            str(base_of(folder, "opt")),
            "--log",
            str(folder / "opt" / LOG_NAME),
        ]
        assert main([*command, "--out", str(tmp_path / "out"), "--until", until]) == 2
        assert f"holds 7 steps, asked for {until}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- files that are not safetensors ---------------------------------------------------------------


class Harmful:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def as_pickle(base: Path, to: Path, **others: Any) -> Path:
    shutil.copytree(base, to)
    torch.save({**load_file(to / "model.safetensors"), **others}, to / "pytorch_model.bin")
    (to / "model.safetensors").unlink()
    return to


def test_a_base_of_a_pytorch_file_is_replayed_in_memory(folder, tmp_path):
    for name in ("opt", "bert, new head"):
        base = as_pickle(base_of(folder, name), tmp_path / f"{name} base")
        replay(base, folder / name / LOG_NAME, tmp_path / name)
        assert same(read(tmp_path / name, "opt"), read(folder / name / "exported end", "opt"))


def test_code_in_a_pytorch_file_is_not_run(folder, tmp_path, capsys):
    mark = tmp_path / "mark"
    for name, change in (("code", {"x": Harmful(mark)}), ("torn", None), ("text", None)):
        base = as_pickle(base_of(folder, "opt"), tmp_path / name, **(change or {}))
        if name == "torn":
            os.truncate(base / "pytorch_model.bin", 1000)
        if name == "text":
            (base / "pytorch_model.bin").write_text("version https://git-lfs")
        log = folder / "opt" / LOG_NAME
        assert (
            main(["replay", "--base", str(base), "--log", str(log), "--out", str(tmp_path / "out")])
            == 2
        )
        assert "zods.trajectory: error: " in capsys.readouterr().err, name
        assert not mark.exists()
        assert not list((tmp_path / "out").glob("*.safetensors"))


# --- damage to the log ----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, list[bytes], list[dict[str, Tensor]]]:
    """A base of two tensors, the lines of a log of it, and its weights after each line."""
    torch.manual_seed(2)
    base = {"matrix": torch.randn(3, 2), "bias": torch.randn(3)}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    entries = [
        ParameterRecord(n, tuple(v.shape), "float32", True, fingerprint(v.view(-1)))
        for n, v in base.items()
    ]
    section = parse_section({**SVRG, "anchor": {"point": "terms", "gradient": "terms"}})
    records = [
        *(
            RunRecord(0, section, 8, 2),
            Evaluation(0, "stacked", 4),
            Refresh(0, 1e-2, (0.5,)),
            Step(0, 0.3, 1e-2, (-1.5,)),
        ),
        *(Step(1, None, 1e-2, ()), Step(2, 0.2, 1e-2, (2.5,), (0, 2)), Refresh(3, 1e-2, (0.25,))),
        Step(3, 0.1, 1e-2, (1.25,), (1, 0)),
    ]
    trajectory = Trajectory()
    trajectory.file = LogFile(tmp_path / "log")
    for record in [Header("Small", tuple(entries)), *records]:
        trajectory.add(record)
    trajectory.wait()
    trajectory.file.close()
    states = [replayed(base, set(base), records[:k]) for k in range(len(records) + 1)]
    return tmp_path / "base", (tmp_path / "log").read_bytes().splitlines(keepends=True), states


def outcome(base: Path, data: bytes, capsys: Any) -> tuple[int | None, dict[str, Tensor], str]:
    """Replay a log of these bytes: (steps that the command reports, weights it wrote, error)."""
    log, out = base.parent / "changed", base.parent / "out"
    log.write_bytes(data)
    shutil.rmtree(out, ignore_errors=True)
    code = main(["replay", "--base", str(base), "--log", str(log), "--out", str(out)])
    said = capsys.readouterr()
    if code == 0:
        return int(said.out.split(" steps in ")[0]), load_file(out / "model.safetensors"), ""
    assert code == 2
    assert not out.exists() or not list(out.iterdir())
    return None, {}, said.err


def test_a_log_cut_anywhere_gives_the_weights_after_its_whole_records(small, capsys):
    base, lines, states = small
    data, ends = b"".join(lines), [sum(map(len, lines[: k + 1])) for k in range(len(lines))]
    steps = [0, 0, 0, 0, 1, 2, 3, 3, 4]  # the number of steps after 0, 1, 2, ... records
    for length in range(len(data) + 1):
        made, weights, error = outcome(base, data[:length], capsys)
        whole_lines = sum(end <= length for end in ends)
        if whole_lines == 0:
            assert "error: " in error
            assert ("empty" if length == 0 else "line 1 ") in error
            continue
        assert made == steps[whole_lines - 1], length
        assert same(weights, states[whole_lines - 1]), length


def test_the_weights_at_a_step_do_not_depend_on_what_the_log_holds_after_it(
    small, tmp_path, capsys
):
    base, lines, states = small
    for count in (7, 8, 9):  # up to step 3, then with a refresh of the anchor, then with step 4
        (tmp_path / "cut").write_bytes(b"".join(lines[:count]))
        command = ["replay", "--base", str(base), "--log", str(tmp_path / "cut"), "--until", "3"]
        assert main([*command, "--out", str(tmp_path / str(count))]) == 0
        assert same(load_file(tmp_path / str(count) / "model.safetensors"), states[6])


@pytest.mark.parametrize("mask", sampled([1, 0x80, 0xFF], [1]))
def test_a_log_with_any_byte_changed_is_an_error_or_ends_before_its_last_record(
    small, mask, capsys
):
    base, lines, states = small
    data = b"".join(lines)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= mask
        made, weights, error = outcome(base, bytes(damaged), capsys)
        if position < len(data) - len(lines[-1]):
            assert f"line {data[:position].count(10) + 1} " in error, position
        elif position == len(data) - 1:
            assert "line 9 " in error, "the last record is whole, and something follows it"
        else:
            assert made == 3, position
            assert same(weights, states[-2]), position
