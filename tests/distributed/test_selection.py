"""Selection on several ranks, in zeroth-order and first-order steps, stopped and resumed.

The choice does not depend on the way in which candidates are spread over the ranks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, DistributedSampler

import zods
from tests.distributed.models import configuration, numpy_of, whole
from tests.distributed.ranks import run_ranks
from tests.distributed.zoo import with_adapters, zoo_batch, zoo_model
from tests.reference import selection as reference
from tests.reference.objective import objective, token_losses
from zods.comm.communicator import Communicator
from zods.data.loader import TrainingLoader
from zods.selection import facility_location, features
from zods.selection import facility_location as fl
from zods.selection.facility_location import from_features, lazy_greedy, quantised
from zods.selection.mean_matching import mean_matching
from zods.trajectory.log import read_log
from zods.trajectory.records import Step

WORLDS = (1, 2, 3, 4)
SLOW = pytest.mark.slow


# --- the distributed greedy on given features ---


def features_of(kind: str, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    if kind == "ties":  # one dimension and few values, so that gains are equal
        return torch.randint(0, 5, (n, 1), generator=generator).float()
    features = torch.randn(n, 4, generator=generator)
    return (
        features[torch.randint(0, n // 2, (n,), generator=generator)]
        if kind == "duplicates"
        else features
    )


def split_of(how: str, n: int, world_size: int) -> list[list[int]]:
    """The candidates that each rank owns."""
    ids = (
        torch.randperm(n, generator=torch.Generator().manual_seed(7)).tolist()
        if how == "permuted"
        else list(range(n))
    )
    # the first rank has most candidates; the last of more than two ranks has none
    if how == "uneven":
        ends = [0, *[n - n // 5 + k for k in range(world_size - 1)], n]
        return [ids[a:b] for a, b in pairwise(ends)]
    if how == "one":
        return [ids if rank == world_size - 1 else [] for rank in range(world_size)]
    return [ids[rank::world_size] for rank in range(world_size)]


CASES = [
    (kind, n, how)
    for kind in ("random", "ties", "duplicates")
    for n in (17, 128, 1000)
    for how in ("dealt", "uneven", "permuted", "one")
]


def choose_on_ranks() -> list[tuple[Any, Any, list[int], int]]:
    """For every case, gather the features from their owners and choose.

    The choice is made by every rank for all candidates, and by every rank for its own candidates.
    """
    comm = Communicator(torch.device("cpu"))
    results = []
    for kind, n, how in CASES:
        mine = split_of(how, n, comm.world_size)[comm.rank]
        features = features_of(kind, n)[mine]
        largest = max(
            row[0] for row in comm.gather_scalars([float(features.abs().max()) if mine else 0.0])
        )
        rows = torch.cat(comm.gather_rows(quantised(features, largest)))
        ids = torch.cat(comm.gather_rows(torch.tensor(mine, dtype=torch.int64)))
        by_id = torch.empty_like(rows)
        by_id[ids] = rows
        k = n // 4
        comm.selection_bytes = 0
        sharded = lazy_greedy(
            fl.from_quantised(by_id, largest, "l1"),
            k,
            own=torch.tensor(mine, dtype=torch.int64),
            exchange=comm.gather_integers,
        )
        replicated = lazy_greedy(fl.from_quantised(by_id, largest, "l1"), k)
        matched = mean_matching(by_id, k) if n <= 128 else []
        results.append((sharded, replicated, matched, comm.selection_bytes))
    return results


@pytest.mark.parametrize(
    "world_size", [pytest.param(n, marks=SLOW if n in (2, 4) else []) for n in WORLDS]
)
def test_the_same_ids_on_any_number_of_ranks(world_size: int):
    """Uneven and empty shards, ties, duplicates and permuted owners.

    Gains and weights have the same bits, too.
    """
    of_ranks = run_ranks(world_size, choose_on_ranks)
    for case, *found in zip(CASES, *of_ranks, strict=True):
        kind, n, _ = case
        expected = reference.eager_greedy(from_features(features_of(kind, n), "l1"), n // 4)
        values = quantised(features_of(kind, n), float(features_of(kind, n).abs().max()))
        means = reference.mean_matching(values.tolist(), n // 4) if n == 17 else found[0][2]
        for sharded, replicated, matched, sent in found:
            assert sharded == expected, case
            assert replicated == expected, case
            assert matched == means, case
            assert (sent > 0) == (world_size > 1)


def gather() -> list[Any]:
    comm = Communicator(torch.device("cpu"))
    rows = torch.arange(comm.rank * 6).view(-1, 3)  # a rank has twice as many rows as its number
    return [
        [part.tolist() for part in comm.gather_rows(rows)],
        [part.dtype for part in comm.gather_rows(rows.to(torch.int16))],
        [len(part) for part in comm.gather_rows(rows[:0])],
        comm.gather_integers([comm.rank, 2**62]),
    ]


def test_different_numbers_of_rows_are_gathered():
    for rows, dtypes, empty, integers in run_ranks(3, gather):
        assert rows == [[], [[0, 1, 2], [3, 4, 5]], torch.arange(12).view(-1, 3).tolist()]
        assert dtypes == [torch.int16] * 3
        assert empty == [0, 0, 0]
        assert integers == [[rank, 2**62] for rank in range(3)]


# --- steps ---


def examples(size: int = 64, *, spoilt: bool = False) -> list[dict[str, Any]]:
    """Examples of two sources of different size.

    spoilt: some have no labels, and some have a loss that is not finite.
    """
    batch = zoo_batch("llama", size=size, length=12, padded=True, seed=3)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(size)]
    for i, row in enumerate(rows):
        row["source"] = "rare" if i % 8 == 0 else "common" if i % 3 else "other"
        if spoilt and i % 5 == 0:
            row["labels"] = torch.full_like(row["labels"], -100)
    return rows


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        key: torch.stack([row[key] for row in rows])
        for key in ("input_ids", "attention_mask", "labels")
    }


def zeroth_order_engine(
    data: list[Any], *, lora: bool = False, top: dict[str, Any] | None = None, **options: Any
) -> Any:
    stage, offload = options.pop("stage", 3), options.pop("offload", "none")
    selector = {
        "candidates": 16,
        "source_column": "source",
        "num_directions": 8,
        **options.pop("selector", {}),
    }
    config = configuration(
        8,
        stage=stage,
        offload=offload,
        lr=1e-2,
        selector=selector,
        top=top,
        **{"method": "mezo", **options},
    )
    model = with_adapters("llama") if lora else zoo_model("llama")
    by_target = selector.get("strategy") == "target"
    return zods.initialize(
        model=model,
        training_data=data,
        collate_fn=collate,
        config=config,
        target_data=examples(70)[64:] if by_target else None,
    )[0]


def zeroth_order_steps(
    steps: int, options: dict[str, Any]
) -> tuple[list[list[int]], list[Any], int]:
    spoilt = options.pop("spoilt", False)
    engine = zeroth_order_engine(examples(spoilt=spoilt), **options)
    ids, reports = [], []
    for _ in range(steps):
        engine.train_batch()
        ids.append(engine.selection.selected_ids)
        reports.append((engine.selection.report.unusable, engine.last_step.loss))
    return ids, reports, engine.comm.selection_bytes // steps


VARIANTS: list[dict[str, Any]] = [
    {},
    {"offload": "cpu"},
    {"lora": True},
    {"selector": {"features": "zo", "two_sided": False, "source_column": None, "num_clusters": 3}},
    {"selector": {"features": "paper", "metric": "l1"}},
    {"selector": {"strategy": "mean_matching"}},
    {"selector": {"strategy": "target"}},
    {
        "method": "mezo_svrg",
        "anchor_interval": 2,
        "anchor": {"point": "terms", "gradient": "terms"},
    },
    {"method": "mezo_svrg", "anchor_interval": 2, "spoilt": True},
]
FURTHER: list[dict[str, Any]] = [
    {"selector": {"metric": "cosine", "weights": "cluster"}},
    {"selector": {"warmup_steps": 2, "interval": 2}},
    {"stage": 0},
    {"selector": {"features": "zo"}},
    {"selector": {"strategy": "stochastic_greedy"}},
    {"selector": {"strategy": "mean_matching", "features": "zo", "source_column": None}},
    {"spoilt": True, "selector": {"strategy": "target", "features": "zo"}},
    {"selector": {"strategy": "highest_loss"}},
    {"selector": {"strategy": "lowest_loss"}},
    {"selector": {"strategy": "target", "features": "hidden_states"}},
    {"selector": {"strategy": "longest"}},
    {"selector": {"strategy": "structured_random", "interval": 2}},
    {"spoilt": True},
    {"spoilt": True, "selector": {"strategy": "random"}},
    {"method": "mezo_svrg", "anchor_interval": 2, "evaluation": "sequential"},
    {"examples_per_direction": 1, "evaluation": "lockstep"},
    {"top": {"bf16": {"enabled": True}}},
]


def named(options: dict[str, Any]) -> str:
    return re.sub(r"[{}':\" ]+", " ", str(options)).strip() or "default"


@pytest.mark.parametrize(
    "options", [*VARIANTS, *(pytest.param(options, marks=SLOW) for options in FURTHER)], ids=named
)
def test_zeroth_order_steps_choose_the_same_on_1_and_2_ranks(options: dict[str, Any]):
    """Compare the choices of 4 steps, in bf16 that of the first: the later ones are made with
    other parameters.
    """
    alone, both = (run_ranks(n, zeroth_order_steps, 4, dict(options)) for n in (1, 2))
    assert both[0][0] == both[1][0]
    compared = 1 if "top" in options else 4
    assert alone[0][0][:compared] == both[0][0][:compared]
    assert all(len(set(ids)) == 8 for ids in alone[0][0])
    assert all(math.isfinite(loss) for _, loss in alone[0][1])
    unusable = [i for i in range(64) if i % 5 == 0] if options.get("spoilt") else []
    assert not set(unusable) & {i for ids in alone[0][0] for i in ids}
    assert sum(count for count, _ in alone[0][1]) == len(unusable)


def features_in_many_runs(_: int) -> Any:
    """Ranks whose batches differ in length make the same number of forwards.

    Otherwise they would wait for each other for ever.
    """
    features._STACK_ELEMENTS_ON_CPU = 20_000
    data = [
        {**row, **{k: row[k][: 4 + i % 9] for k in ("input_ids", "attention_mask", "labels")}}
        for i, row in enumerate(examples())
    ]
    options = {"candidates": 16, "features": "zo", "num_directions": 16, "source_column": "source"}
    config = configuration(8, lr=1e-2, selector=options, method="mezo")
    engine = zods.initialize(
        model=zoo_model("llama"), training_data=data, collate_fn=padded, config=config
    )[0]
    return [(engine.train_batch(), engine.selection.selected_ids)[1] for _ in range(3)]


def padded(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    values = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: pad_sequence([row[key] for row in rows], True, value) for key, value in values.items()
    }


def test_finite_differences_make_the_same_number_of_forwards_on_all_ranks():
    (alone,), (first, second) = (
        run_ranks(1, features_in_many_runs, 0),
        run_ranks(2, features_in_many_runs, 0),
    )
    assert alone == first == second


def large_selection(_: int) -> list[tuple[list[int], int]]:
    """Select as if the candidates' distances did not fit the memory of a rank."""
    facility_location._CACHE_BYTES = 1000
    return zeroth_order_steps(3, {})[0]


def test_ranks_share_the_work_where_distances_do_not_fit_the_memory():
    expected = run_ranks(1, zeroth_order_steps, 3, {})[0][0]
    for world_size in (1, 2, 4):
        assert run_ranks(world_size, large_selection, 0) == [expected] * world_size


def test_128_candidates_on_4_ranks_send_less_than_64_kib():
    options = {"selector": {"candidates": 128, "num_directions": 64}}
    for _, _, sent in run_ranks(4, bytes_of_a_selection, options):
        assert 0 < sent < 64 << 10


def bytes_of_a_selection(options: dict[str, Any]) -> tuple[Any, Any, int]:
    engine = zeroth_order_engine(examples(128), **options)
    next(iter(engine.training_dataloader))
    return None, None, engine.comm.selection_bytes


def chosen_and_weighted(world_size_options: dict[str, Any]) -> dict[str, Any]:
    """The losses of one step at its points, as the engine reduces them.

    Also the chosen examples and their weights.
    """
    engine = zeroth_order_engine(examples(), selector={"weights": "cluster"}, **world_size_options)
    batches = iter(engine.training_dataloader)
    before = numpy_of(whole(engine))
    micro = [next(batches) for _ in range(engine.gradient_accumulation_steps())]
    for batch in micro:
        engine.backward(engine(batch))
        engine.step()
    selection = engine.selection
    return {
        "before": before,
        "loss": engine.last_step.loss,
        "ids": selection.selected_ids,
        "weights": selection.state_dict()["weights"],
        "tokens": [int(batch["attention_mask"].sum()) for batch in micro],
    }


@pytest.mark.parametrize("loss_mean", ["tokens", "examples"])
def test_the_loss_of_a_step_is_the_weighted_mean_over_the_chosen(loss_mean: str):
    (one,) = run_ranks(1, chosen_and_weighted, {"loss_mean": loss_mean})
    two = run_ranks(2, chosen_and_weighted, {"loss_mean": loss_mean})
    model = zoo_model("llama")
    with torch.no_grad():
        batch = collate([examples()[i] for i in one["ids"]])
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert sum(one["weights"]) == 16 and len(set(one["weights"])) > 1  # noqa: PT018
    expected = float(
        objective(token_losses(logits, batch["labels"], True), loss_mean, one["weights"])
    )
    for run in (one, *two):
        assert (run["ids"], run["weights"]) == (one["ids"], one["weights"])
        # the losses are taken at points eps = 1e-3 away
        assert run["loss"] == pytest.approx(expected, rel=1e-4)
    assert abs(sum(two[0]["tokens"]) - sum(two[1]["tokens"])) <= 12


# --- stopped and resumed ---


def run_and_save(
    steps: int, save_at: int, folder: Path, options: dict[str, Any]
) -> tuple[list[list[int]], list[list[int]]]:
    """The chosen ids of each step, as the engine and as the log have them."""
    engine = zeroth_order_engine(examples(), **options)
    engine.resume(folder / "run")
    ids = []
    for step in range(steps):
        if step == save_at:
            engine.save_checkpoint(folder / "checkpoint")
        engine.train_batch()
        ids.append(engine.selection.selected_ids)
    logged: list[list[int]] = []
    for record in read_log(folder / "run" / "trajectory.log").records:
        if isinstance(record, Step):
            chosen, candidates = record.sub_batch, engine.training_dataloader.candidates(record.at)
            logged.append(logged[-1] if chosen is None else [candidates[i] for i in chosen.indices])
    return ids, logged


def resume(steps: int, folder: Path, options: dict[str, Any], log: Path | None) -> list[list[int]]:
    engine = zeroth_order_engine(examples(), **options)
    if log is None:
        engine.load_checkpoint(folder / "checkpoint")
    else:
        engine.resume(log)
    ids = []
    for _ in range(steps):
        engine.train_batch()
        ids.append(engine.selection.selected_ids)
    return ids


@pytest.mark.parametrize(
    ("options", "save_at"),
    [
        pytest.param({}, 3, marks=SLOW),
        pytest.param({"selector": {"features": "paper"}}, 3, marks=SLOW),
        pytest.param({"selector": {"interval": 3}}, 4, marks=SLOW),
        pytest.param({"selector": {"warmup_steps": 4}}, 3, marks=SLOW),
        pytest.param({"selector": {"strategy": "target"}}, 3, marks=SLOW),
    ],
    ids=["exact", "paper", "interval", "warm-up", "target"],
)
def test_a_run_stopped_and_resumed_on_another_number_of_ranks_selects_the_same(
    options, save_at, tmp_path: Path
):
    """The 8 steps cross an epoch of 4 candidate batches."""
    undisturbed, logged = run_ranks(2, run_and_save, 8, save_at, tmp_path, options)[0]
    assert logged == undisturbed
    whole = read_log(tmp_path / "run" / "trajectory.log")
    stopped = (tmp_path / "run" / "trajectory.log").read_bytes()[
        : whole.ends[len(whole.until(save_at))]
    ]
    for world_size in (1, 4):
        (tmp_path / f"on{world_size}").mkdir()
        (tmp_path / f"on{world_size}" / "trajectory.log").write_bytes(stopped)
        for log in (None, tmp_path / f"on{world_size}"):
            resumed = run_ranks(world_size, resume, 8 - save_at, tmp_path, options, log)
            assert all(ids == undisturbed[save_at:] for ids in resumed)


# --- first-order training ---


def first_order_engine(stage: int, lora: bool, accumulation: int = 1) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = with_adapters("llama") if lora else zoo_model("llama")
    config = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-3, "weight_decay": 0.01, "torch_adam": True},
        },
        "steps_per_print": 10**9,
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        model_parameters=trainable,
        config=config,
        training_data=examples(),
        collate_fn=collate,
    )
    return engine, loader


def first_order_steps(
    stage: int, lora: bool, accumulation: int, loss_mean: str, own_loader: bool
) -> tuple[Any, ...]:
    """Make a pass with weighted clusters.

    Returns the chosen ids, the mean losses, and the norms of the parameters at the end.
    """
    engine, loader = first_order_engine(stage, lora, accumulation)
    if own_loader:
        sampler = DistributedSampler(examples(), shuffle=False)
        loader = DataLoader(
            examples(), batch_size=8 // engine.world_size, sampler=sampler, collate_fn=collate
        )
    comm = Communicator(torch.device("cpu"))
    options = {
        "candidates": 16,
        "source_column": "source",
        "num_directions": 8,
        "weights": "cluster",
    }
    batches = zods.select(loader, engine, options, loss_mean=loss_mean)
    ids, losses = [], []
    for micro in batches:
        loss = zods.weighted_loss(engine, micro, loss_mean)
        engine.backward(loss)
        engine.step()
        losses.append(comm.sum_over_ranks([float(loss.detach())])[0] / comm.world_size)
        if batches.selection.selected_ids not in ids:
            ids.append(batches.selection.selected_ids)
    assert len(losses) == len(batches)
    ends = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_tensor")):
            ends[name] = param.detach().double().norm().item()
    return ids, losses, ends


FIRST_ORDER = [(0, 1, "tokens"), (1, 2, "examples"), (3, 1, "examples"), (3, 2, "tokens")]
DEFAULT = {(0, 1, "tokens", True), (3, 1, "examples", False), (3, 2, "tokens", True)}


@pytest.mark.parametrize(
    ("stage", "accumulation", "loss_mean", "lora"),
    [
        pytest.param(*case, lora, marks=[] if (*case, lora) in DEFAULT else SLOW)
        for case in FIRST_ORDER
        for lora in (False, True)
    ],
)
def test_first_order_training_on_chosen_examples(
    stage: int, accumulation: int, loss_mean: str, lora: bool
):
    """The steps are those of plain AdamW on one process over the same weighted examples.

    Ranks and micro-batches do not change them.
    """
    expected_ids, expected_losses, expected_ends = plain_adamw(lora, loss_mean)
    for world_size in (1, 2):
        for ids, losses, ends in run_ranks(
            world_size, first_order_steps, stage, lora, accumulation, loss_mean, True
        ):
            assert ids == expected_ids
            means = [
                sum(losses[i : i + accumulation]) / accumulation
                for i in range(0, len(losses), accumulation)
            ]
            assert means == pytest.approx(expected_losses, rel=1e-4)
            assert {k.removeprefix("module."): v for k, v in ends.items()} == pytest.approx(
                expected_ends, rel=1e-3
            )


def plain_adamw(
    lora: bool, loss_mean: str
) -> tuple[list[list[int]], list[float], dict[str, float]]:
    """Train as the reference does.

    It uses exact features one example at a time, the greedy choice by source, and one weighted loss
    over the whole sub-batch.
    """
    from zods.core.directions import derive_seed
    from zods.selection.features import FeatureExtractor
    from zods.selection.quotas import quotas_of

    torch.manual_seed(0)
    model = with_adapters("llama") if lora else zoo_model("llama")
    data = examples()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01
    )
    extract = FeatureExtractor(model, kind="exact", rank=4)
    chosen, losses = [], []
    for step in range(4):
        candidates = list(range(16 * step, 16 * step + 16))
        seeds = [derive_seed(42, "selection", step, k) for k in range(8)]
        features = torch.cat([extract(collate([data[i]]), seeds)[0] for i in candidates])
        groups = {
            s: [j for j in range(16) if data[candidates[j]]["source"] == s]
            for s in ("common", "other", "rare")
        }
        quotas = quotas_of({s: len(g) for s, g in groups.items()}, 8)
        weights: dict[int, float] = {}
        for source, members in groups.items():
            if quotas[source] == len(members):
                weights |= {candidates[j]: 1.0 for j in members}
            else:
                of_source = lazy_greedy(from_features(features[members]), quotas[source])
                weights |= {
                    candidates[members[j]]: float(w)
                    for j, w in zip(of_source.ids, of_source.weights, strict=True)
                }
        ids = sorted(weights)
        batch = collate([data[i] for i in ids])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = objective(
            token_losses(logits, batch["labels"], True), loss_mean, [weights[i] for i in ids]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        chosen.append(ids)
        losses.append(float(loss.detach()))
    return (
        chosen,
        losses,
        {name: p.detach().double().norm().item() for name, p in model.named_parameters()},
    )


def steps_with_few_usable(stage: int) -> tuple[list[list[int]], list[float]]:
    """Choose 8 of 16 candidates of which 3 have labels.

    Some micro-batches count for nothing; on some ranks all of them.
    """
    engine, _ = first_order_engine(stage, False, 2)
    data = [
        row if i % 16 < 3 else {**row, "labels": torch.full_like(row["labels"], -100)}
        for i, row in enumerate(examples())
    ]
    loader = DataLoader(
        data,
        batch_size=16 // engine.world_size,
        sampler=DistributedSampler(data, shuffle=False),
        collate_fn=collate,
    )
    batches = zods.select(loader, engine, {"candidates": 16})
    ids, losses = [], []
    for micro in batches:
        loss = zods.weighted_loss(engine, micro)
        engine.backward(loss)
        engine.step()
        ids.append(batches.selection.selected_ids)
        losses.append(float(loss.detach()))
    return ids, losses


@pytest.mark.parametrize("stage", [0, 3])
def test_where_few_candidates_are_usable_the_others_do_not_count(stage: int):
    (alone,) = run_ranks(1, steps_with_few_usable, stage)
    of_ranks = run_ranks(2, steps_with_few_usable, stage)
    assert (
        alone[0]
        == [[i, i + 1, i + 2] for i in (0, 0, 16, 16, 32, 32, 48, 48)]
        == of_ranks[0][0]
        == of_ranks[1][0]
    )
    means = [sum(losses) / 2 for losses in zip(*(losses for _, losses in of_ranks), strict=True)]
    for step in range(4):
        assert sum(means[2 * step : 2 * step + 2]) == pytest.approx(
            sum(alone[1][2 * step : 2 * step + 2]), rel=1e-4
        )


def passes_with_a_stop(stop: int) -> tuple[list[list[int]], list[list[int]]]:
    """The choices of a pass, and of a pass that is stopped after `stop` steps and resumed."""
    engine, _ = first_order_engine(0, False, 2)
    loader = DataLoader(
        examples(),
        batch_size=16 // engine.world_size,
        sampler=DistributedSampler(examples(), shuffle=False),
        collate_fn=collate,
    )
    options = {"candidates": 16, "interval": 2, "strategy": "random"}
    whole_pass, first, second = (zods.select(loader, engine, options) for _ in range(3))
    expected = [whole_pass.selection.selected_ids for _ in whole_pass]
    found, batches = [], iter(first)
    for _ in range(2 * stop):
        next(batches)
        found.append(first.selection.selected_ids)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.selection.selected_ids for _ in second]
    return expected, found


@pytest.mark.parametrize(
    "stop",
    [pytest.param(0, marks=SLOW), 1, pytest.param(2, marks=SLOW), 5, pytest.param(8, marks=SLOW)],
)
def test_a_pass_over_a_loader_continues_where_it_was_stopped(stop: int):
    for expected, found in run_ranks(2, passes_with_a_stop, stop):
        assert len(expected) == 16
        assert found == expected


def test_deepspeeds_own_loader_works_too():
    for ids, losses, _ in run_ranks(2, first_order_steps, 3, False, 1, "tokens", False):
        assert len(ids) == 4
        assert all(math.isfinite(loss) for loss in losses)


# --- mistakes ---


def mistakes() -> list[str]:
    """The errors of mistakes. They are the same on all ranks, and no rank hangs."""
    data = examples()
    messages = []

    def attempt(make: Any) -> None:
        try:
            make()
            messages.append("taken")
        except (ValueError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")

    def with_selector(rows: Any = data, **selector: Any) -> Any:
        return lambda: zeroth_order_engine(rows, selector=selector)

    attempt(with_selector(source_column="origin"))
    attempt(with_selector(candidates=7))
    attempt(with_selector(candidates=65))
    attempt(with_selector(quotas={"rare": 4, "common": 5}))
    attempt(with_selector(quotas={"rrae": 4, "common": 4}))
    attempt(with_selector(quotas={"rare": 4, "common": 4}, strategy="longest"))
    attempt(with_selector(pattern="no_such_layer"))

    def with_target(rows: Any, **options: Any) -> Any:
        return zods.initialize(
            model=zoo_model("llama"),
            training_data=data,
            collate_fn=collate,
            target_data=rows,
            config=configuration(8, method="mezo", **options),
        )[0]

    by_target = {"selector": {"candidates": 16, "strategy": "target"}}
    attempt(lambda: with_target(None, **by_target))
    attempt(lambda: with_target([], **by_target))
    attempt(lambda: with_target(data, selector={"candidates": 16}))
    attempt(lambda: with_target(data))
    attempt(
        lambda: zods.initialize(
            model=zoo_model("llama"),
            config=configuration(8, method="mezo", selector={"candidates": 8}),
        )
    )
    unlabelled = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in data]
    attempt(with_target(unlabelled, **by_target).train_batch)
    engine = zeroth_order_engine(unlabelled)
    attempt(engine.train_batch)
    saved = zeroth_order_engine(data).training_dataloader.state_dict()
    attempt(
        lambda: zeroth_order_engine(
            data, selector={"interval": 2}
        ).training_dataloader.load_state_dict(saved)
    )
    attempt(
        lambda: TrainingLoader(
            data, micro_batch=8, accumulation=1, rank=0, world_size=1, seed=0
        ).load_state_dict(saved)
    )
    masked = {"model": zoo_model("bert, masked"), "training_data": data, "collate_fn": collate}
    engine = zods.initialize(
        **masked, config=configuration(8, method="mezo", selector={"candidates": 16})
    )[0]
    attempt(engine.train_batch)
    engine, loader = first_order_engine(3, False)
    same = DataLoader(data, batch_size=8 // engine.world_size, collate_fn=collate)
    attempt(lambda: next(iter(zods.select(same, engine, {"candidates": 16}))) and None)
    attempt(lambda: zods.select(loader, engine, {"candidates": 17}))
    attempt(lambda: zods.select([1, 2], engine, {"candidates": 16}))
    attempt(lambda: zods.select(loader, engine, {"candidates": 16, "sources": "source"}))
    return messages


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=SLOW), 2])
def test_mistakes_are_reported_on_all_ranks(world_size: int):
    wanted = [
        r"source_column: the training data has no column 'origin'; its columns are "
        r"input_ids, .*source",
        r"selector\.candidates: found 7, of which 8",
        r"selector\.candidates: found 65, but there are 64",
        r"selector\.quotas: they sum to 9, must sum to 8",
        r"selector\.quotas: no example's source is 'rrae'; there are common, other, rare",
        r"selector\.quotas: longest does not choose by source",
        r"selector\.pattern: no linear layer's parameter matches 'no_such_layer'",
        r'strategy: "target" chooses .* Give target_data to zods.initialize',
        r"target_data: the dataset is empty",
        r'target_data: given, but zeroth_order.selector.strategy is "greedy"',
        r"target_data: given without zeroth_order.selector",
        r"training_data: missing",
        r"RuntimeError: selector: none of 8 target examples has a label",
        r"RuntimeError: selector: none of 16 candidates has a label and a finite loss",
        r"selector: interval is 2, but 1 in the checkpoint",
        r"zeroth_order\.selector: none, but the checkpoint was made with one",
        r"the model's own loss .* is not the cross entropy of its logits",
        r"taken" if world_size == 1 else r"16 candidates are 8 different ones: ranks give the same",
        r"selector\.candidates: found 17, but the loader's batches of",
        r"loader: found list, expected a DataLoader",
        r"selector\.sources: unknown key\. Did you mean 'source_column'",
    ]
    for messages in run_ranks(world_size, mistakes):
        assert len(messages) == len(wanted)
        for message, pattern in zip(messages, wanted, strict=True):
            assert re.search(pattern, message), message
