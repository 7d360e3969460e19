"""Runs of the command line, and of ZOTrainer, on streams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import zods.finetune
from tests.distributed.command_line import MODEL, write_rows
from tests.distributed.models import state, tiny_opt
from tests.distributed.ranks import options_of, run_ranks
from zods.cli.arguments import parse_arguments
from zods.integrations.hf import ZOTrainer, ZOTrainingArguments

BATCH, STEPS, HALF = 4, 6, 3


def rows(number: int) -> list[dict[str, Any]]:
    """Answers of equal length, so that no batch is padded; the sixth row has nothing to learn."""
    return [
        {"instruction": f"return {10 + i}", "output": "" if i == 5 else f"{40 + i}"}
        for i in range(number)
    ]


def options(folder: Path, output: str, accumulation: int = 1, **others: Any) -> list[str]:
    """Options of a run on 18 examples: an epoch has 4 steps, and 2 examples are left over."""
    write_rows(folder / "held_out.jsonl", rows(5))
    if not (folder / "train.jsonl").exists():
        write_rows(folder / "train.jsonl", rows(18))
    config = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": 3},
        "zeroth_order": {"lr": 1e-4, "evaluation": "sequential"},
    }
    path = folder / f"config{accumulation}.json"
    path.write_text(json.dumps(config))
    given = {
        "deepspeed_config": path,
        "model": MODEL,
        "task": "instruction",
        "train_file": folder / "train.jsonl",
        "validation_file": folder / "held_out.jsonl",
        "output_dir": folder / output,
        "streaming": True,
        "shuffle_buffer": 6,
        "max_steps": STEPS,
        "max_length": 32,
        "resume": "auto",
        **others,
    }
    return options_of(**given)


def rank_of_steps(words: list[str], until: int) -> list[tuple[str, float]]:
    """The digest of the examples and the loss of each step up to step `until`."""
    engine = zods.finetune.start(parse_arguments(words))[0]
    seen = []
    for _ in range(engine.global_steps, until):
        loss = engine.train_batch()
        seen.append((engine.training_dataloader.digest_of_last_step(), loss))
    engine.close()
    return seen


def test_a_run_on_a_stream_sees_the_same_examples_on_other_ranks_and_when_it_is_resumed(tmp_path):
    """An epoch ends in the resumed part."""
    whole = run_ranks(1, rank_of_steps, options(tmp_path, "whole", 2), STEPS)[0]
    first = run_ranks(2, rank_of_steps, options(tmp_path, "cut"), HALF)
    more = options(tmp_path, "cut", dataloader_num_workers=1)
    rest = run_ranks(1, rank_of_steps, more, STEPS)
    assert first[0] == first[1]
    found = first[0] + rest[0]
    assert [digest for digest, _ in found] == [digest for digest, _ in whole]
    assert len({digest for digest, _ in found}) == STEPS
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in whole], rel=1e-4)


class Sentences(torch.utils.data.IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(3)
        for _ in range(18):
            ids = torch.randint(0, 30, (6,), generator=generator)
            yield {"input_ids": ids, "labels": ids}


def rank_of_trainer(folder: Path) -> list[Any]:
    """The states after 7 steps, of one run and of one that is resumed after 4."""
    config = {"zero_optimization": {"stage": 0}, "zeroth_order": {"lr": 1e-3}}
    states = []
    for name, resume in (("whole", None), ("cut", str(folder / "whole" / "checkpoint-4"))):
        args = ZOTrainingArguments(
            output_dir=str(folder / name), deepspeed=config, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, max_steps=7, save_steps=4, report_to=[],
            disable_tqdm=True,
        )  # fmt: skip
        trainer = ZOTrainer(model=tiny_opt(), args=args, train_dataset=Sentences())
        trainer.train(resume_from_checkpoint=resume)
        states.append(state(trainer.deepspeed))
        trainer.deepspeed.close()
    return states


def test_the_trainer_resumes_on_a_stream_at_the_next_example(tmp_path):
    """An epoch of the stream has 4 steps, so that the checkpoint stands at its end."""
    whole, cut = run_ranks(1, rank_of_trainer, tmp_path)[0]
    assert whole == cut
