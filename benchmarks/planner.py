"""Compare the planned time of a step, after calibration, with that of steps of the whole model.

    python benchmarks/planner.py [--output FILE.json]

Under the real launcher with 1 and 2 ranks. Each configuration is measured with one and with three
blocks, as `zods.plan --calibrate` does, and with all blocks. A row has both times of a step of the
whole model and their ratio. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import add_smoke_option, commit, launcher, machine
from transformers import LlamaConfig, OPTConfig

from zods.comm.process import connect_ranks, end_process
from zods.planning.calibration import measured_step_time, step_time_at
from zods.planning.model_shape import model_shape
from zods.planning.proposal import configuration
from zods.planning.setup import read_setup

BATCH, LENGTH, NUM_STEPS = 8, 64, 5
OPT = {"vocab_size": 8192, "word_embed_proj_dim": 512, "hidden_size": 512, "ffn_dim": 2048}
LLAMA = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024}
MODELS = {
    "opt": OPTConfig(**OPT, num_hidden_layers=12, num_attention_heads=8),
    "llama": LlamaConfig(**LLAMA, num_hidden_layers=16, num_attention_heads=6),
}
HOW: dict[str, dict[str, Any]] = {
    "mezo": {},
    "mezo, offloaded to CPU": {"offload": "cpu"},
    "mezo, bf16": {"dtype": "bf16"},
    "mezo_svrg, anchor on CPU": {"method": "mezo_svrg"},
    "mezo_svrg, anchor as terms": {"method": "mezo_svrg", "anchor": "terms"},
    "mezo, 4 micro-batches": {"accumulation": 4},
}


def measure(smoke: bool) -> list[dict[str, Any]]:
    """The rows of one number of ranks. Collective."""
    comm, rows = connect_ranks(), []
    for name, model_config in MODELS.items():
        if smoke:
            model_config.num_hidden_layers = 4
        for how, options in HOW.items():
            arguments = {"dtype": "fp32", **options}
            batch = BATCH // arguments.get("accumulation", 1)
            config = configuration(batch, **arguments)
            dtype = torch.bfloat16 if arguments["dtype"] == "bf16" else torch.float32
            shape = model_shape(name, model_config, dtype)
            setup = read_setup(
                shape, config, world_size=comm.world_size, length=LENGTH, on_gpu=False
            )
            steps = 1 if smoke else NUM_STEPS
            planned = measured_step_time(setup, config, comm, num_steps=steps)
            blocks = model_config.num_hidden_layers
            found = step_time_at(setup, config, blocks, comm, steps)
            row = {"model": name, "how": how, "ranks": comm.world_size}
            rows.append({**row, "planned_s": planned, "step_s": found, "ratio": planned / found})
            if comm.rank == 0:
                print(rows[-1], file=sys.stderr)
            if smoke:
                break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_smoke_option(parser)
    parser.add_argument("--output", type=Path, help="write the JSON object to this file")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # of one number of ranks
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    smoke = ["--smoke"] if arguments.smoke else []
    if arguments.rows is not None:
        rows = measure(arguments.smoke)
        if arguments.local_rank == 0:
            arguments.rows.write_text(json.dumps(rows))
        end_process(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1,) if arguments.smoke else (1, 2):
            found = Path(folder) / f"{ranks}.json"
            command = [*launcher(ranks), __file__, "--rows", str(found), *smoke]
            subprocess.run(command, check=True, stdout=sys.stderr)
            rows += json.loads(found.read_text())
    report = {"benchmark": "planner", "machine": machine(), "commit": commit(), "rows": rows}
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
