"""Language models of transformers.

Decoders, encoders, encoder-decoders, mixtures of experts, state-space models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from tests.distributed.zoo_models.subject import EXAMPLES, Subject

VOCABULARY, LENGTH, LABELS = 48, 12, 3
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
TRANSLATOR = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "d_kv": 8,
    "decoder_start_token_id": 0,
}
DEBERTA = {
    **SHAPE,
    "num_labels": LABELS,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": 16,
    "position_biased_input": False,
}
DEBERTA_V3 = {**DEBERTA, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "state_size": 8}


def _tokens(seed: int) -> tuple[Tensor, torch.Generator]:
    """Random tokens. Every batch is longer than the one before."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (EXAMPLES, LENGTH + seed), generator=generator), generator


def tokens(seed: int) -> dict[str, Tensor]:
    """A batch in which every token is a label."""
    ids, _ = _tokens(seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def classes(seed: int) -> dict[str, Tensor]:
    ids, generator = _tokens(seed)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(0, LABELS, (EXAMPLES,), generator=generator),
    }


def masked(seed: int) -> dict[str, Tensor]:
    """A batch in which every fourth word is masked. The masked words are the labels."""
    ids, _ = _tokens(seed)
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[:, 2::4] = True
    given = ids.masked_fill(hidden, 3)
    return {
        "input_ids": given,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(~hidden, -100),
    }


def spans(seed: int) -> dict[str, Tensor]:
    ids, generator = _tokens(seed)
    ends = torch.randint(0, LENGTH, (2, EXAMPLES), generator=generator)
    return {"input_ids": ids, "start_positions": ends[0], "end_positions": ends[1]}


def pairs(seed: int) -> dict[str, Tensor]:
    """A batch whose sources and targets have different lengths."""
    ids, generator = _tokens(seed)
    target = torch.randint(3, VOCABULARY, (EXAMPLES, 7), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": target}


def build(
    family: str, head: str = "ForCausalLM", config: str = "", **arguments: Any
) -> Callable[[], nn.Module]:
    """The class `family` + `head` of transformers with its configuration.

    The configuration's class is that of the family, or of `config`.
    """
    return lambda: getattr(hf, family + head)(getattr(hf, f"{config or family}Config")(**arguments))


def _gathered_as_one(make: Callable[[], nn.Module], kind: str) -> Callable[[], nn.Module]:
    """Have modules of this class gathered with all modules below them.

    ZeRO-3 needs all ranks to gather the same modules, and the batch decides which experts are
    called.
    """

    def made() -> nn.Module:
        model = make()
        set_z3_leaf_modules(model, [kind])
        return model

    return made


def _checkpointing() -> nn.Module:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True))
    model.gradient_checkpointing_enable()
    return model


_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
_OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "word_embed_proj_dim": 16,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
}

DECODERS: dict[str, Subject] = {
    "OPT": Subject(build("OPT", vocab_size=VOCABULARY, max_position_embeddings=64, **_OPT), tokens),
    "Llama": Subject(build("Llama", **GROUPED), tokens, sample=True, svrg=True),
    "Llama, gradient checkpointing": Subject(_checkpointing, tokens),
    "Mistral": Subject(build("Mistral", **GROUPED, sliding_window=4), tokens),
    "GPT-2": Subject(build("GPT2", "LMHeadModel", **_GPT2), tokens, svrg=True),
    "Phi": Subject(build("Phi", **SHAPE), tokens),
    "Qwen3": Subject(build("Qwen3", **GROUPED, head_dim=8), tokens),
    "Gemma 2": Subject(build("Gemma2", **GROUPED, head_dim=8, sliding_window=4), tokens),
    "Gemma 3": Subject(
        build("Gemma3", config="Gemma3Text", **GROUPED, head_dim=8, sliding_window=4), tokens
    ),
    "GPT-NeoX": Subject(build("GPTNeoX", **SHAPE), tokens),
    "Falcon": Subject(
        build(
            "Falcon",
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
        tokens,
    ),
    "BLOOM": Subject(
        build("Bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        tokens,
        bf16=True,
    ),
    "GPT-J": Subject(build("GPTJ", **_GPT2, rotary_dim=4), tokens),
    "MPT": Subject(
        build("Mpt", vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
        tokens,
    ),
    "Cohere": Subject(build("Cohere", **GROUPED), tokens),
}
EXPERTS: dict[str, Subject] = {
    "Mixtral": Subject(
        build(
            "Mixtral",
            **GROUPED,
            num_local_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
        ),
        tokens,
    ),
    "Qwen3-MoE": Subject(build("Qwen3Moe", **GROUPED, head_dim=8, **_EXPERTS), tokens),
    "OLMoE": Subject(
        build("Olmoe", **GROUPED, num_experts=4, num_experts_per_tok=2, pad_token_id=0), tokens
    ),
    "DeepSeek-V3": Subject(build("DeepseekV3", **SHAPE, **_LATENT), tokens),
    "gpt-oss": Subject(
        build(
            "GptOss",
            **GROUPED,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=4,
        ),
        tokens,
    ),
    "Switch Transformers": Subject(
        _gathered_as_one(
            build(
                "SwitchTransformers",
                "ForConditionalGeneration",
                **T5,
                num_experts=3,
                num_sparse_encoder_layers=1,
                num_sparse_decoder_layers=1,
            ),
            "SwitchTransformersSparseMLP",
        ),
        pairs,
    ),
    "NLLB-MoE": Subject(
        _gathered_as_one(
            build(
                "NllbMoe",
                "ForConditionalGeneration",
                **TRANSLATOR,
                num_experts=3,
                encoder_sparse_step=1,
                decoder_sparse_step=1,
            ),
            "NllbMoeSparseMLP",
        ),
        pairs,
    ),
}
STATES: dict[str, Subject] = {
    "Mamba": Subject(build("Mamba", **MAMBA), tokens, sample=True),
    "Mamba 2": Subject(
        build("Mamba2", **MAMBA, num_heads=4, head_dim=16, n_groups=2, chunk_size=4), tokens
    ),
    "RWKV": Subject(
        build(
            "Rwkv",
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            attention_hidden_size=32,
        ),
        tokens,
    ),
    "RecurrentGemma": Subject(
        build(
            "RecurrentGemma",
            **{**SHAPE, "num_hidden_layers": 3},
            num_key_value_heads=1,
            lru_width=32,
            attention_window_size=8,
        ),
        tokens,
    ),
    "Jamba": Subject(
        build(
            "Jamba",
            **GROUPED,
            num_experts=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=4,
        ),
        tokens,
    ),
}
ENCODERS: dict[str, Subject] = {
    "BERT": Subject(
        build("Bert", "ForSequenceClassification", **SHAPE, num_labels=LABELS),
        classes,
        svrg=True,
        bf16=True,
    ),
    "BERT, masked": Subject(build("Bert", "ForMaskedLM", **SHAPE), masked),
    "RoBERTa": Subject(build("Roberta", "ForMaskedLM", **SHAPE), masked),
    "DistilBERT": Subject(
        build(
            "DistilBert",
            "ForQuestionAnswering",
            vocab_size=VOCABULARY,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
        ),
        spans,
    ),
    "ALBERT": Subject(
        build("Albert", "ForSequenceClassification", **SHAPE, embedding_size=16, num_labels=LABELS),
        classes,
    ),
    "DeBERTa": Subject(build("Deberta", "ForSequenceClassification", **DEBERTA), classes),
    "DeBERTa-v2": Subject(
        build("DebertaV2", "ForSequenceClassification", **DEBERTA, conv_kernel_size=3), classes
    ),
    "DeBERTa-v3": Subject(
        build("DebertaV2", "ForSequenceClassification", **DEBERTA_V3), classes, sample=True
    ),
    "DeBERTa-v3, relative embeddings alone": Subject(
        build("DebertaV2", "ForSequenceClassification", **DEBERTA_V3),
        classes,
        trained="rel_embeddings",
    ),
    "ModernBERT": Subject(
        build(
            "ModernBert",
            "ForMaskedLM",
            **SHAPE,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
            attn_implementation="sdpa",
        ),
        masked,
    ),
    "MPNet": Subject(build("MPNet", "ForMaskedLM", **SHAPE), masked),
    "XLNet": Subject(
        build(
            "XLNet",
            "ForSequenceClassification",
            vocab_size=VOCABULARY,
            d_model=32,
            n_layer=2,
            n_head=4,
            d_inner=48,
            num_labels=LABELS,
        ),
        classes,
    ),
    "Longformer": Subject(
        build(
            "Longformer",
            "ForSequenceClassification",
            **SHAPE,
            attention_window=4,
            num_labels=LABELS,
        ),
        classes,
    ),
    "SqueezeBERT": Subject(
        build(
            "SqueezeBert",
            "ForSequenceClassification",
            **SHAPE,
            embedding_size=32,
            num_labels=LABELS,
        ),
        classes,
    ),
    "FNet": Subject(build("FNet", "ForMaskedLM", **SHAPE), masked),
    "ConvBERT": Subject(
        build(
            "ConvBert", "ForSequenceClassification", **SHAPE, embedding_size=32, num_labels=LABELS
        ),
        classes,
    ),
    "Funnel": Subject(
        build(
            "Funnel",
            "ForSequenceClassification",
            vocab_size=VOCABULARY,
            block_sizes=[1, 1],
            d_model=32,
            n_head=4,
            d_head=8,
            d_inner=48,
            num_labels=LABELS,
        ),
        classes,
    ),
}
ENCODER_DECODERS: dict[str, Subject] = {
    "T5": Subject(build("T5", "ForConditionalGeneration", **T5), pairs, sample=True),
    "LongT5": Subject(build("LongT5", "ForConditionalGeneration", **T5, local_radius=3), pairs),
    "BART": Subject(build("Bart", "ForConditionalGeneration", **TRANSLATOR), pairs, svrg=True),
    "BART, classifier": Subject(
        build("Bart", "ForSequenceClassification", **TRANSLATOR, num_labels=LABELS),
        lambda seed: with_end(classes(seed)),
    ),
    "Marian": Subject(build("Marian", "MTModel", **TRANSLATOR), pairs),
    "ProphetNet": Subject(
        build(
            "ProphetNet",
            "ForConditionalGeneration",
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            decoder_start_token_id=1,
        ),
        pairs,
    ),
}


def with_end(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with end marks, because BART classifies at the last end mark."""
    batch["input_ids"][:, -1] = TRANSLATOR["eos_token_id"]
    return batch


LANGUAGE: dict[str, Subject] = {**DECODERS, **EXPERTS, **STATES, **ENCODERS, **ENCODER_DECODERS}
