"""Run the quickstart's job with several seeds and methods.

    python benchmarks/quickstart.py [--seeds 1 2 3] [--methods mezo mezo_svrg]

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import add_smoke_option, machine

from zods.cli.run_folder import read_metrics

TRAIN = Path(__file__).parents[1] / "launch" / "quickstart" / "train.sh"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=["mezo"])
    add_smoke_option(parser)
    arguments = parser.parse_args()
    short = (
        ("--max_steps", "2", "--eval_interval", "0", "--max_eval_examples", "8")
        if arguments.smoke
        else ()
    )
    if arguments.smoke:
        arguments.seeds = arguments.seeds[:1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for method in arguments.methods:
            for seed in arguments.seeds:
                run = Path(folder) / f"{method}-{seed}"
                command = ["bash", str(TRAIN), str(run)]
                command += ["--seed", str(seed), "--method", method, *short]
                subprocess.run(command, check=True, stdout=sys.stderr)
                summary = next(
                    record for record in read_metrics(run) if record["kind"] == "summary"
                )
                rows.append(
                    {
                        "method": method,
                        "seed": seed,
                        **{k: v for k, v in summary.items() if k != "kind"},
                    }
                )
    gains = {
        method: statistics.mean(
            r["accuracy_after"] - r["accuracy_before"] for r in rows if r["method"] == method
        )
        for method in arguments.methods
    }
    print(
        json.dumps(
            {
                "benchmark": "quickstart",
                "machine": machine(),
                "mean_accuracy_gain": gains,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
