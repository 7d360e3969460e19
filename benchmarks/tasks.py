"""Compare zeroth-order training with zero-shot and with AdamW on prompted tasks, through the launcher.

    python benchmarks/tasks.py --model SMOLLM2 --data DATA --json FILE.json

DATA has the folders sst2 (train.tsv and dev.tsv: `sentence<TAB>label`, without a header), trec and
ag_news (train.jsonl, test.jsonl). A run is one launch of `zods.finetune` on one rank, with all
parameters in --dtype, and the prompt and label words that zods declares for the task. AdamW keeps a
copy of the parameters in fp32. The default method has no setting but the batch and the number of
steps; "candidates" is the default with the cross entropy over the label words as objective, as MeZO has
it for classification. AdamW has one fixed step size. No setting is chosen by held-out data. Zero-shot is the
evaluation before the first step. The held-out rows are drawn by the seed, so zero-shot differs
between seeds, too.

All runs of a seed are made before those of the next. An interrupted command continues from --json,
and in the middle of a zeroth-order run where --work is given.

A forward is that of one example. A zeroth-order step has 2 per example of its batch, and the
measurement of its step size is counted. A step of AdamW counts 3 per example, because its backward
costs about 2. Seconds are those of the steps, with that measurement. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import (
    Report,
    add_report_options,
    add_smoke_option,
    launcher,
    measuring_forwards,
    report_head,
)

from zods.cli.run_folder import read_metrics
from zods.config.schema import ZerothOrderConfig
from zods.trajectory.log import read_log
from zods.trajectory.records import StepSize

# Options of a task beside its name. A published TSV of SST-2 without a header has no column names.
TASKS: dict[str, dict[str, str]] = {
    "trec": {},
    "sst2": {"column_names": "sentence,label"},
    "ag_news": {},
}
# AdamW's step size is the middle of the grid of `methods.py`.
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "candidates": {"objective": "candidates"},
    "adamw": {"optimizer": "adamw", "lr": 3e-5},
}
SMOKE_MODEL = Path(__file__).parents[1] / "launch" / "quickstart" / "model"
SMOKE_ROWS = "a fine film\t1\na dull film\t0\n" * 8


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if arguments.smoke:
            make_smaller(arguments, work / "data")
        report = Report(
            report_head("tasks", arguments), arguments.json, key="run", passed=lambda row: True
        )
        if arguments.work is not None:
            work = arguments.work.resolve() / (report.head["commit"] or "unknown")
        work.mkdir(parents=True, exist_ok=True)
        for seed, task, method in itertools.product(
            arguments.seeds, arguments.tasks, arguments.methods
        ):
            name = run_name(task, method, seed, arguments)
            report.add(report.done(name) or measured(name, task, method, seed, work, arguments))
            print(table(report.rows), file=sys.stderr, flush=True)
    if arguments.markdown is not None:
        arguments.markdown.write_text(f"# Prompted tasks\n\n{table(report.rows)}")
    report.print_and_exit()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal LM")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder per task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=250, help="of zeroth-order runs")
    parser.add_argument("--adamw_steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--max_length", type=int, default=64, help="tokens of an example")
    parser.add_argument("--held_out_examples", type=int, default=200)
    add_report_options(parser)
    add_smoke_option(parser)
    arguments = parser.parse_args()
    for task in [] if arguments.smoke else arguments.tasks:
        folder = arguments.data / task
        if not folder.is_dir():
            parser.error(f"--data {arguments.data}: has no folder {task}. Make it, or give --tasks")
    return arguments


def make_smaller(arguments: argparse.Namespace, data: Path) -> None:
    """Change the arguments to those of the smallest size, and write its data into a new folder."""
    arguments.model, arguments.data = SMOKE_MODEL, data
    arguments.tasks, arguments.seeds = ["sst2"], [1]
    # without "candidates": the smoke model's tokenizer makes several tokens of a label word
    arguments.methods = ["default", "adamw"]
    arguments.steps, arguments.adamw_steps, arguments.batch = 2, 2, 4
    (data / "sst2").mkdir(parents=True)
    for part in ("train", "dev"):
        (data / "sst2" / f"{part}.tsv").write_text(SMOKE_ROWS)


def steps_of(method: str, arguments: argparse.Namespace) -> int:
    return arguments.adamw_steps if method == "adamw" else arguments.steps


def run_name(task: str, method: str, seed: int, arguments: argparse.Namespace) -> str:
    """A run's name, with all that decides its result."""
    return (
        f"{task} {method} seed={seed} steps={steps_of(method, arguments)} batch={arguments.batch} "
        f"max_length={arguments.max_length} held_out={arguments.held_out_examples} "
        f"model={arguments.model.name} dtype={arguments.dtype}"
    )


def measured(
    name: str, task: str, method: str, seed: int, work: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Make a run in a folder of `work`, or continue it, and return its row.

    train_loss: mean over the last tenth of the steps, each on its own batch.
    """
    folder = work / name.replace(" ", "-")
    folder.mkdir(exist_ok=True)
    launch(task, method, seed, folder, arguments)
    records = list(read_metrics(folder / "run"))
    summary = next(record for record in records if record["kind"] == "summary")
    made = [record for record in records if record["kind"] == "train"]
    losses = [record["loss"] for record in made]
    steps, lr = summary["steps"], METHODS[method].get("lr")
    forwards = (3 if method == "adamw" else 2) * arguments.batch * steps
    if method != "adamw":
        found = measured_step_size(folder / "run")
        lr = found.lr
        forwards += measuring_forwards(found, ZerothOrderConfig().eps)
    return {
        "run": name,
        "task": task,
        "method": method,
        "seed": seed,
        "lr": lr,
        "steps": steps,
        "batch": arguments.batch,
        "dtype": arguments.dtype,
        "forwards": forwards,
        "seconds": round(sum(record["seconds"] for record in made), 1),
        "step_seconds": statistics.median(record["seconds"] for record in made),
        "train_loss": statistics.mean(losses[-max(1, len(losses) // 10) :]),
        **{
            f"{metric}_{when}": summary[f"{metric}_{when}"]
            for metric in ("loss", "accuracy")
            for when in ("before", "after")
        },
    }


def launch(task: str, method: str, seed: int, folder: Path, arguments: argparse.Namespace) -> None:
    """Make a run in `folder`/run through the launcher."""
    config = {
        "train_batch_size": arguments.batch,
        "zero_optimization": {"stage": 0},
        "bf16": {"enabled": arguments.dtype == "bfloat16"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    options = {
        "deepspeed_config": folder / "config.json",
        "model": arguments.model.resolve(),
        "output_dir": folder / "run",
        "resume": "auto",
        "task": task,
        "data_dir": arguments.data.resolve() / task,
        "max_length": arguments.max_length,
        "max_eval_examples": arguments.held_out_examples,
        "max_steps": steps_of(method, arguments),
        "seed": seed,
        **TASKS[task],
        **METHODS[method],
    }
    command = [*launcher(1), "--module", "zods.finetune"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run(command, check=True, stdout=sys.stderr)


def measured_step_size(run: Path) -> StepSize:
    """The step size that a zeroth-order run measured before its first step."""
    records = read_log(run / "trajectory.log").records
    return next(record for record in records if isinstance(record, StepSize))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of means over seeds, and (lowest to highest) where they differ."""
    columns = ("task", "method", "seeds", "steps", "batch", "forwards", "seconds")
    lines: list[Sequence[str]] = [[*columns, "training loss", "held-out loss", "accuracy"]]
    lines.append(["---"] * len(lines[0]))
    for task, of_task in by(rows, "task").items():
        head = [task, "zero-shot", "-", "0", "-", "0", "0", "-"]
        lines.append([*head, spread(of_task, "loss_before"), spread(of_task, "accuracy_before")])
        for method, found in by(of_task, "method").items():
            lines.append(
                [
                    *(task, method, str(len(found))),
                    *(spread(found, key, digits=0) for key in ("steps", "batch", "forwards")),
                    f"{statistics.mean(row['seconds'] for row in found):.0f}",
                    *(spread(found, key) for key in ("train_loss", "loss_after", "accuracy_after")),
                ]
            )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def by(rows: Sequence[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    """The rows with each value of a key, in the order in which the values come first."""
    return {
        value: [row for row in rows if row[key] == value]
        for value in dict.fromkeys(row[key] for row in rows)
    }


def spread(rows: Sequence[dict[str, Any]], key: str, digits: int = 3) -> str:
    """The mean, and (lowest to highest) where these differ."""
    values = [row[key] for row in rows]
    low, mean, high = (f"{f(values):.{digits}f}" for f in (min, statistics.mean, max))
    return mean if low == high else f"{mean} ({low} to {high})"


if __name__ == "__main__":
    main()
