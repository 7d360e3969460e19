"""Several methods of PEFT on one small Llama, and LoRA on other bases.

Only the parameters that a method adds are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
from torch import nn

from tests.distributed.zoo_models.language import (
    GROUPED,
    LABELS,
    SHAPE,
    T5,
    build,
    classes,
    pairs,
    tokens,
)
from tests.distributed.zoo_models.subject import Subject

_LLAMA = build("Llama", "ForCausalLM", **GROUPED)
_TARGETS = {"target_modules": ["q_proj", "v_proj"]}
_MORE = {"target_modules": ["q_proj", "down_proj"]}


def _with(make: Callable[[], nn.Module], config: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: peft.get_peft_model(make(), getattr(peft, config)(**arguments))  # type: ignore[arg-type]


def _causal(config: str, **arguments: Any) -> Subject:
    return Subject(_with(_LLAMA, config, task_type="CAUSAL_LM", **arguments), tokens)


def _merged_then_another() -> nn.Module:
    """Two active adapters on one base."""
    model = peft.get_peft_model(_LLAMA(), peft.LoraConfig(r=2, **_TARGETS))  # type: ignore[arg-type]
    model.add_adapter("second", peft.LoraConfig(r=3, **_MORE))
    model.base_model.set_adapter(["default", "second"])
    return model


ADAPTERS: dict[str, Subject] = {
    "LoRA": Subject(_with(_LLAMA, "LoraConfig", r=2, **_TARGETS), tokens, svrg=True),
    "LoRA, two at once": Subject(_merged_then_another, tokens),
    "LoRA on embeddings": _causal(
        "LoraConfig", r=2, target_modules=["embed_tokens", "lm_head", "v_proj"]
    ),
    "LoRA with whole modules": _causal(
        "LoraConfig", r=2, modules_to_save=["lm_head"], bias="all", **_TARGETS
    ),
    "LoRA on a parameter": _causal(
        "LoraConfig", r=2, target_modules=[], target_parameters=["mlp.gate_proj.weight"]
    ),
    "DoRA": _causal("LoraConfig", r=2, use_dora=True, **_TARGETS),
    # PEFT gathers its matrices for a term of the loss, but only if transformers knows that ZeRO-3
    # is on.
    "AdaLoRA": Subject(
        _with(
            _LLAMA,
            "AdaLoraConfig",
            task_type="CAUSAL_LM",
            init_r=3,
            target_r=2,
            total_step=9,
            **_TARGETS,
        ),
        tokens,
        sharded=False,
    ),
    "LoHa": _causal("LoHaConfig", r=2, **_TARGETS),
    "LoKr": _causal("LoKrConfig", r=2, **_TARGETS),
    "OFT": _causal("OFTConfig", oft_block_size=8, r=0, **_TARGETS),
    "(IA)3": _causal(
        "IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "VeRA": _causal("VeraConfig", r=4, target_modules=["q_proj", "o_proj"]),
    "FourierFT": _causal("FourierFTConfig", n_frequency=20, **_TARGETS),
    "layer norms": _causal("LNTuningConfig", target_modules=["input_layernorm", "norm"]),
    "prompt tuning": _causal("PromptTuningConfig", num_virtual_tokens=3),
    "p-tuning": _causal("PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix tuning": _causal("PrefixTuningConfig", num_virtual_tokens=3),
    "LoRA on GPT-2": Subject(
        _with(
            build(
                "GPT2", "LMHeadModel", n_embd=32, n_layer=2, n_head=4, vocab_size=48, n_positions=64
            ),
            "LoraConfig",
            r=2,
            target_modules=["c_attn"],
            fan_in_fan_out=True,
        ),
        tokens,
    ),
    "LoRA on BERT": Subject(
        _with(
            build("Bert", "ForSequenceClassification", **SHAPE, num_labels=LABELS),
            "LoraConfig",
            r=2,
            task_type="SEQ_CLS",
            target_modules=["query", "value"],
        ),
        classes,
    ),
    "LoRA on T5": Subject(
        _with(
            build("T5", "ForConditionalGeneration", **T5),
            "LoraConfig",
            r=2,
            target_modules=["q", "wo"],
        ),
        pairs,
    ),
}
