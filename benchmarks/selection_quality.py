"""The quality and the cost of features and baselines: a part of `benchmarks/selection.py`."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from selection_models import BUDGET, CANDIDATES, Row, decoder, first_order, prepared, single_process
from torch import Tensor

from zods.config.selector_section import SelectorConfig
from zods.data.objectives import example_losses
from zods.data.order import epoch_order
from zods.selection import facility_location as fl
from zods.selection.features import FeatureExtractor
from zods.selection.selector import NEEDS, CandidateBatch, Selector
from zods.selection.target_matrix import find_target

FEATURES: list[Row] = [
    *({"kind": "zo", "num_directions": m} for m in (1, 4, 16, 64)),
    {"kind": "zo", "num_directions": 64, "two_sided": False},
    {"kind": "paper", "num_directions": 1},
    *({"kind": "exact", "num_directions": m} for m in (16, 64, 256, 1024)),
    {"kind": "exact", "num_directions": 64, "rank": 1},
]
SMOKE: list[Row] = [
    {"kind": "zo", "num_directions": 1},
    {"kind": "paper", "num_directions": 1},
    {"kind": "exact", "num_directions": 64},
]
BASELINES = (
    *("random", "structured_random", "longest", "highest_loss", "lowest_loss", "greedi"),
    "mean_matching",
)


def quality(data: Path | None, batches: int, smoke: bool) -> list[Row]:
    """Judge each kind of features and each baseline: means over several candidate batches.

    smoke: 2 blocks instead of 12, short examples, no training before, three kinds of features.
    """
    single_process()
    kinds = SMOKE if smoke else FEATURES
    task, rows, _ = prepared(data, 64 if smoke else 192)
    model = decoder(32, 2, seed=0) if smoke else decoder(192, 12, seed=0)
    engine = first_order(model, task, rows, batch=32, micro=32, lr=1e-3, seed=0, selector=None)
    for _ in range(0 if smoke else 60):
        engine.train_batch()
    model.eval()
    found: dict[tuple[str, int], list[Row]] = {}
    for number, ids in enumerate(
        epoch_order(len(rows), CANDIDATES, seed=5, epoch=0)[:batches].tolist()
    ):
        for name, m, row in judged_batch(model, task, sorted(ids), rows, number, kinds):
            found.setdefault((name, m), []).append(row)
        print(f"batch {number + 1} of {batches}", file=sys.stderr)
    table = []
    for (name, m), of_batches in found.items():
        means = {key: statistics.mean(row[key] for row in of_batches) for key in of_batches[0]}
        agreements = [row["agreement"] for row in of_batches]
        table.append(
            {"part": "quality", "features": name, "m": m, **means, "agreements": agreements}
        )
    return table


def judged_batch(
    model: Any, task: Any, ids: list[int], rows: Any, number: int, kinds: Sequence[Row]
) -> list[tuple[str, int, Row]]:
    """Judge on one candidate batch. Returns rows of (features or baseline, m, its figures).

    First facility location runs on features alone. It is given no sources, so that nothing but the
    features decides. Then the selector, with sources, runs on exact features of 64 directions, and
    the baselines run.
    """
    of_batch = [rows[i] for i in ids]
    chunks = in_chunks(of_batch, task)
    oracle = fl.lazy_greedy(fl.from_features(true_gradients(model, chunks)), BUDGET).ids
    forward = statistics.median(forward_seconds(model, chunks) for _ in range(3))
    prefix = statistics.median(prefix_seconds(model, chunks) for _ in range(3))
    mean = mean_gradient(model, task, of_batch, range(CANDIDATES), [1.0] * CANDIDATES)
    judged = []

    def judge(
        name: str,
        m: int,
        chosen: Sequence[int],
        weights: Sequence[float],
        seconds: float | None = None,
    ) -> None:
        chance = BUDGET / CANDIDATES
        gradient = mean_gradient(model, task, of_batch, chosen, weights)
        row = {
            "agreement": (len(set(chosen) & set(oracle)) / BUDGET - chance) / (1 - chance),
            "relative_error": float((gradient - mean).norm() / mean.norm()),
            "cost_forwards": 0.0 if seconds is None else (seconds - prefix) / forward,
            "total_forwards": 0.0 if seconds is None else seconds / forward,
        }
        judged.append((name, m, row))

    for options in kinds:
        kind, m = options["kind"], options["num_directions"]
        extract = FeatureExtractor(
            model,
            **{
                "rank": 4,
                **{key: value for key, value in options.items() if key != "num_directions"},
            },
        )
        features, losses, timed = torch.empty(CANDIDATES, m), torch.empty(CANDIDATES), []
        for _ in range(3 if kind == "exact" else 1):
            began = time.perf_counter()
            for positions, chunk in chunks:
                features[positions], losses[positions] = extract(
                    chunk, list(range(number * 10**6, number * 10**6 + m))
                )
            timed.append(time.perf_counter() - began)
        largest = float(features.abs().max())
        batch = CandidateBatch(
            ids,
            [row_tokens(r) for r in of_batch],
            losses=losses,
            largest=largest,
            features=fl.quantised(features, largest),
        )
        metric = "l1" if kind == "paper" else "l2"
        config = SelectorConfig(candidates=CANDIDATES, num_clusters=1, features=kind, metric=metric)
        chosen, _, _ = Selector(config, BUDGET, seed=number, target=extract.target).select(batch)
        variant = (
            ", one-sided"
            if not options.get("two_sided", True)
            else ", rank 1"
            if "rank" in options
            else ""
        )
        judge(kind + variant, m, chosen, [1.0] * BUDGET, statistics.median(timed))
        if (kind, variant, m) == ("exact", "", 64):
            best = fl.lazy_greedy(fl.from_features(features), BUDGET)
            judge("exact, cluster weights", m, best.ids, best.weights, statistics.median(timed))
            with_sources = replace(batch, sources=[r["source"] for r in of_batch])
    for strategy in ("greedy", *BASELINES):
        for weighting in ("uniform", "cluster") if strategy == "greedy" else ("uniform",):
            config = SelectorConfig(candidates=CANDIDATES, strategy=strategy, weights=weighting)
            chosen, weights, _ = Selector(config, BUDGET, seed=number, num_parts=4).select(
                with_sources
            )
            label = f"exact, by source, {weighting} weights" if strategy == "greedy" else strategy
            judge(label, 64 if NEEDS[strategy] == "features" else 0, chosen, weights)
    judge("whole gradients", 0, oracle, [1.0] * BUDGET)
    return judged


def row_tokens(row: Row) -> int:
    return len(row["input_ids"])


def without_labels(chunk: Row) -> Row:
    return {"use_cache": False, **{key: value for key, value in chunk.items() if key != "labels"}}


def in_chunks(rows: Sequence[Row], task: Any, size: int = 16) -> list[tuple[list[int], Row]]:
    """Chunks of rows of similar length: (positions in `rows`, collated rows)."""
    order = sorted(range(len(rows)), key=lambda i: -row_tokens(rows[i]))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return [(part, task.collate([rows[i] for i in part])) for part in parts]


def true_gradients(model: torch.nn.Module, chunks: Sequence[tuple[list[int], Row]]) -> Tensor:
    """The gradient of each example's loss by the matrix that the features are about.

    Autograd runs over the whole model, one example at a time. Returns (examples, elements).
    """
    weight = find_target(model).module.weight
    found = torch.empty(sum(len(positions) for positions, _ in chunks), weight.numel())
    for positions, chunk in chunks:
        for k, position in enumerate(positions):
            one = {key: value[k : k + 1] for key, value in chunk.items()}
            loss = example_losses(model(**without_labels(one)).logits, one["labels"]).sum()
            found[position] = torch.autograd.grad(loss, weight)[0].flatten()
    return found


def mean_gradient(
    model: Any, task: Any, rows: Sequence[Row], chosen: Sequence[int], weights: Sequence[float]
) -> Tensor:
    """The gradient of the weighted mean loss of the chosen examples, by all parameters."""
    model.zero_grad()
    weight_of = dict(zip(chosen, weights, strict=True))
    for positions, chunk in in_chunks([rows[i] for i in chosen], task):
        losses = example_losses(model(**without_labels(chunk)).logits, chunk["labels"])
        w = torch.tensor([weight_of[list(chosen)[i]] for i in positions])
        ((losses * w).sum() / sum(weights)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@torch.no_grad()
def forward_seconds(model: Any, chunks: Sequence[tuple[list[int], Row]]) -> float:
    """The time of the whole model's forward and of the loss."""
    began = time.perf_counter()
    for _, chunk in chunks:
        example_losses(model(**without_labels(chunk)).logits, chunk["labels"])
    return time.perf_counter() - began


@torch.no_grad()
def prefix_seconds(model: Any, chunks: Sequence[tuple[list[int], Row]]) -> float:
    """The time of all blocks but the last. They run once for any features."""
    model.config.num_hidden_layers -= 1
    began = time.perf_counter()
    for _, chunk in chunks:
        model.model(
            **{key: value for key, value in without_labels(chunk).items() if key != "labels"}
        )
    seconds = time.perf_counter() - began
    model.config.num_hidden_layers += 1
    return seconds
