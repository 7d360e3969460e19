"""Helpers of the benchmarks: an engine of one rank, models with random weights, the machine."""

from __future__ import annotations

import argparse
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from transformers import OPTConfig, OPTForCausalLM

import zods
from zods.cli.run_folder import versions
from zods.training.engine import ZerothOrderEngine


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher(ranks: int) -> list[str]:
    """The beginning of a command that starts `ranks` ranks on this host."""
    return ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())]


def single_rank_engine(
    model: torch.nn.Module, section: dict[str, Any], data: Any = None, **ds: Any
) -> ZerothOrderEngine:
    """Start zods with `model` in this process alone, as the only rank.

    data: the training data; None: two batches of tokens.
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
        num_rows = 2 * config["train_batch_size"]
        rows = token_batch(num_rows, 64)
        data = [{key: value[i] for key, value in rows.items()} for i in range(num_rows)]
    return zods.initialize(
        model=model, training_data=data, config={**config, "zeroth_order": section}
    )[0]  # type: ignore[arg-type]


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
