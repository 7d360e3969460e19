"""Where selection pays: first-order training on spoilt and uneven data, a part of
`benchmarks/selection.py`.

A recipe makes training data from clean examples. Each arm chooses from the same candidates and
trains for the same number of seconds of processor time, selection included. It is judged by the
loss on held-out examples that no recipe touched. The arms "target" know a few more clean examples
of the sources by which they are judged.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from selection_models import TOKENIZER, Row, chosen_by, decoder, first_order, manual, single_process

from zods.tasks import build_task, load_examples

TEXT_COLUMNS = {"prompt_column": "instruction", "response_column": "output"}
ARMS: dict[str, Row] = {
    "structured random": chosen_by("structured_random"),
    "random": chosen_by("random"),
    "highest loss": chosen_by("highest_loss"),
    "lowest loss": chosen_by("lowest_loss"),
    "mean matching": chosen_by("mean_matching"),
    "facility location": chosen_by("greedy"),
    "facility location, cluster weights": chosen_by("greedy", weights="cluster"),
    "facility location, hidden states": chosen_by("greedy", features="hidden_states"),
    "target": chosen_by("target"),
    "target, hidden states": chosen_by("target", features="hidden_states"),
}
BASELINE = "structured random"
NUM_TARGETS = 8  # of each source


# --- the recipes: each returns training rows, drawn from clean rows by source ---------------------

BySource = dict[str, list[Row]]


def clean(rows: BySource, size: int, draw: random.Random) -> list[Row]:
    """The same number of clean examples of each source."""
    return [row for of_source in rows.values() for row in drawn(of_source, size // len(rows), draw)]


def label_noise(rows: BySource, size: int, draw: random.Random) -> list[Row]:
    """`clean`, with the responses of 40% of the examples permuted inside their source."""
    found: list[Row] = []
    for of_source in rows.values():
        own = drawn(of_source, size // len(rows), draw)
        spoilt = draw.sample(range(len(own)), round(0.4 * len(own)))
        outputs = [own[i]["output"] for i in spoilt]
        for i, output in zip(spoilt, outputs[1:] + outputs[:1], strict=True):
            own[i] = {**own[i], "output": output}
        found += own
    return found


def rare_target(rows: BySource, size: int, draw: random.Random) -> list[Row]:
    """One example in twenty is of the target, the last source. The others share the rest."""
    others, target = list(rows)[:-1], list(rows)[-1]
    counts = {name: size * 19 // 20 // len(others) for name in others} | {target: size // 20}
    return [row for name, count in counts.items() for row in drawn(rows[name], count, draw)]


def redundancy(rows: BySource, size: int, draw: random.Random) -> list[Row]:
    """Nine in ten examples are near-copies of a few: one word of their instruction is left out."""
    found: list[Row] = []
    for of_source in rows.values():
        count = size // len(rows)
        own = drawn(of_source, count - count * 9 // 10, draw)
        few = own[: max(1, len(own) // 10)]
        found += own + [without_a_word(draw.choice(few), draw) for _ in range(count - len(own))]
    return found


def without_a_word(row: Row, draw: random.Random) -> Row:
    words = row["instruction"].split(" ")
    if len(words) > 1:
        words.pop(draw.randrange(len(words)))
    return {**row, "instruction": " ".join(words)}


def drawn(rows: Sequence[Row], count: int, draw: random.Random) -> list[Row]:
    """Random rows, each once where there are enough."""
    return draw.sample(rows, count) if count <= len(rows) else draw.choices(rows, k=count)


@dataclass(frozen=True)
class Recipe:
    """Data, and how much of it a step takes.

    candidates, budget: a step is made with `budget` of `candidates` examples. last_source_only:
    the arms are compared by the held-out loss of the last source; else by the mean over sources.
    """

    make: Callable[[BySource, int, random.Random], list[Row]]
    candidates: int = 128
    budget: int = 32
    last_source_only: bool = False


RECIPES = {
    "label noise": Recipe(label_noise),
    "rare target": Recipe(rare_target, candidates=160, budget=8, last_source_only=True),
    "redundancy": Recipe(redundancy),
    "clean and balanced": Recipe(clean),
}


# --- training -------------------------------------------------------------------------------------


def recipes(
    data: Path | None,
    seconds: float,
    seeds: int,
    smoke: bool,
    names: Sequence[str] = tuple(RECIPES),
    arms: Sequence[str] = tuple(ARMS),
) -> list[Row]:
    """Train arms on recipes, and print a table of held-out losses to stderr.

    seconds: of each training. names: of the recipes. smoke: one step on short examples, two arms, a
    smaller model.
    """
    single_process()
    if smoke:
        arms = ("target", BASELINE)
    found = []
    for seed in range(seeds):
        train, held_out, target = split(data, 8 if smoke else 48, seed)
        for recipe_name in names:
            recipe = RECIPES[recipe_name]
            rows = recipe.make(train, 320 if smoke else 1280, random.Random(seed))
            random.Random(seed).shuffle(rows)
            judged = list(target)[-1:] if recipe.last_source_only else list(target)
            target_rows = [row for name in judged for row in target[name]]
            data_of_recipe = prepared_data(rows, held_out, target_rows, 64 if smoke else 128)
            for arm in arms:
                model = decoder(32, 2, seed) if smoke else pretrained()
                row = trained(
                    model, recipe, data_of_recipe, ARMS[arm], 1e-9 if smoke else seconds, seed
                )
                found.append(
                    {"part": "recipes", "recipe": recipe_name, "arm": arm, "seed": seed, **row}
                )
                print(found[-1], file=sys.stderr, flush=True)
    print(table_of(found), file=sys.stderr)
    return found


def split(data: Path | None, held_out: int, seed: int) -> tuple[BySource, BySource, BySource]:
    """Split the clean rows of each source: (for training, `held_out` or fewer held out, targets).

    The sources are in the order of their size, the largest first. Sources of fewer than 50 rows are
    left out.
    """
    rows = manual() if data is None else load_examples(file=data, seed=0).to_list()
    by_source: BySource = {}
    for row in rows:
        by_source.setdefault(row["source"], []).append(row)
    large = {name: of_source for name, of_source in by_source.items() if len(of_source) >= 50}
    ordered = sorted(large.items(), key=lambda item: (-len(item[1]), item[0]))
    train: BySource = {}
    test: BySource = {}
    target: BySource = {}
    for name, of_source in ordered:
        random.Random(f"{seed} {name}").shuffle(of_source)
        count = min(held_out, len(of_source) // 4)
        test[name], rest = of_source[:count], of_source[count:]
        target[name], train[name] = rest[:NUM_TARGETS], rest[NUM_TARGETS:]
    return train, test, target


@dataclass(frozen=True)
class PreparedData:
    """The task, the tokenized training rows with their source, target rows, and held-out rows by
    source.
    """

    task: Any
    train: Any
    target: Any
    held_out: dict[str, Any]


def prepared_data(
    rows: list[Row], held_out: BySource, target: list[Row], max_length: int
) -> PreparedData:
    raw = datasets.Dataset.from_list(rows)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    of_model = {"num_embeddings": 2048, "has_token_types": False, "class_names": None}
    task = build_task(
        "instruction", tokenizer, raw, max_length=max_length, **of_model, **TEXT_COLUMNS
    )
    return PreparedData(
        task,
        task.prepare(raw).add_column("source", raw["source"]),
        task.prepare(datasets.Dataset.from_list(target)),
        {
            name: task.prepare(datasets.Dataset.from_list(of_source))
            for name, of_source in held_out.items()
        },
    )


def trained(
    model: torch.nn.Module,
    recipe: Recipe,
    data: PreparedData,
    selector: Row,
    seconds: float,
    seed: int,
) -> Row:
    """Train for `seconds`, at least one step. Returns steps, seconds and held-out losses."""
    engine = first_order(
        model,
        data.task,
        data.train,
        batch=recipe.budget,
        micro=min(16, recipe.budget),
        lr=1e-3,
        seed=seed,
        selector={**selector, "candidates": recipe.candidates},
        target=data.target if selector["strategy"] == "target" else None,
    )
    spent = selecting = 0.0
    while spent < seconds:
        began = time.process_time()
        engine.train_batch()
        spent += time.process_time() - began
        selecting += engine.last_step.selection_seconds
    losses = {
        name: engine.evaluate(rows, data.task.collate_eval, data.task.measure)["loss"]
        for name, rows in data.held_out.items()
    }
    judged = list(losses.values())[-1:] if recipe.last_source_only else list(losses.values())
    return {
        "steps": engine.global_steps,
        "seconds": spent,
        "selection_seconds": selecting,
        "loss": statistics.mean(judged),
        "losses": losses,
    }


def pretrained() -> torch.nn.Module:
    """The quickstart's decoder of 4 blocks."""
    return transformers.AutoModelForCausalLM.from_pretrained(TOKENIZER, dtype=torch.float32)


def table_of(rows: Sequence[Row]) -> str:
    """A Markdown table: mean held-out loss, and the range over seeds of its difference from
    structured random (below 0: better)."""
    lines = ["| recipe | arm | loss | less structured random | steps |", "|---|---|---|---|---|"]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        of_recipe = [row for row in rows if row["recipe"] == recipe]
        base = {row["seed"]: row["loss"] for row in of_recipe if row["arm"] == BASELINE}
        for arm in dict.fromkeys(row["arm"] for row in of_recipe):
            own = [row for row in of_recipe if row["arm"] == arm]
            less = [row["loss"] - base[row["seed"]] for row in own]
            loss, steps = (statistics.mean(row[key] for row in own) for key in ("loss", "steps"))
            lines.append(
                f"| {recipe} | {arm} | {loss:.3f} | {min(less):+.3f} to {max(less):+.3f} | "
                f"{steps:.0f} |"
            )
    return "\n".join(lines)
