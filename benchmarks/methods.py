"""Compare methods on prompted classification, at equal numbers of forwards and with several seeds.

    python benchmarks/methods.py [--tasks quickstart] --model SMOLLM2 --data DATA --json FILE.json

DATA has the folders sst2 (train.tsv, dev.tsv), trec and ag_news (train.jsonl, test.jsonl). The task
quickstart needs neither --model nor --data. A task whose folder is missing is left out. All runs
are made in this process, on one rank without sharding. An interrupted command continues from
--json. --label_noise and --late are for the regime of many noisy labels, late in training.

A variant is a method with each of --examples_per_direction, --direction and --normalize. For each
variant, every step size of a grid is tried with one seed (rows of kind "grid"); the one with the
lowest training loss is used with all seeds (kind "tuned"), and so is the default of zods (kind
"default", for steps that are normalized), which measures its step size. The forwards of that
measurement are counted, and the run has fewer steps. A forward is that of one example. A step of
MeZO has 2 per example of its batch, one of MeZO-SVRG 4, a refresh 2 per training example, and a
step of AdamW counts 3 per example, because its backward costs about 2.

--study adds measurements of the gradient and of the curvature to each point of a run's curve (not
of LoRA's), see `methods_study.py`. Prints one JSON object. --markdown and --picture write tables
(`methods_report.py`) and curves.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import (
    Report,
    add_report_options,
    add_smoke_option,
    measuring_forwards,
    report_head,
    single_rank_engine,
)
from methods_report import FIRST_ORDER, forwards_per_example, picture, tables
from methods_study import Study
from methods_tasks import TASKS, Bench, load_bench

from zods.config.schema import ZerothOrderConfig
from zods.data.loader import TrainingLoader
from zods.tasks import over_label_words
from zods.training.engine import ZerothOrderEngine

# MeZO-SVRG: K directions of a refresh, each on its own part of the training examples
SVRG = {"method": "mezo_svrg", "anchor_directions": 64}
METHODS: dict[str, dict[str, Any]] = {
    "mezo": {"method": "mezo"},
    "svrg": SVRG,
    "svrg_auto": {**SVRG, "anchor_weight": "auto"},
    # The published code of MeZO-SVRG draws a direction for each of the two estimates of a step.
    "svrg_published": {**SVRG, "share_direction": False},
    "adamw": {},
    "lora": {},
}
GRIDS = {
    "plain": (7.5e-4, 1.5e-3, 3e-3, 6e-3),
    "normalized": (1e-3, 2e-3, 4e-3, 8e-3),
    "adamw": (1e-5, 3e-5, 1e-4),
    "lora": (1e-4, 3e-4, 1e-3),
}
MEASURING = 1700  # forwards, about, that zods measures a step size with
DIVERGED = 1.5  # a run ends where its training loss is this many times the one before training


@dataclass(frozen=True)
class Run:
    """The settings of one run.

    objective: of zeroth-order steps, "loss" or "candidates". lr: the step size; None: the default of
    zods.
    """

    task: str
    method: str
    examples_per_direction: int | str
    direction: str
    normalize: bool
    decay: bool
    objective: str
    batch: int
    interval: int
    lr: float | None
    seed: int
    forwards: int

    @property
    def variant(self) -> str:
        """The method's settings, for tables and legends."""
        if self.method in FIRST_ORDER:
            return self.method
        words = [self.method, f"E={self.examples_per_direction}", self.direction, f"B={self.batch}"]
        words += ["normalize"] * self.normalize + ["decay"] * self.decay
        return " ".join(words + [self.objective] * (self.objective != "loss"))

    @property
    def name(self) -> str:
        return f"{self.task} {self.variant} lr={self.lr} seed={self.seed} forwards={self.forwards}"

    @property
    def is_svrg(self) -> bool:
        return self.method.startswith("svrg")

    @property
    def is_measured(self) -> bool:
        """Whether zods measures the step size."""
        return self.lr is None and self.method not in FIRST_ORDER

    def section(self) -> dict[str, Any]:
        """The section "zeroth_order" of the configuration."""
        section = {
            **METHODS[self.method],
            "direction": self.direction,
            "examples_per_direction": self.examples_per_direction,
            "normalize": self.normalize,
            "objective": self.objective,
            "evaluation": "stacked",
            "seed": self.seed,
        }
        if self.is_svrg:
            section |= {"anchor_interval": self.interval}
        return {**section, "lr": ZerothOrderConfig().lr if self.lr is None else self.lr}

    def forwards_of_step(self, step: int, num_train: int) -> int:
        is_refresh = self.is_svrg and step % self.interval == 0
        of_batch = forwards_per_example(self.method) * self.batch
        return of_batch + (2 * num_train if is_refresh else 0)

    def num_steps(self, num_train: int) -> int:
        """The number of steps that the forwards allow, at least 1."""
        step, left = 0, self.forwards - (MEASURING if self.is_measured else 0)
        while (left := left - self.forwards_of_step(step, num_train)) >= 0:
            step += 1
        return max(step, 1)


def zeroth_order(run: Run, bench: Bench) -> tuple[ZerothOrderEngine, Callable[[], float]]:
    """An engine, and the call that makes a step and returns its loss."""
    schedule = {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_max_lr": "auto",
            "warmup_num_steps": 2,
            "total_num_steps": run.num_steps(len(bench.train)) + 1,
        },
    }
    engine = single_rank_engine(
        bench.restore(),
        run.section(),
        bench.train,
        bench.collate,
        train_batch_size=run.batch,
        bf16={"enabled": next(bench.model.parameters()).dtype == torch.bfloat16},
        **({"scheduler": schedule} if run.decay else {}),
    )
    return engine, engine.train_batch


def first_order(run: Run, bench: Bench) -> tuple[torch.nn.Module, Callable[[], float]]:
    """A float32 copy of the model, and the call that makes a step of AdamW."""
    model = copy.deepcopy(bench.restore()).float()
    if run.method == "lora":
        import peft

        adapter = peft.LoraConfig(r=8, lora_alpha=16, target_modules=r".*_proj")
        model = peft.get_peft_model(model, adapter)  # type: ignore[arg-type,assignment]
    loader = TrainingLoader(
        bench.train,  # type: ignore[arg-type]
        micro_batch=run.batch,
        accumulation=1,
        rank=0,
        world_size=1,
        seed=run.seed,
        collate_fn=bench.collate,
    )
    batches = loader.forever()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.lr or 1e-4, weight_decay=0.0)

    def step() -> float:
        loss = model(**next(batches)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, step


def measured(run: Run, bench: Bench, points: int, study: Study | None) -> dict[str, Any]:
    """Make a run and return its row.

    points: number of times that the training loss is measured. seconds: of the steps alone.
    """
    if run.objective == "candidates":
        bench = replace(bench, task=over_label_words(bench.task))
    make = first_order if run.method in FIRST_ORDER else zeroth_order
    forward, step = make(run, bench)
    num_steps = run.num_steps(len(bench.train))
    due = {round(num_steps * (k + 1) / points) for k in range(points)}
    forwards, times, curve = 0, [0.0], []

    def add_point() -> float:
        forward.eval()
        loss = bench.loss(forward, bench.train[:NUM_MEASURED])
        found = {} if study is None or run.method == "lora" else study.at(forward)
        curve.append(
            {"forwards": forwards, "seconds": round(sum(times), 2), "train_loss": loss, **found}
        )
        return loss

    before = add_point()
    if run.is_measured:
        forwards += MEASURING
    for k in range(num_steps):
        began = time.perf_counter()
        try:
            step()
        except RuntimeError as error:  # too many losses are not finite
            print(error, file=sys.stderr)
            curve.append({**curve[-1], "forwards": forwards, "train_loss": math.inf})
            break
        times.append(time.perf_counter() - began)
        forwards += run.forwards_of_step(k, len(bench.train))
        if k + 1 in due and not add_point() < DIVERGED * before:
            break
    row = {
        **asdict(run),
        "run": run.name,
        "variant": run.variant,
        "forwards": forwards,
        "steps": num_steps,
        "seconds": round(sum(times), 2),
        "step_seconds": round(statistics.median(times[1:] or times), 4),
        "diverged": not curve[-1]["train_loss"] < DIVERGED * before,
        "train_loss": finite(curve[-1]["train_loss"]),
        "held_out_loss": finite(bench.loss(forward, bench.held_out)),
        "accuracy": bench.accuracy(forward, bench.held_out),
        "curve": [{**point, "train_loss": finite(point["train_loss"])} for point in curve],
    }
    if isinstance(forward, ZerothOrderEngine):
        row["lr"] = run.lr
        if run.is_measured:
            found = forward.recorder.step_size
            assert found is not None
            row["lr"], row["lr_measured"] = found.lr, found.to_json()
            spent = measuring_forwards(found, forward.config.zeroth_order.eps)
            row["forwards"] += spent - MEASURING
        forward.close()
    return row


NUM_MEASURED = 256  # training examples whose loss is measured


def finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def variants(arguments: argparse.Namespace, task: str) -> Iterator[Run]:
    """The variants, without step size and seed."""
    plain = Run(
        task=task,
        method="",
        examples_per_direction="all",
        direction="gaussian",
        normalize=False,
        decay=False,
        objective="loss",
        batch=0,
        interval=arguments.interval,
        lr=None,
        seed=arguments.tuning_seed,
        forwards=arguments.forwards,
    )
    for method, batch in itertools.product(arguments.methods, arguments.batch):
        of_method = replace(plain, method=method, batch=batch)
        if method in FIRST_ORDER:
            yield of_method
            continue
        for direction, size, normalize, decay, objective in itertools.product(
            arguments.direction,
            arguments.examples_per_direction,
            arguments.normalize,
            arguments.decay,
            arguments.objective,
        ):
            yield replace(
                of_method,
                direction=direction,
                examples_per_direction=size,
                normalize=normalize,
                decay=decay,
                objective=objective,
            )


def train_before(bench: Bench, arguments: argparse.Namespace) -> None:
    """Train by the default of zods, so that all runs begin late in training."""
    run = Run(
        task=bench.name,
        method="mezo",
        examples_per_direction=1,
        direction="low_rank",
        normalize=True,
        decay=True,
        objective="loss",
        batch=16,
        interval=0,
        lr=None,
        seed=arguments.tuning_seed,
        forwards=arguments.late,
    )
    engine, step = zeroth_order(run, bench)
    for _ in range(run.num_steps(len(bench.train))):
        step()
    engine.close()
    bench.base = {name: param.detach().clone() for name, param in bench.model.named_parameters()}


def grid(run: Run) -> tuple[float, ...]:
    """The step sizes that are tried for a variant."""
    if run.method in FIRST_ORDER:
        return GRIDS[run.method]
    return GRIDS["normalized" if run.normalize else "plain"]


def make_rows(arguments: argparse.Namespace, bench: Bench, report: Report) -> None:
    """Make the rows of all variants of one task."""
    study = Study(bench, arguments.study_examples) if arguments.study else None

    def row_of(run: Run, kind: str) -> dict[str, Any]:
        name = f"{kind}: {run.name}"
        row = report.done(name)
        if row is None:
            row = {**measured(run, bench, arguments.points, study), "run": name, "kind": kind}
            row["tuned"] = kind == "tuned"
        report.add(row)
        shown = {key: row[key] for key in ("lr", "train_loss", "accuracy", "seconds")}
        print(f"{name}: {shown}", file=sys.stderr, flush=True)
        return row

    for variant in variants(arguments, bench.name):
        if "default" in arguments.kinds and variant.normalize:
            for seed in arguments.seeds:
                row_of(replace(variant, seed=seed), "default")
        if "tuned" not in arguments.kinds and "grid" not in arguments.kinds:
            continue
        tried = replace(variant, forwards=arguments.tuning_forwards or arguments.forwards)
        rows = [row_of(replace(tried, lr=lr), "grid") for lr in arguments.lr or grid(variant)]
        best = min(rows, key=lambda row: math.inf if row["diverged"] else row["train_loss"])
        if "tuned" in arguments.kinds:
            for seed in arguments.seeds:
                row_of(replace(variant, lr=best["lr"], seed=seed), "tuned")


def size_of_group(text: str) -> int | str:
    return text if text == "all" else int(text)


def flag(text: str) -> bool:
    return {"true": True, "false": False}[text]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, help="folder with sst2, trec, ag_news")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--examples_per_direction", nargs="+", type=size_of_group, default=["all", 1]
    )
    parser.add_argument("--direction", nargs="+", default=["low_rank"])
    parser.add_argument("--normalize", nargs="+", type=flag, default=[False, True])
    parser.add_argument("--objective", nargs="+", choices=("loss", "candidates"), default=["loss"])
    parser.add_argument("--decay", nargs="+", type=flag, default=[False], help="linear, to 0")
    parser.add_argument("--batch", nargs="+", type=int, default=[16])
    parser.add_argument("--interval", type=int, default=100, help="steps between two refreshes")
    parser.add_argument(
        "--kinds", nargs="+", choices=("grid", "tuned", "default"), default=["tuned", "default"]
    )
    parser.add_argument("--lr", nargs="+", type=float, help="in place of the grids")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--tuning_seed", type=int, default=0)
    parser.add_argument("--forwards", type=int, default=16_000, help="of a run")
    parser.add_argument("--tuning_forwards", type=int, help="of a run of a grid; default: as many")
    parser.add_argument("--points", type=int, default=8, help="measured points of a curve")
    parser.add_argument("--train_examples", type=int, default=1000)
    parser.add_argument("--held_out_examples", type=int, default=400)
    parser.add_argument(
        "--label_noise", type=float, default=0.0, help="share of training labels to permute"
    )
    parser.add_argument(
        "--late",
        type=int,
        default=0,
        help="forwards of the default of zods, with batch 16 and decay, before every run",
    )
    parser.add_argument("--blocks", type=int, help="train the matrices of the last blocks only")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--study", action="store_true", help="measure gradient and curvature, too")
    parser.add_argument("--study_examples", type=int, default=256)
    parser.add_argument("--picture", type=Path, help="write the curves there (PNG)")
    add_report_options(parser)
    add_smoke_option(parser)
    return parser.parse_args()


def left_out(task: str, arguments: argparse.Namespace) -> str | None:
    """Why a task is left out; None where it is not."""
    if task == "quickstart":
        return None
    if arguments.model is None or arguments.data is None:
        return "it needs --model and --data"
    folder = arguments.data / task
    return None if folder.is_dir() else f"{folder} is missing"


def main() -> None:
    arguments = parse_arguments()
    if arguments.smoke:
        arguments.tasks, arguments.seeds, arguments.lr = ["quickstart"], [1], [1e-3]
        arguments.methods, arguments.normalize = ["mezo", "svrg_auto", "adamw"], [True]
        arguments.forwards, arguments.points, arguments.interval = 160, 1, 2
        arguments.train_examples, arguments.held_out_examples = 32, 8
        arguments.label_noise, arguments.late = 0.5, 32
        arguments.batch, arguments.blocks, arguments.examples_per_direction = [8], 1, [1]
        arguments.study, arguments.study_examples, arguments.kinds = True, 2, ["tuned"]
    report = Report(
        report_head("methods", arguments), arguments.json, key="run", passed=lambda row: True
    )
    for task in arguments.tasks:
        if reason := left_out(task, arguments):
            print(f"{task} is left out: {reason}", file=sys.stderr)
            continue
        bench = load_bench(
            task,
            arguments.model,
            arguments.data,
            num_train=arguments.train_examples,
            num_held_out=arguments.held_out_examples,
            blocks=arguments.blocks,
            dtype=getattr(torch, arguments.dtype),
            label_noise=arguments.label_noise,
        )
        if arguments.late:
            train_before(bench, arguments)
        make_rows(arguments, bench, report)
    print(tables(report.rows), file=sys.stderr)
    if arguments.markdown is not None:
        arguments.markdown.write_text(f"# Methods\n\n{tables(report.rows)}")
    if arguments.picture is not None:
        picture(report.rows, arguments.picture)
    report.print_and_exit()


if __name__ == "__main__":
    main()
