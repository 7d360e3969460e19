"""Small models of many architectures of transformers, with random weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 128
# Sizes under the names that configurations have for them. An architecture takes those it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "lru_width", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "block_ff_dim"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "mamba_d_ssm"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "attention_window_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace"), 1),
    "linear_num_value_heads": 4,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "rotary_dim": 4,
    "sliding_window": 8,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What one architecture needs beyond its sizes; None: its own default.
OTHERS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "head_dim": None},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "falcon": {"head_dim": None},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": [
        *("sliding_attention", "full_attention") * 2], "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8, "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.0] * 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
}  # fmt: skip
# By what a module computes: attention and norms of all kinds, experts, state spaces.
ARCHITECTURES = (
    *("apertus", "arcee", "biogpt", "bitnet", "bloom", "codegen", "cohere", "cohere2"),
    *("deepseek_v2", "deepseek_v3", "diffllama", "doge", "ernie4_5", "exaone4", "falcon"),
    *("gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_bigcode", "gpt_neo", "gpt_neox"),
    *("gptj", "granite", "helium", "hunyuan_v1_dense", "internlm3", "llama4_text", "ministral"),
    *("modernbert-decoder", "mpt", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "openai-gpt"),
    *("persimmon", "phi3", "qwen2", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma"),
    *("xglm", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "gpt_oss", "granitemoe"),
    *("hunyuan_v1_moe", "jetmoe", "minimax", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
    *("bamba", "falcon_h1", "falcon_mamba", "jamba", "lfm2", "lfm2_moe", "mamba2", "nemotron_h"),
    *("qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "bart", "gemma3n_text"),
)


def small_model(name: str) -> nn.Module:
    """A causal language model of an architecture, float32, with matrices that differ from zero."""
    kind = CONFIG_MAPPING[name]
    defaults = kind()
    others = OTHERS.get(name, {})
    sizes = {key: value for key, value in SIZES.items() if hasattr(defaults, key)} | others
    of_layers = getattr(defaults, "layer_types", None)
    if of_layers and "layer_types" not in others:
        kinds = list(dict.fromkeys(of_layers))
        sizes["layer_types"] = (2 * kinds)[: max(2, len(kinds))]
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    for_mlp = getattr(defaults, "mlp_layer_types", None)
    if for_mlp:
        sizes["mlp_layer_types"] = list(for_mlp)[: sizes["num_hidden_layers"]]
    config = _config(kind, {key: value for key, value in sizes.items() if value is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        if param.ndim > 1:
            param.data.normal_(0.0, 0.05, generator=generator)
    return model


def _config(kind: Any, sizes: dict[str, Any]) -> Any:
    """A configuration without the sizes that this class derives from others."""
    while True:
        try:
            return kind(**sizes)
        except AttributeError as error:
            derived = re.search(r"property '(\w+)'", str(error))
            names = {
                key
                for key in sizes
                if derived is not None and kind.attribute_map.get(key, key) == derived[1]
            }
            if not names:
                raise
            sizes = {key: value for key, value in sizes.items() if key not in names}
