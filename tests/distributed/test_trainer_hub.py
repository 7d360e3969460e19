"""What `ZOTrainer.push_to_hub` uploads: the folder that `save_model` and `create_model_card` write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, OPTForCausalLM, Trainer

from tests.distributed.generated_texts import word_tokenizer
from tests.distributed.models import opt_data, sha256, tiny_opt, whole
from tests.distributed.ranks import run_ranks
from zods.integrations.hf import ZOTrainer, ZOTrainingArguments

OF_TRANSFORMERS = ("push_to_hub", "create_model_card", "init_hf_repo", "_push_from_checkpoint")


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_the_methods_that_upload_are_those_of_transformers(name: str):
    assert getattr(ZOTrainer, name) is getattr(Trainer, name)


@dataclass
class OtherLoss(ZOTrainingArguments):
    """Arguments with the key of trl's SFTConfig that names another loss."""

    loss_type: str = "dft"


def rank_of_folder(folder: Path) -> str:
    """The calls of `push_to_hub` before its upload; returns the digest of the weights."""
    config = {"zero_optimization": {"stage": 3}, "zeroth_order": {"lr": 1e-3}}
    with pytest.raises(ValueError, match='loss_type: found "dft", must be "nll"'):
        OtherLoss(output_dir=str(folder), deepspeed=config)
    args = ZOTrainingArguments(
        output_dir=str(folder),
        deepspeed=config,
        per_device_train_batch_size=2,
        max_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = ZOTrainer(
        model=tiny_opt(), args=args, train_dataset=opt_data(), processing_class=word_tokenizer()
    )
    trainer.train()
    trainer.save_model(_internal_call=True)
    trainer.create_model_card(model_name="a model", tags=["zeroth-order"])
    trained = sha256(whole(trainer.deepspeed))
    trainer.deepspeed.close()
    return trained


def test_the_folder_to_be_uploaded_has_the_model_its_tokenizer_and_a_card(tmp_path: Path):
    found = run_ranks(2, rank_of_folder, tmp_path)
    saved = OPTForCausalLM.from_pretrained(tmp_path)
    assert {sha256(dict(saved.named_parameters()))} == set(found)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "w2"
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).max_steps == 2
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == "a model"
    assert "zeroth-order" in card.data.tags
    assert "learning_rate: 0.001" in card.text
