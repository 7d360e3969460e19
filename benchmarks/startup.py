"""Measure the share of a start that goes into digests of the data, the weights and the code.

    python benchmarks/startup.py [--examples N] [--layers N]

Starts the command line on one rank, with a model of random weights (OPT, width 1,024) and examples
of one sentence. The first start tokenises the examples, the second reads them from the cache of
`datasets`. Times are of the processor. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import add_smoke_option, free_port, machine

REPOSITORY = Path(__file__).parents[1]
TOKENIZER = REPOSITORY / "launch" / "quickstart" / "model"


def write_inputs(folder: Path, examples: int, layers: int, width: int) -> None:
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    OPTForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "model")
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for i in range(examples):
            text = (
                f"return the value of {i} in the table of {i * 7919 % 100003} numbers, then go on"
            )
            file.write(json.dumps({"text": text, "label": ("code", "text")[i % 2]}) + "\n")
    section = {"method": "mezo"}
    ds = {"train_batch_size": 8, "zero_optimization": {"stage": 3}, "zeroth_order": section}
    (folder / "config.json").write_text(json.dumps(ds))


def start(folder: Path) -> None:
    """Start the command line in this process, and print the times."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(free_port()), DS_ACCELERATOR="cpu")
    import zods.finetune
    from zods.cli.arguments import parse_arguments
    from zods.data.digest import ExampleDigests
    from zods.training import description, rank_agreement

    spent: dict[str, float] = {"data": 0.0, "weights": 0.0, "code": 0.0}

    def measure(owner: Any, name: str, kind: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[kind] += time.process_time() - began

        setattr(owner, name, measured)

    measure(ExampleDigests, "__init__", "data")
    measure(ExampleDigests, "digest", "data")
    measure(rank_agreement, "fingerprint", "weights")
    measure(description, "fingerprint", "weights")
    measure(rank_agreement, "code_in_use", "code")
    measure(zods.finetune, "tokenizer_digest", "code")
    command = {
        "deepspeed_config": folder / "config.json",
        "model": folder / "model",
        "output_dir": Path(tempfile.mkdtemp(dir=folder)) / "run",
        "task": "prompted",
        "template": r"{text}\nKind: {label}",
        "train_file": folder / "train.jsonl",
        "max_length": 64,
        "max_steps": 1,
    }
    words = [word for name, value in command.items() for word in (f"--{name}", str(value))]
    engine = zods.finetune.start(parse_arguments(words))[0]
    whole = time.process_time()  # with the imports
    engine.close()
    print(json.dumps({"start_s": whole, **{f"{kind}_s": value for kind, value in spent.items()}}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)  # the measured process
    add_smoke_option(parser)
    arguments = parser.parse_args()
    if arguments.start is not None:
        start(arguments.start)
        return
    if arguments.smoke:
        arguments.examples, arguments.layers = 64, 1
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, arguments.examples, arguments.layers, 64 if arguments.smoke else 1024)
        weights = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        for tokenised in (False, True):
            command = [sys.executable, __file__, "--start", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            digests = row["data_s"] + row["weights_s"] + row["code_s"]
            rows.append({"tokenised": tokenised, **row, "share": digests / row["start_s"]})
    head = {"benchmark": "startup", "machine": machine(), "examples": arguments.examples}
    print(json.dumps({**head, "model_bytes": weights, "rows": rows}))


if __name__ == "__main__":
    main()
