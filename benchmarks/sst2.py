"""Measure step time and memory per rank of a real language model on prompted SST-2.

    python benchmarks/sst2.py --model SmolLM2-135M --data DATA/sst2

DATA/sst2 holds train.tsv and dev.tsv: `sentence<TAB>label`, without a header. The README's command
runs through the launcher on ZeRO-3 with two ranks and, for comparison, with replicated parameters
on one rank. Each runs in fp32 and in bf16. Prints one JSON object, with the chosen form of
evaluation in each row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import SHARED_DIRECTION, add_smoke_option, launcher, machine

from zods.cli.run_folder import read_metrics

REPOSITORY = Path(__file__).parents[1]
SMOKE_MODEL = REPOSITORY / "launch" / "quickstart" / "model"
SMOKE_ROWS = "a fine film\t1\na dull film\t0\n" * 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    add_smoke_option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.smoke:
            arguments.model, arguments.data, arguments.steps, arguments.batch = (
                SMOKE_MODEL,
                Path(folder),
                2,
                4,
            )
            for part in ("train", "dev"):
                (Path(folder) / f"{part}.tsv").write_text(SMOKE_ROWS)
        cases = [(0, 1, False), (3, 2, False), (0, 1, True), (3, 2, True)][
            : 2 if arguments.smoke else 4
        ]
        rows = [measure(Path(folder), arguments, *case) for case in cases]
    print(
        json.dumps(
            {"benchmark": "sst2", "machine": machine(), "model": arguments.model.name, "rows": rows}
        )
    )


def measure(
    folder: Path, arguments: argparse.Namespace, stage: int, ranks: int, bf16: bool
) -> dict[str, Any]:
    run = folder / f"stage{stage}-{'bf16' if bf16 else 'fp32'}"
    config = run.with_suffix(".json")
    section = {**SHARED_DIRECTION, "method": "mezo", "lr": 1e-6}
    config.write_text(
        json.dumps(
            {
                "train_batch_size": arguments.batch,
                "bf16": {"enabled": bf16},
                "zero_optimization": {"stage": stage},
                "zeroth_order": section,
            }
        )
    )
    options = {
        "deepspeed_config": config,
        "model": arguments.model,
        "output_dir": run,
        "task": "prompted",
        "template": "{sentence} It was {label}",
        "label_words": "terrible,great",
        "train_file": arguments.data / "train.tsv",
        "validation_file": arguments.data / "dev.tsv",
        "column_names": "sentence,label",
        "max_eval_examples": 64,
        "max_steps": arguments.steps,
    }
    command = [*launcher(ranks), "--module", "zods.finetune"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run(command, check=True, stdout=sys.stderr)
    records = list(read_metrics(run))
    summary = next(record for record in records if record["kind"] == "summary")
    first = next(record for record in records if record["kind"] == "train")
    return {
        "stage": stage,
        "ranks": ranks,
        "dtype": "bf16" if bf16 else "fp32",
        "evaluation": summary["evaluation"],
        "first_step_s": first["seconds"],  # includes the choice of the form of evaluation
        "step_s": summary["step_seconds_median"],
        "peak_memory_mib": [round(value / 2**20) for value in summary["peak_memory_bytes"]],
    }


if __name__ == "__main__":
    main()
