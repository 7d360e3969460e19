"""Tiny random models of the families that zods names, and their batches."""

from __future__ import annotations

from collections.abc import Callable

import peft
import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY = 50
_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "word_embed_proj_dim": 16,
}
_T5 = {
    "d_model": 32,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "d_kv": 8,
    "decoder_start_token_id": 0,
}
ZOO: dict[str, Callable[[], nn.Module]] = {
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **_OPT)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED, sliding_window=4)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64)
    ),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_SHAPE, num_labels=3)),
    "roberta": lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(**_SHAPE, num_labels=3)
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_SHAPE)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED, head_dim=8)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCABULARY, **_T5)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=8)
    ),
    "bert, masked": lambda: hf.BertForMaskedLM(hf.BertConfig(**_SHAPE)),
}
CLASSIFIERS = ("bert", "roberta")


def zoo_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ZOO[name]().eval()


def zoo_batch(
    name: str, size: int = 4, length: int = 16, *, padded: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """A batch for the model `name`.

    padded: every second row ends early.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[::2, length // 2 :] = 0
        # RoBERTa counts positions of tokens other than the padding token 1.
        ids = ids.where(mask == 1, 1)
    classes = torch.randint(0, 3, (size,), generator=generator)
    labels = classes if name in CLASSIFIERS else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_adapters(name: str) -> nn.Module:
    """A model of which only LoRA's matrices are trainable. None of them is zero."""
    return peft.get_peft_model(
        zoo_model(name), peft.LoraConfig(r=2, lora_alpha=128, init_lora_weights=False)
    )
