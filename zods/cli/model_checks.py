"""Check that a pretrained model and its adapter fit the task. Caller: `zods.finetune`.

`check_kind` and `check_adapter` read the model's files before anything is loaded. `check_causal`
compares predictions of the loaded model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from zods.cli.pretrained import (
    Pretrained,
    check_weight_files,
    errors_in_one_line,
    parameter_shapes,
)
from zods.data.batch import accepted_arguments
from zods.tasks import POSITION_IDS, Task


def check_kind(pretrained: Pretrained, task: Task) -> None:
    """Raise ValueError where the configuration shows that the model cannot be used for the task."""
    auto_class, config = task.auto_class(), pretrained.config
    own_code = auto_class.__name__ in (getattr(config, "auto_map", None) or {})
    # `in`, for the mapping's keys() imports the configurations of all models: seconds
    fits = any(type(c) in auto_class._model_mapping for c in (config, config.get_text_config()))
    if not own_code and not fits:
        kind = "encoder-decoder " if config.is_encoder_decoder else ""
        raise ValueError(
            f"--model {pretrained.base}: a {kind}model of type {config.model_type}, for which "
            f"transformers has no {auto_class.__name__}, as --task {task.name} needs. Give another "
            "model or another --task."
        )
    masked = (
        type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", True) is False
    )
    if task.predicts_next_token and masked and not config.is_encoder_decoder:
        raise ValueError(
            _not_causal(
                pretrained.base, f"a {config.model_type} model with is_decoder false", task.name
            )
        )


def check_adapter(pretrained: Pretrained, task: Task, trust_remote_code: bool) -> None:
    """Raise ValueError where an adapter's files show that it does not fit the task.

    It does not fit where it was trained for another task type, or where its weights have other
    shapes than the model.
    """
    if pretrained.adapter is None:
        return
    with errors_in_one_line(f"--model {pretrained.adapter}, a PEFT adapter"):
        import peft

        kind = peft.PeftConfig.from_pretrained(pretrained.adapter).task_type
    needed = adapter_task_type(task)
    if kind is not None and kind != needed:
        raise ValueError(
            f"--model {pretrained.adapter}: the task_type in its adapter_config.json is "
            f"{getattr(kind, 'value', kind)}, but --task {task.name} needs an adapter of task_type "
            f"{needed}. Give another adapter or another --task."
        )
    path = Path(pretrained.adapter) / "adapter_model.safetensors"
    check_weight_files(path.parent)
    if not path.is_file():  # from the hub, or in another format: seen when it is loaded
        return
    expected = parameter_shapes(pretrained, task, trust_remote_code)
    for name, shape in _shapes_in(path).items():
        name = name.removeprefix("base_model.model.")
        if expected.get(name, shape) != shape:
            classes = (
                f" of {task.model_kwargs()['num_labels']} classes"
                if not task.predicts_next_token
                else ""
            )
            raise ValueError(
                f"--model {pretrained.adapter}: its {name} has the shape {shape}, but the model "
                f"for --task {task.name}{classes} has {expected[name]}. Give the base model that "
                "the adapter was trained on, and data with as many classes as it was trained for, "
                "or train new adapters with --lora_rank."
            )


def adapter_task_type(task: Task) -> str:
    """The task_type of an adapter of PEFT for a task."""
    return "CAUSAL_LM" if task.predicts_next_token else "SEQ_CLS"


def check_shapes(pretrained: Pretrained, task: Task, trust_remote_code: bool) -> None:
    """Raise ValueError where a weight in the model's files has another size than its configuration
    gives it.

    transformers finds out when the model is loaded, and under ZeRO-3 on rank 0 alone. Only sizes
    are compared, for it may transpose a weight. Models with code of their own and quantized ones
    are left out: what they read from their files is not known.
    """
    config, folder = pretrained.config, Path(pretrained.base)
    own_code = getattr(config, "auto_map", None)
    if own_code or getattr(config, "quantization_config", None) is not None:
        return
    files = [folder / "model.safetensors"]  # which transformers prefers to shards
    if not files[0].is_file():
        files = sorted(folder.glob("model-*-of-*.safetensors")) if folder.is_dir() else []
    if not files:
        return
    expected = parameter_shapes(pretrained, task, trust_remote_code)
    new = set(pretrained.mismatched_head(task, trust_remote_code))
    for path in files:
        for name, shape in _shapes_in(path).items():
            wanted = shape if name in new else expected.get(name, shape)
            if math.prod(shape) != math.prod(wanted):
                raise ValueError(
                    f"{path}: {name} has the shape {shape}, but {wanted} by the config.json beside "
                    "it. Copy both files again from where the model is from."
                )


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, by name. The data are not read."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def check_causal(
    evaluate: Callable[..., dict[str, float]],
    pretrained: Pretrained,
    task: Task,
    batches: Sequence[dict[str, Any]],
) -> None:
    """Raise ValueError, on all ranks, where later tokens change the model's earlier predictions.

    The configuration does not always show this. The check compares the predictions for two rows
    whose first halves are the same, in one forward.

    Args:
        evaluate: the engine's method `evaluate`.
        batches: training batches of one example; the tokens of the two rows are taken from them.
    """
    if not task.predicts_next_token:
        return
    tokens = sorted({token for batch in batches for token in batch["input_ids"][0].tolist()})
    if len(tokens) < 2:
        return
    first = [tokens[i % len(tokens)] for i in range(8)]
    ids = torch.tensor([first, first[:4] + [tokens[(i + 1) % len(tokens)] for i in range(4, 8)]])

    def measure(
        outputs: Any, inputs: dict[str, Tensor], targets: Tensor
    ) -> dict[str, tuple[float, float]]:
        logits = outputs["logits"]
        change = (logits[0] - logits[1]).abs().amax(-1).float()  # (8,)
        # The first halves of a causal model's rows differ by rounding, if at all.
        noise = 1e-4 if logits.dtype == torch.float32 else 1e-2
        return {"leaks": (float(change[:4].max() > noise * change[4:].max()), 1)}

    def collate(rows: Sequence[Any]) -> tuple[dict[str, Tensor], Tensor]:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.zeros(1)

    if evaluate([0], collate, measure)["leaks"]:
        raise ValueError(
            _not_causal(pretrained.base, "its predictions depend on later tokens", task.name)
        )


def check_packing(
    evaluate: Callable[..., dict[str, float]],
    model: torch.nn.Module,
    pretrained: Pretrained,
    batches: Sequence[dict[str, Any]],
) -> None:
    """Raise ValueError, on all ranks, where examples that are packed into one row change each other.

    transformers 5.23 separates them by position_ids that begin again, with the attention
    implementations eager, sdpa, flash and flex, in models that give position_ids to
    `create_causal_mask`. Llama, Qwen3 and GPT-2 do, OPT and models with a recurrent state do not. The
    check compares the predictions for an example that stands before, and after, two others.

    Args:
        evaluate, batches: as in `check_causal`, but of packed rows; others are not checked.
    """
    if not batches or POSITION_IDS not in batches[0]:
        return
    takes = accepted_arguments(model)
    tokens = [t for batch in batches for t in batch["input_ids"][0].tolist()]
    kinds = list(dict.fromkeys(tokens))
    parts = [[kinds[(start + i) % len(kinds)] for i in range(4)] for start in range(3)]
    example, before, other = parts
    rows = torch.tensor([before + example, other + example, example + other])
    inputs: dict[str, Any] = {
        "input_ids": rows,
        POSITION_IDS: torch.arange(8).remainder(4) + 0 * rows,
    }
    if "use_cache" in takes:
        inputs["use_cache"] = False  # with a cache, transformers does not look for examples

    def measure(
        outputs: Any, inputs: dict[str, Tensor], targets: Tensor
    ) -> dict[str, tuple[float, float]]:
        logits = outputs["logits"][:, -8:].float()  # without virtual tokens
        alike = torch.stack([logits[0, 4:], logits[1, 4:], logits[2, :4]])
        change = (alike - alike[2]).abs().max()
        noise = 1e-3 if outputs["logits"].dtype == torch.float32 else 3e-2
        return {"leaks": (float(change > noise * alike[2].abs().max()), 1)}

    def collate(rows: Sequence[Any]) -> tuple[dict[str, Any], Tensor]:
        return inputs, torch.zeros(1)

    if POSITION_IDS not in takes or evaluate([0], collate, measure)["leaks"]:
        attention = getattr(pretrained.config, "_attn_implementation", None)
        raise ValueError(
            f"--packing: {pretrained.base}, of type {pretrained.config.model_type} with attention "
            f"{attention}, does not keep the examples of a row apart by position_ids, so that each "
            "would see the one before it. Leave --packing out, or give another model."
        )


def _not_causal(name: str, found: str, task: str) -> str:
    return (
        f"--model {name}: not a causal language model ({found}), so that with --task {task} it "
        f"would see the answer that "
        'it is to predict. Give a causal one (a masked one with "is_decoder": true in its '
        "config.json is), or use --task classification."
    )
