"""Check DeepSpeed's part of the configuration before anything is loaded.

`zods.config.deepspeed_json` calls the checks. Each check is a generator of messages, one line per
mistake. The checks answer three questions:

- Does the installed DeepSpeed read this key? (`key_mistakes`)
- Does DeepSpeed accept this value? (`section_mistakes` and `refusal` ask DeepSpeed's own classes)
- Can a zeroth-order step use it? (`unsupported`)
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.activation_checkpointing.config import DeepSpeedActivationCheckpointingConfig
from deepspeed.runtime.config import DeepSpeedConfig, HybridEngineConfig
from deepspeed.runtime.model_checkpointing.config import CHECKPOINT_DEFAULT_DICT
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import logger as deepspeed_logger
from pydantic import BaseModel, ValidationError

from zods.config.config_errors import nearest
from zods.config.section import SECTION

VERSION = importlib.metadata.version("deepspeed")
# Top-level keys that DeepSpeed 0.19.8 reads. It ignores any other silently. A test compares them
# with the installed one.
DEEPSPEED_KEYS = frozenset(
    """activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet
    comms_logger communication_data_type compile csv_monitor data_efficiency data_types
    dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc dump_state
    expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op
    gradient_clipping gradient_predivide_factor hybrid_engine log_level
    managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients
    scheduler seq_parallel_communication_data_type sequence_parallel_size steps_per_print
    tensor_parallel tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization""".split()  # noqa: SIM905
)
# Keys that DeepSpeed 0.19.8 refuses, whatever their value, because what they configured was removed
# from it.
REMOVED_KEYS = frozenset(
    """amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting
    nebula progressive_layer_drop quantize_training sparse_attention sparse_gradients
    zero_optimization.mics_hierarchical_params_gather zero_optimization.mics_shard_size
    zero_optimization.zeropp_loco_param""".split()  # noqa: SIM905
)
# {section: DeepSpeed's own pydantic model of it}. A model refuses unknown keys.
MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
    "compile": CompileConfig,
    "hybrid_engine": HybridEngineConfig,
}
# {section: the keys that DeepSpeed reads in it}. DeepSpeed ignores any other key silently.
OTHER_SECTIONS: dict[str, list[str]] = {
    "aio": list(AIO_DEFAULT_DICT),
    "flops_profiler": list(vars(DeepSpeedFlopsProfilerConfig({}))),
    "activation_checkpointing": list(vars(DeepSpeedActivationCheckpointingConfig({}))),
    "checkpoint": [
        *CHECKPOINT_DEFAULT_DICT,
        "load_universal",
        "parallel_write",
        "use_node_local_storage",
    ],
    "data_types": ["grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"],
}


def key_mistakes(ds: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each key that the installed DeepSpeed does not read, or refuses."""
    zero = ds.get("zero_optimization")
    inner = [f"zero_optimization.{key}" for key in zero] if isinstance(zero, Mapping) else []
    for key in [*ds, *inner]:
        if key in REMOVED_KEYS:
            way = 'Use "bf16" instead.' if key == "amp" else "Remove it."
            yield (
                f"{key}: DeepSpeed {VERSION} refuses this key, whatever its value: its feature was "
                f"removed. {way}"
            )
        elif key in ds and key not in DEEPSPEED_KEYS:
            hint = nearest(key, [*DEEPSPEED_KEYS, SECTION])
            if key == "seed":
                hint = f' The seed is "{SECTION}": {{"seed": ...}}.'
            yield f"{key}: unknown key; neither DeepSpeed nor zods reads it.{hint}"
    if "bfloat16" in ds:
        yield 'bfloat16: not supported; use "bf16".'


def section_mistakes(ds: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each key or value that DeepSpeed's own section classes refuse.

    They refuse unknown keys, and values of another type or outside their range.
    """
    for name in (*MODELS, *OTHER_SECTIONS):
        values = ds.get(name, {})
        if not isinstance(values, Mapping):
            yield f"{name}: found {values!r}, expected a section {{...}}."
        elif name in OTHER_SECTIONS:
            for key in sorted(set(values) - set(OTHER_SECTIONS[name])):
                hint = _hint(key, OTHER_SECTIONS[name])
                yield f"{name}.{key}: unknown key; DeepSpeed does not read it.{hint}"
        else:
            yield from _model_mistakes(name, MODELS[name], values)


def _model_mistakes(name: str, model: type[BaseModel], values: Mapping[str, Any]) -> Iterator[str]:
    try:
        with quiet():
            model(
                **_without_auto(
                    {
                        key: value
                        for key, value in values.items()
                        if f"{name}.{key}" not in REMOVED_KEYS
                    }
                )
            )
    except ValidationError as error:
        for found in error.errors():
            path = [str(part) for part in found["loc"]]
            here = ".".join([name, *path])
            if found["type"] == "extra_forbidden":
                allowed = _fields_at(model, path[:-1])
                yield f"{here}: unknown key; DeepSpeed does not read it.{_hint(path[-1], allowed)}"
            else:
                yield f"{here}: found {found['input']!r}. DeepSpeed: {found['msg']}."
    # DeepSpeed's validators raise AssertionError for deprecated keys, and other types.
    except Exception as error:
        yield f"{name}: DeepSpeed refuses it: {first_line(error)}"


def _hint(key: str, allowed: list[str]) -> str:
    return nearest(key, allowed) or f" Allowed keys are {', '.join(sorted(allowed))}."


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """List the keys of the section at `path` in a pydantic model."""
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        inner = [t for t in (annotation, *typing.get_args(annotation)) if isinstance(t, type)]
        model = next((t for t in inner if issubclass(t, BaseModel)), model)
    return [field.alias or name for name, field in model.model_fields.items()]


def _without_auto(values: Any) -> Any:
    """Make a deep copy without the values that are "auto".

    `zods.config.auto_values` resolves or refuses an "auto".
    """
    if isinstance(values, Mapping):
        return {key: _without_auto(value) for key, value in values.items() if value != "auto"}
    return copy.deepcopy(values)


def refusal(ds: Mapping[str, Any]) -> str | None:
    """Say why DeepSpeed would refuse this configuration; None where it would accept it.

    This finds mistakes that the checks above do not know. DeepSpeed's own class reads the
    configuration, with batch sizes that fit any number of ranks.
    """
    config = {
        **_without_auto(ds),
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
    }
    config.pop("train_batch_size", None)
    try:
        with quiet():
            DeepSpeedConfig(config)
    except Exception as error:
        return (
            f"configuration: DeepSpeed {VERSION} refuses it: {type(error).__name__}: "
            f"{first_line(error)}"
        )
    return None


def offload_mistakes(ds: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message where a section offloads to NVMe but gives no folder."""
    zero = ds.get("zero_optimization", {})
    for key in ("offload_param", "offload_optimizer"):
        offload = zero.get(key) if isinstance(zero, Mapping) else None
        if (
            isinstance(offload, Mapping)
            and offload.get("device") == "nvme"
            and not offload.get("nvme_path")
        ):
            yield (
                f"zero_optimization.{key}.nvme_path: missing; device is nvme. Give a folder on the "
                "drive."
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence DeepSpeed's warnings inside the block.

    DeepSpeed gives the same warnings again when it reads the configuration for its engine.
    """
    level = deepspeed_logger.level
    deepspeed_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        deepspeed_logger.setLevel(level)


def first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()
        )
    return next(iter(str(error).strip().splitlines()), "")


# --- what a zeroth-order step cannot use ----------------------------------------------------------


def unsupported(ds: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message with the reason for each setting that a zeroth-order step cannot use."""
    if "optimizer" in ds:
        yield (
            f'optimizer: found beside "{SECTION}". A zeroth-order step has no optimizer states: '
            f"remove the section and set {SECTION}.lr and {SECTION}.weight_decay."
        )
    for key in ("fp16", "torch_autocast"):
        section = ds.get(key, {})
        if not isinstance(section, Mapping):
            yield f"{key}: found {section!r}, expected a section {{...}}."
        elif section.get("enabled", False) is not False:
            yield f'{key}.enabled: not supported. Use "bf16": {{"enabled": true}}, or fp32.'
    clipping = ds.get("gradient_clipping", 0)
    if clipping not in (0, 0.0):
        yield f"gradient_clipping: found {clipping!r}. There is no gradient to clip: remove it."
    for key in ("tensor_parallel", "pipeline", "sequence_parallel_size", "expert_parallel"):
        if ds.get(key) not in (None, {}, 1, {"enabled": False}):
            yield f"{key}: not supported; parameters are sharded by ZeRO-3 alone. Remove it."
    zero = ds.get("zero_optimization", {})
    if isinstance(zero, Mapping):
        yield from _unsupported_zero(zero)


def _unsupported_zero(zero: Mapping[str, Any]) -> Iterator[str]:
    """Yield the messages of `unsupported` for the section "zero_optimization"."""
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 3):
        yield (
            f"zero_optimization.stage: found {stage!r}, allowed are 0 (replicated) and 3 "
            "(sharded). Stages 1 and 2 shard optimizer states and gradients, and a zeroth-order "
            "step has neither."
        )
    for key in ("offload_param", "offload_optimizer"):
        if not isinstance(zero.get(key, {}), Mapping):
            yield f"zero_optimization.{key}: found {zero[key]!r}, expected a section {{...}}."
    offload, states = (
        zero.get(key, {}) if isinstance(zero.get(key, {}), Mapping) else {}
        for key in ("offload_param", "offload_optimizer")
    )
    if states.get("device", "none") != "none":
        yield (
            "zero_optimization.offload_optimizer: there are no optimizer states to offload. "
            f"Remove it; parameters are offloaded by offload_param, the anchor by {SECTION}.anchor."
        )
    if offload.get("device", "none") != "none" and stage != 3:
        yield (
            f"zero_optimization.offload_param: needs stage 3, found stage {stage}. Set stage to 3, "
            "or remove offload_param."
        )
    if zero.get("zero_hpz_partition_size", 1) != 1:
        yield (
            "zero_optimization.zero_hpz_partition_size: not supported: forwards would read a "
            "second copy of the shards that a step does not update. Remove it."
        )
    for key in ("cpu_offload", "cpu_offload_param", "cpu_offload_params"):
        if zero.get(key, False):
            yield (
                f'zero_optimization.{key}: not supported; use "offload_param": {{"device": "cpu"}}.'
            )
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(key, False):
            yield (
                f"zero_optimization.{key}: not supported: losses at quantised points differ. "
                "Remove it."
            )
