"""Steps of trl's SFTTrainer with `ZOTrainerMixin`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler
from trl import SFTConfig, SFTTrainer

import zods
from tests.distributed.command_line import MODEL
from tests.distributed.models import state
from tests.distributed.ranks import run_ranks
from tests.helpers import sampled
from zods.integrations.hf import ZOTrainerMixin, ZOTrainingArguments

STEPS = 4
SECTION = {"method": "mezo_svrg", "lr": 1e-3, "anchor_interval": 2, "anchor_directions": 2}
# rows in the forms that SFTTrainer reads
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompt and completion": [
        {"prompt": f"What is {i} of 7?", "completion": f" It is {i * 5 % 7}."} for i in range(16)
    ],
    "messages": [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} of 7?"},
                {"role": "assistant", "content": f"It is {i * 5 % 7}."},
            ]
        }
        for i in range(16)
    ],
    "text": [{"text": f"What is {i} of 7? It is {i * 5 % 7}."} for i in range(64)],
}


class Trainer(ZOTrainerMixin, SFTTrainer):
    pass


@dataclass
class Arguments(ZOTrainingArguments, SFTConfig):
    pass


def sft_trainer(folder: Path, rows: list[dict[str, Any]], **others: Any) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }} {% endfor %}"
    args = Arguments(
        output_dir=str(folder),
        deepspeed={"zero_optimization": {"stage": 3}, "zeroth_order": SECTION},
        per_device_train_batch_size=2,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=2,
        max_length=32,
        report_to=[],
        disable_tqdm=True,
        **others,
    )
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def rank_of_same_steps(folder: Path, form: str) -> list[Any]:
    """The states after the steps of a Trainer, of a resumed one, and of a loop over its examples."""
    # "wrapped" keeps a row per packed sequence; the other strategies flatten a batch into one row
    packing = {"packing": form == "text", "packing_strategy": "wrapped"}
    states = []
    for resumed in (None, str(folder / "checkpoint-2")):
        trainer = sft_trainer(folder, ROWS[form], **packing)
        trainer.train(resume_from_checkpoint=resumed)
        assert trainer.state.global_step == STEPS
        states.append(state(trainer.deepspeed))
        trainer.deepspeed.close()
    engine, _, loader, _ = zods.initialize(
        model=AutoModelForCausalLM.from_pretrained(MODEL),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3},
            "zeroth_order": SECTION,
        },
        training_data=trainer.train_dataset,
        collate_fn=trainer.data_collator,
        lr_scheduler=lambda optimizer: get_scheduler("linear", optimizer, 0, STEPS),
    )
    batches = loader.forever()
    for _ in range(STEPS):
        engine.train_batch(batches)
    return [*states, state(engine)]


@pytest.mark.parametrize("form", sampled(ROWS, ["prompt and completion"]))
def test_sft_trainer_makes_the_steps_of_zods_initialize_to_the_bit(tmp_path: Path, form: str):
    for states in run_ranks(2, rank_of_same_steps, tmp_path, form):
        assert states[1:] == states[:-1]


def rank_of_refused_loss(folder: Path) -> None:
    with pytest.raises(ValueError, match='loss_type: found "dft", must be "nll"'):
        sft_trainer(folder, ROWS["messages"], loss_type="dft")


def test_a_loss_that_is_not_the_models_is_refused(tmp_path: Path):
    run_ranks(1, rank_of_refused_loss, tmp_path)
