"""Helpers of the benchmarks: an engine of one rank, models with random weights, the machine."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import zods
from zods.cli.run_folder import versions
from zods.files import atomic_write
from zods.training import step_size
from zods.training.engine import ZerothOrderEngine
from zods.trajectory.records import StepSize


def add_smoke_option(parser: argparse.ArgumentParser) -> None:
    """Add `--smoke`. Every benchmark has it, because the tests run each benchmark with it."""
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="the smallest size, to see that it runs; its figures mean nothing",
    )


def opt_125m(num_layers: int = 12) -> OPTForCausalLM:
    """OPT-125M's shape (12 blocks, width 768, vocabulary 50,272), random weights, float32."""
    torch.manual_seed(0)
    config = OPTConfig(num_hidden_layers=num_layers, use_cache=False)
    return OPTForCausalLM(config).eval()


def save_opt(folder: Path, width: int, blocks: int, vocab_size: int) -> int:
    """Save an OPT of this shape, random weights, float32. Returns its bytes."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        word_embed_proj_dim=width,
        num_hidden_layers=blocks,
        ffn_dim=4 * width,
        num_attention_heads=width // 32,
        max_position_embeddings=512,
        dropout=0.0,
        use_cache=False,
    )
    model = OPTForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="500MB")
    return sum(p.numel() * p.element_size() for p in model.parameters())


def load_sharded(folder: Path, config: dict[str, Any], micro_batch: int) -> torch.nn.Module:
    """Load a model in float32 under ZeRO-3. config: DeepSpeed's, without micro_batch."""
    # transformers looks for a live HfDeepSpeedConfig object while from_pretrained runs
    sharded = HfDeepSpeedConfig({**config, "train_micro_batch_size_per_gpu": micro_batch})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    del sharded
    return model


def tiny_opt(vocab_size: int = 50272) -> OPTForCausalLM:
    """One block of width 16, random weights, float32."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocab_size,
        max_position_embeddings=64,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=1,
        ffn_dim=16,
        num_attention_heads=1,
        use_cache=False,
    )
    return OPTForCausalLM(config).eval()


def token_batch(batch_size: int, length: int, vocab_size: int = 50272) -> dict[str, torch.Tensor]:
    """Random tokens that are their own labels, without padding: (batch_size, length) each."""
    tokens = torch.randint(
        4, vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(1)
    )
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def examples_of(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The examples of a batch, as training data."""
    return [{key: value[i] for key, value in batch.items()} for i in range(len(batch["labels"]))]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher(ranks: int) -> list[str]:
    """The beginning of a command that starts `ranks` ranks on this host."""
    return ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())]


# glibc keeps freed blocks by rules that depend on the order of sizes. With this environment it gives
# blocks of 1 MiB and more back at once, as `zods.training.host_memory` sets it, in all processes.
GIVES_BACK = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
}


def resident(key: str = "VmRSS") -> int:
    """This process's resident memory in bytes. key: of /proc/self/status; VmHWM: its peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) * 1024


def reset_peak() -> None:
    """Set the peak of the resident memory to its present size (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def run_ranks(command: Sequence[str]) -> None:
    """Run a command of the launcher, with one thread per rank, and GIVES_BACK."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **GIVES_BACK}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)


# MeZO and MeZO-SVRG as their papers have them, where a section does not say otherwise
SHARED_DIRECTION = {
    "direction": "gaussian",
    "examples_per_direction": "all",
    "normalize": False,
    "lr": 1e-6,
}


def single_rank_engine(
    model: torch.nn.Module,
    section: dict[str, Any],
    data: Any = None,
    collate_fn: Callable | None = None,
    **ds: Any,
) -> ZerothOrderEngine:
    """Start zods with `model` in this process alone, as the only rank.

    section: changes of SHARED_DIRECTION. data: the training data; None: two batches of tokens. ds:
    keys of DeepSpeed's configuration.
    """
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 0},
        "steps_per_print": 10**9,
        **ds,
    }
    if data is None:
        data = examples_of(token_batch(2 * config["train_batch_size"], 64))
    return zods.initialize(
        model=model,
        training_data=data,
        collate_fn=collate_fn,
        config={**config, "zeroth_order": {**SHARED_DIRECTION, **section}},
    )[0]


def measuring_forwards(found: StepSize, eps: float) -> int:
    """The number of forwards that measured a step size. eps: the run's perturbation scale."""
    distances = 2 + round(math.log2(found.distance / eps))
    curved = step_size.NUM_CURVED * step_size.NUM_FEW * distances
    tried = step_size.NUM_HELD_OUT * (2 - round(math.log2(found.factor)))
    return 2 * (step_size.NUM_DIRECTIONS * step_size.NUM_EXAMPLES + curved + tried)


def commit() -> str:
    """The commit that runs, with "-dirty" where tracked files differ from it; "" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).parent
    found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def machine() -> dict[str, Any]:
    """The processor's name, the number of torch's threads, and the versions of the packages."""
    cpu = next(
        (
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return {
        "cpu": cpu.partition(":")[2].strip() or platform.processor(),
        "threads": torch.get_num_threads(),
        **versions(),
    }


def report_head(benchmark: str, arguments: argparse.Namespace | None = None) -> dict[str, Any]:
    """The keys of a `Report` besides its rows."""
    given = {key: str(value) for key, value in vars(arguments or argparse.Namespace()).items()}
    return {
        "benchmark": benchmark,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        **({"arguments": given} if given else {}),
    }


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a benchmark with a `Report`."""
    parser.add_argument("--json", type=Path, help="write the JSON object there row by row, too")
    parser.add_argument("--work", type=Path, help="keep the runs there, in a folder of the commit")
    parser.add_argument("--markdown", type=Path, help="write the table there, too")


class Report:
    """The JSON object of a benchmark whose rows take long, and its file.

    Rows that have passed in an earlier, interrupted command are read from the file. All rows are of
    one commit, so the file of another commit is refused.
    """

    def __init__(
        self, head: dict[str, Any], path: Path | None, *, key: str, passed: Callable[[dict], bool]
    ) -> None:
        """head: the object without rows. path: the file; None: there is none. key: the key of a row
        that names it. passed: whether a row has passed, so that it is not made again.
        """
        self.head, self.path, self.key, self.passed = head, path, key, passed
        self.rows: list[dict[str, Any]] = []
        self._earlier: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            earlier = json.loads(path.read_text())
            if earlier["commit"] != head["commit"]:
                raise SystemExit(
                    f"--json {path}: has rows of commit {earlier['commit']}, this is "
                    f"{head['commit']}. Give another file."
                )
            self._earlier = {row[key]: row for row in earlier["rows"]}

    def done(self, name: str) -> dict[str, Any] | None:
        """The row of this name, if it has passed in an earlier command."""
        row = self._earlier.get(name)
        return row if row is not None and self.passed(row) else None

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, and write the file. Rows of an earlier command stay there until their turn."""
        self.rows.append(row)
        self._earlier.pop(row[self.key], None)
        if self.path is not None:
            later = [row for row in self._earlier.values() if self.passed(row)]
            whole = {**self.head, "rows": [*self.rows, *later]}
            with atomic_write(self.path) as partial:
                partial.write_text(json.dumps(whole, indent=1) + "\n")

    def markdown(
        self,
        title: str,
        text: str,
        columns: Sequence[str],
        rows: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """The rows as a table. text: what the rows are, for the line above the table. rows: these
        in place of the report's own.
        """
        head, host = self.head, self.head["machine"]
        versions_text = ", ".join(f"{name} {host[name]}" for name in ("torch", "deepspeed"))
        lines = [
            columns,
            ["---"] * len(columns),
            *(
                [str(row[column]).replace("|", "\\|").replace("\n", " ") for column in columns]
                for row in (self.rows if rows is None else rows)
            ),
        ]
        return (
            f"# {title}\n\n`python benchmarks/{head['benchmark']}.py`, {head['date']}, commit "
            f"{head['commit']}: {text}, {host['cpu']}, {versions_text}.\n\n"
            + "".join(f"| {' | '.join(line)} |\n" for line in lines)
        )

    def print_and_exit(self) -> None:
        """Print the JSON object. Ends with code 1 if a row has not passed."""
        print(json.dumps({**self.head, "rows": self.rows}))
        if not all(map(self.passed, self.rows)):
            raise SystemExit(1)
