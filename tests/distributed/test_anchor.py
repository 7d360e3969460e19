"""The anchor of MeZO-SVRG on two ranks: where it is stored, and its refresh.

The anchor point is a copy of the parameters and not the live weights, in every storage.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zods
from tests.distributed.models import (
    VOCABULARY,
    Tiny,
    anchor_point,
    collate,
    configuration,
    local_shards,
    numpy_of,
    sha256,
    tiny_data,
    train,
    whole,
)
from tests.distributed.ranks import run_ranks
from tests.helpers import LogTexts, flip
from tests.reference.dense import DenseReference, loss_of_module, named_parameters_of
from zods.core.directions import Direction
from zods.core.estimators import Term, Update
from zods.kernels import combine_
from zods.params.zero3_adapter import release_gathered

STORAGES = ("device", "cpu", "nvme", "terms")
SVRG = {"method": "mezo_svrg", "eps": 1e-2, "lr": 1e-2, "anchor_lr": 5e-2, "anchor_interval": 1000}


def build(
    folder: Path, batch: int = 8, data: Any = None, model: Any = None, **arguments: Any
) -> Any:
    config = configuration(batch, nvme_path=folder, **{**SVRG, **arguments})
    return zods.initialize(model=model or Tiny(), config=config, training_data=data or tiny_data())[
        0
    ]


def shard_of(store: Any, shard: Any) -> torch.Tensor:
    """A copy of all elements that `store` keeps of `shard`."""
    return torch.cat(
        [torch.empty(0, dtype=shard.dtype), *(values.clone() for _, values in store.read(shard))]
    )


# --- a copy ---------------------------------------------------------------------------------------


def rank_of_copies(folder: Path) -> dict[Any, dict[str, Any]]:
    found = {}
    for stage, place, bf16 in [
        *((3, p, b) for p in STORAGES for b in (False, True)),
        (0, "cpu", False),
        (0, "device", False),
    ]:
        nvme = folder / f"{stage}-{place}-{bf16}"
        nvme.mkdir(parents=True, exist_ok=True)
        engine = build(
            nvme,
            stage=stage,
            bf16=bf16,
            weight_decay=0.1,
            anchor={"point": place, "gradient": place},
        )
        names = [shard.name for shard in engine.sharded_parameters]
        at_refresh = whole(engine)
        train(engine, tiny_data(), range(3))
        live = whole(engine)
        point = anchor_point(engine)
        result: dict[str, Any] = {
            "at refresh": numpy_of({n: at_refresh[n] for n in names}),
            "point": numpy_of(point),
            "live": numpy_of({n: live[n] for n in names}),
        }
        if place != "terms":
            kept = {p.name: shard_of(engine.anchor.gradient, p) for p in engine.sharded_parameters}
            made = {
                p.name: combine_(
                    torch.empty(p.numel, dtype=p.dtype),
                    seeds=[t.seed for t in engine.anchor.gradient_terms],
                    coefficients=[t.coefficient for t in engine.anchor.gradient_terms],
                    parameter=p.ordinal,
                    offset=p.offset,
                )
                for p in engine.sharded_parameters
            }
            result["gradient"] = sha256(kept) == sha256(made)
            # Change the live weights. The anchor must stay.
            release_gathered(engine.deepspeed)
            engine.sharded_parameters.apply_(
                Update((Term(5, 1.0),), decay=0.0), direction=Direction()
            )
            changed = sha256(whole(engine))
            result["stays"] = [
                sha256(anchor_point(engine)) == sha256(point),
                sha256(
                    {p.name: shard_of(engine.anchor.gradient, p) for p in engine.sharded_parameters}
                )
                == sha256(kept),
                changed != sha256(live),
            ]
            # Change the anchor. The live weights must stay.
            release_gathered(engine.deepspeed)
            shards = sha256(local_shards(engine))
            for shard in engine.sharded_parameters:
                zeros = torch.zeros(shard.numel, dtype=shard.dtype)
                engine.anchor.point.write(shard, zeros)
                engine.anchor.gradient.write(shard, zeros)
            result["gone"] = all(not t.any() for t in anchor_point(engine).values())
            release_gathered(engine.deepspeed)
            result["live stays"] = shards == sha256(local_shards(engine)) and changed == sha256(
                whole(engine)
            )
        found[stage, place, bf16] = result
    return found


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Any]]]:
    return run_ranks(2, rank_of_copies, tmp_path_factory.mktemp("copies"))


def test_the_anchor_point_is_the_parameters_at_the_refresh_and_not_the_live_ones(copies):
    for rank in copies:
        for (stage, place, bf16), found in rank.items():
            for name, expected in found["at refresh"].items():
                where = f"stage {stage}, {place}, bf16 {bf16}: {name}"
                if place != "terms":
                    assert np.array_equal(found["point"][name], expected), where
                    continue
                # The anchor point is computed from the parameters by taking the updates back. It is
                # exact up to the rounding of the 4 updates since the refresh, each at most one unit
                # in the last place of numbers below 4 (stochastic rounding in bfloat16), and up to
                # the rounding of taking them back.
                unit = 2.0 ** (1 - 7 if bf16 else 1 - 23)
                assert np.abs(found["point"][name] - expected).max() <= 5 * unit, where
            moved = max(
                np.abs(found["live"][n] - found["at refresh"][n]).max() for n in found["live"]
            )
            assert moved > 0.1, "the live weights must have moved away from the anchor point"


def test_changing_the_live_weights_does_not_change_the_stored_anchor(copies):
    for rank in copies:
        for place in ("device", "cpu", "nvme"):
            for bf16 in (False, True):
                assert rank[3, place, bf16]["stays"] == [True, True, True], place
        assert (
            rank[0, "cpu", False]["stays"]
            == rank[0, "device", False]["stays"]
            == [True, True, True]
        )


def test_changing_the_stored_anchor_does_not_change_the_live_weights(copies):
    for rank in copies:
        for key, found in rank.items():
            if key[1] != "terms":
                assert found["gone"], key
                assert found["live stays"], key


def test_the_stored_gradient_is_the_sum_of_its_terms(copies):
    assert all(
        found["gradient"] for rank in copies for key, found in rank.items() if key[1] != "terms"
    )


# --- the refresh ----------------------------------------------------------------------------------


def rank_of_refreshes(folder: Path, accumulation: int, evaluation: str) -> list[Any]:
    data = tiny_data(31)
    # This example is alone in the last micro-batch. It must not weigh more.
    data[30] = {
        "ids": torch.full((5,), 3),
        "labels": torch.tensor(9),
    }
    section = {
        "anchor_directions": 3,
        "anchor_split": False,
        "seed": 3,
        "eps": 0.1,
        "evaluation": evaluation,
    }
    engine = build(folder, 12, data, accumulation=accumulation, **section)
    seen = []
    engine.module.register_forward_pre_hook(
        lambda _m, _a, kw: seen.append(len(kw["ids"])), with_kwargs=True
    )
    engine.refresh_anchor()
    return [list(engine.anchor.gradient_terms), max(seen), len(seen), engine.comm.scalar_bytes]


@pytest.mark.parametrize(
    ("world_size", "accumulation", "evaluation"),
    [
        (1, 2, "sequential"),
        (1, 2, "stacked"),
        (2, 1, "stacked"),
        (2, 2, "sequential"),
        (3, 1, "stacked"),
    ],
)
def test_a_refresh_weights_every_example_equally(tmp_path, world_size, accumulation, evaluation):
    """There are 31 examples, which neither the ranks nor the micro-batch divide."""
    data = tiny_data(31)
    data[30] = {"ids": torch.full((5,), 3), "labels": torch.tensor(9)}
    model = Tiny()
    params = named_parameters_of(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    loss = loss_of_module(model.double(), lambda outputs, _: outputs["loss"])
    section = {"eps": 0.1, "seed": 3, "anchor_directions": 3, "anchor_split": False}
    dense = DenseReference(
        params=params, loss=loss, whole_set=collate(data), trainable=trainable, **section
    )
    dense.refresh()
    plus, minus = dense.anchor_losses[0::2], dense.anchor_losses[1::2]
    expected = [(p - m) / 0.2 / 3 for p, m in zip(plus, minus, strict=True)]
    ranks = run_ranks(world_size, rank_of_refreshes, tmp_path, accumulation, evaluation)
    points = 6 if evaluation == "stacked" else 1  # points of one forward
    for terms, largest, forwards, _ in ranks:
        # Float32 losses of about 3 have errors of some 2^-22. Divided by 2 eps = 0.2 they are 5
        # times larger. A wrong weight of one example in 31 changes the second digit.
        np.testing.assert_allclose([c for _, c in terms], expected, rtol=0, atol=2e-5)
        assert [s for s, _ in terms] == dense_seeds(dense)
        micro = 12 // world_size // accumulation
        assert largest == points * micro, "never more than one micro-batch is on the device"
        rounds = math.ceil(math.ceil(31 / micro) / world_size)
        extra = forwards - 6 // points * rounds
        # the number of batches with different labels
        labels = math.ceil(VOCABULARY / min(4, micro))
        assert extra == {"sequential": 2, "stacked": 5}[evaluation] + labels, (
            "the further forwards are those that choose and check the form"
        )
    assert all(rank[0] == ranks[0][0] for rank in ranks), "the same bits on all ranks"


def rank_of_split_refreshes(folder: Path) -> tuple[int, int, int]:
    engine = build(folder, 12, tiny_data(32), anchor_directions=8, evaluation="sequential", eps=0.1)
    engine.refresh_anchor()  # also chooses the form of evaluation
    rows: list[int] = []
    engine.module.register_forward_pre_hook(
        lambda _m, _a, kw: rows.append(len(kw["ids"])), with_kwargs=True
    )
    engine.refresh_anchor()
    return len(engine.anchor.gradient_terms), len(rows), sum(rows)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_refresh_of_several_directions_is_one_pass_over_the_training_set(tmp_path, world_size):
    ranks = run_ranks(world_size, rank_of_split_refreshes, tmp_path)
    # Parts of four examples, each evaluated at two points. Of two ranks, the second has two examples
    # of one part in its last micro-batch, and repeats a forward because the first has two parts.
    assert ranks == ([(8, 16, 64)] if world_size == 1 else [(8, 12, 36), (8, 12, 32)])


def dense_seeds(dense: DenseReference) -> list[int]:
    return dense.seeds("anchor", dense.anchor_directions)


# --- NVMe files -----------------------------------------------------------------------------------


def rank_of_nvme(folder: Path) -> dict[str, Any]:
    engine = build(folder, anchor={"point": "nvme", "gradient": "nvme", "buffer_count": 3})
    rank = engine.global_rank
    engine.refresh_anchor()
    found: dict[str, Any] = {}
    # The bytes have to be in the files.
    for role in ("point", "gradient"):
        store = getattr(engine.anchor, role)
        shards = {p.name: shard_of(store, p) for p in engine.sharded_parameters}
        files = [f for f in folder.rglob(f"{role}*") if f"rank{rank}" in str(f)]
        content = b"".join(f.read_bytes() for f in files)
        found[role] = (len(files), all(t.numpy().tobytes() in content for t in shards.values()))
    # Reads are made ahead: in the second round, when a shard is asked for, the reads of it and of
    # the next shard have already begun.
    store, events = engine.anchor.point, []
    begin_read, begin_write = store._file.begin_read, store._file.begin_write
    store._file.begin_read = lambda *a: (events.append("read"), begin_read(*a))
    shards = [p for p in engine.sharded_parameters if p.numel]
    for _ in range(2):
        for shard in shards:
            shard_of(store, shard)
    events.clear()
    counts = []
    for shard in shards:
        shard_of(store, shard)
        counts.append((len(events), store._file.num_pending))
    found["ahead"] = counts
    # Writes are asynchronous: they are under way when `write` returns, and nothing is lost.
    store._file.begin_write = lambda *a: begin_write(*a)
    pending = []
    for shard in shards:
        store.write(shard, torch.full((shard.numel,), float(shard.ordinal)))
        pending.append(store._file.num_pending)
    found["behind"] = pending
    found["written"] = all(
        (shard_of(store, p) == p.ordinal).all().item() for p in [*shards, *reversed(shards)]
    )
    # A shard is written while it is being read ahead.
    for shard, following in itertools.pairwise(shards):
        shard_of(store, shard)
        store.write(following, torch.full((following.numel,), -1.0))
        found["written"] &= bool((shard_of(store, following) == -1.0).all())
    return found


def test_anchor_files_hold_the_shards_are_read_ahead_written_behind_and_removed_at_the_end(
    tmp_path,
):
    for found in run_ranks(2, rank_of_nvme, tmp_path):
        assert found["point"] == found["gradient"] == (1, True)
        # From the second round on, every `read` begins the read of the next shard, and returns
        # before that read is done.
        assert all(
            count == k + 1 and pending == 1 for k, (count, pending) in enumerate(found["ahead"])
        )
        assert all(1 <= n <= 3 for n in found["behind"])
        assert max(found["behind"]) == 3
        assert found["written"]
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == []


def rank_of_buffers(folder: Path) -> list[str]:
    digests = []
    for count, size in ((1, 1), (2, 1 << 22), (3, 1), (7, 1), (2, 1025)):
        own = folder / f"{count}-{size}"
        own.mkdir(exist_ok=True)
        anchor = {"point": "nvme", "gradient": "nvme", "buffer_count": count, "buffer_size": size}
        engine = build(own, model=Tiny(inner=1021), anchor=anchor, anchor_interval=3)
        blocks = [len(engine.anchor.point.blocks(p)) for p in engine.sharded_parameters]
        assert (max(blocks) > 3) == (size == 1), blocks
        train(engine, tiny_data(), range(7))
        digests.append(sha256(whole(engine)))
    engine = build(
        folder,
        model=Tiny(inner=1021),
        anchor={"point": "cpu", "gradient": "cpu"},
        anchor_interval=3,
    )
    train(engine, tiny_data(), range(7))
    digests.append(sha256(whole(engine)))
    return digests


def test_the_number_of_buffers_their_size_and_the_tier_change_no_bit(tmp_path):
    for digests in run_ranks(2, rank_of_buffers, tmp_path):
        assert len(set(digests)) == 1


# --- damage to the files --------------------------------------------------------------------------


def last_bytes(store: Any, shard: Any) -> list[int]:
    """The positions in the file of the last byte of each block of `shard`."""
    size = shard.dtype.itemsize
    return [store._offsets[shard.name] + stop * size - 1 for _, stop in store.blocks(shard)]


def values_of(file: Path, store: Any, parameters: Any) -> bytes:
    """The bytes of all values in the file, without the padding of its blocks."""
    store._file.wait()
    content = file.read_bytes()
    places = [(store._offsets[p.name], p.numel * p.dtype.itemsize) for p in parameters]
    return b"".join(content[place : place + length] for place, length in places)


def rank_of_failing_drives(folder: Path, buffer_count: int, bf16: bool) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    engines, files = [], []
    for name in ("disturbed", "twin"):
        (folder / name).mkdir(exist_ok=True)
        anchor = {
            "point": "nvme",
            "gradient": "nvme",
            "buffer_count": buffer_count,
            "buffer_size": 1,
        }
        engines.append(build(folder / name, model=Tiny(inner=1021), anchor=anchor, bf16=bf16))
        files.append(folder / name / "zods_anchor" / f"rank{rank}" / "gradient.bin")
    engine, twin = engines
    store, file, warnings = engine.anchor.gradient, files[0], LogTexts("zods.params")
    for each in engines:
        train(each, tiny_data(), range(2))
    good = values_of(file, store, engine.sharded_parameters)
    size = file.stat().st_size
    bits = [[place] for p in engine.sharded_parameters for place in last_bytes(store, p)]
    damages = {
        "nothing": lambda: None,
        "one bit": lambda: flip(file, bits[len(bits) // 2][0]),
        "a bit of every block": lambda: [flip(file, *place) for place in bits],
        "cut to half": lambda: os.truncate(file, size // 2 + 100),
        "cut by a byte": lambda: os.truncate(file, size - 1),
        "emptied": lambda: os.truncate(file, 0),
    }
    found: dict[str, Any] = {"blocks": len(bits), "file": str(file), "damages": {}}
    for k, (name, damage) in enumerate(damages.items()):
        # A read that was made ahead comes before the damage.
        values_of(file, store, engine.sharded_parameters)
        damage()
        warnings.texts.clear()
        for each in engines:
            # the first step may have read the first block before the damage
            train(each, tiny_data(), range(2 * k, 2 * k + 2))
        equal = sha256(whole(engine)) == sha256(whole(twin))
        rebuilt = values_of(file, store, engine.sharded_parameters) == good
        found["damages"][name] = (equal, rebuilt, list(warnings.texts))
    return found


@pytest.mark.parametrize(
    ("world_size", "buffer_count", "bf16"), [(1, 1, False), (2, 3, False), (2, 2, True)]
)
def test_a_damaged_gradient_file_is_rebuilt_and_the_run_continues_as_its_undisturbed_twin(
    tmp_path, world_size, buffer_count, bf16
):
    for found in run_ranks(world_size, rank_of_failing_drives, tmp_path, buffer_count, bf16):
        blocks = found["blocks"]
        # Some blocks of a cut file lie before the cut.
        warned = {
            "nothing": 0,
            "one bit": 1,
            "a bit of every block": blocks,
            "cut by a byte": 1,
            "emptied": blocks,
        }
        for name, (equal, rebuilt, texts) in found["damages"].items():
            assert equal, name
            assert rebuilt, name
            assert all(
                found["file"] in text and "rebuilt exactly from the gradient's terms" in text
                for text in texts
            )
            assert all(re.search(r"bytes \d+ to \d+ \(of [a-z]+\.", text) for text in texts)
            assert len(texts) == warned[name] if name in warned else 0 < len(texts) < blocks, (
                f"{name}: {texts}"
            )


def rank_of_lost_points(folder: Path) -> dict[str, tuple[str, str, bool]]:
    said = {}
    for name in ("one bit", "cut"):
        (folder / name).mkdir(exist_ok=True)
        engine = build(folder / name, anchor={"point": "nvme", "gradient": "nvme"})
        train(engine, tiny_data(), range(2))
        store, file = (
            engine.anchor.point,
            folder / name / "zods_anchor" / f"rank{engine.global_rank}" / "point.bin",
        )
        store._file.wait()
        place = last_bytes(
            store, next(p for p in engine.sharded_parameters if p.name == "hidden.weight")
        )[0]
        flip(file, place) if name == "one bit" else os.truncate(file, place)
        try:
            train(engine, tiny_data(), range(2, 4))
            said[name] = ("nothing", "", False)
        except Exception as error:
            ranged = (
                f"{file}: bytes {store._offsets['hidden.weight']} to {place + 1} (of hidden.weight)"
                in str(error)
            )
            said[name] = (type(error).__name__, str(error), ranged)
    return said


def test_a_damaged_file_of_the_point_stops_the_run_and_names_the_bytes_and_what_to_do(tmp_path):
    for said in run_ranks(2, rank_of_lost_points, tmp_path):
        for kind, text, ranged in said.values():
            assert kind == "RuntimeError"
            assert ranged, text
            assert "Start again with the same command" in text


# --- mistakes -------------------------------------------------------------------------------------


def refusal(function: Any, *arguments: Any, **keywords: Any) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        function(*arguments, **keywords)
    return str(error.value)


def rank_of_mistakes(folder: Path, small: Path | None, read_only: Path | None) -> dict[str, str]:
    nvme = {"point": "nvme", "gradient": "nvme"}
    good = folder / "good"
    good.mkdir(exist_ok=True)
    (folder / f"file{torch.distributed.get_rank()}").touch()
    said = {
        "missing": refusal(build, folder / "missing", anchor=nvme),
        "a file": refusal(build, folder / "file0", anchor=nvme),
        "offload": refusal(build, folder / "missing", offload="nvme"),
    }
    if read_only is not None:
        said["read-only"] = refusal(build, read_only, anchor=nvme)
    if small is not None:
        said["small"] = refusal(build, small, anchor=nvme)
    else:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        said["small"] = refusal(build, good, anchor=nvme)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    first = build(good, anchor=nvme)
    said["in use"] = refusal(build, good, anchor=nvme)
    train(first, tiny_data(), range(2))  # the run that uses the folder continues
    # Only one rank cannot use its folder.
    mine = folder / f"own{torch.distributed.get_rank()}"
    if torch.distributed.get_rank() == 0:
        mine.mkdir()
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    if torch.distributed.get_rank() == 1:
        blocker = elsewhere / "zods_anchor"
        blocker.mkdir(exist_ok=True)
        (blocker / "rank1").touch()  # a file at the path of rank 1's folder
    torch.distributed.barrier()
    said["one rank"] = refusal(build, elsewhere, anchor=nvme)
    return said


@pytest.fixture
def mounts(tmp_path: Path) -> Any:
    """Small file systems: a drive of 64 KiB and a read-only one.

    Each is None where this process may not mount.
    """
    made: list[Path | None] = []
    for name, options in (("small", "size=64k"), ("read_only", "ro,size=64k")):
        path = tmp_path / name
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        done = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
        made.append(path if done else None)
    yield made
    for path in filter(None, made):
        subprocess.run(["umount", str(path)], check=True)


def test_a_folder_that_cannot_hold_the_anchor_is_one_clear_error_on_all_ranks(tmp_path, mounts):
    folder = tmp_path / "nvme"
    folder.mkdir()
    first, second = run_ranks(2, rank_of_mistakes, folder, *mounts)
    expected = {
        "missing": "not a folder",
        "a file": "not a folder",
        "offload": "offload_param.nvme_path",
        "read-only": "not writable",
        "small": "too small",
        "in use": "used by another run",
        "one rank": "rank1",
    }
    for what, said in first.items():
        assert expected[what] in said, f"{what}: {said}"
        assert said == second[what]
        if what != "one rank":
            assert "nvme_path" in said, said
