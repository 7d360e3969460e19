"""The DeepSpeed JSON with its section "zeroth_order".

`read_config` splits one file into what DeepSpeed gets and what zods keeps, and refuses here, before anything is spent,
whatever the two cannot do together. The file is read as DeepSpeed reads it (hjson: `#` and `//` comments are allowed).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hjson

from zods.section import SECTION, SVRG_ONLY, SelectorConfig, ZerothOrderConfig, check_selector, nearest, parse_section

DEEPSPEED_KEYS = frozenset(  # top-level keys that DeepSpeed 0.19.8 reads; it ignores any other without a word
    """aio amp autotuning bf16 bfloat16 checkpoint comms_logger communication_data_type compile compression_training
    csv_monitor comet curriculum_learning data_efficiency data_types dataloader_drop_last disable_allgather
    disable_python_gc dump_state elasticity eigenvalue flops_profiler fp16 gradient_accumulation_steps
    gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine load_universal log_level
    managed_gradient_accumulation memory_breakdown monitor_config nebula optimizer pipeline prescale_gradients
    progressive_layer_drop quantize_training scheduler seed seq_parallel_communication_data_type sequence_parallel_size
    sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_data_before_expert_parallelism use_node_local_storage wall_clock_breakdown wandb
    weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class RunConfig:
    """One configuration file, split.

    deepspeed: what `deepspeed.initialize` gets: no "zeroth_order", no "scheduler", batch sizes resolved.
    scheduler: DeepSpeed's section of that name, or None; zods builds it on its own step size.
    zeroth_order: the section of that name.
    """

    deepspeed: dict[str, Any]
    scheduler: dict[str, Any] | None
    zeroth_order: ZerothOrderConfig

    @property
    def zero_stage(self) -> int:
        return self.deepspeed.get("zero_optimization", {}).get("stage", 0)

    @property
    def seed(self) -> int:
        return self.zeroth_order.seed

    @property
    def selector(self) -> SelectorConfig | None:
        return self.zeroth_order.selector

    def to_dict(self) -> dict[str, Any]:
        whole = dict(self.deepspeed)
        if self.scheduler is not None:
            whole["scheduler"] = self.scheduler
        section = self.zeroth_order.to_dict()
        if not self.zeroth_order.is_svrg:
            section = {key: value for key, value in section.items() if key not in SVRG_ONLY}
        return {**whole, SECTION: section}


@dataclass(frozen=True)
class FirstOrderConfig:
    """A run with DeepSpeed's own optimizer. deepspeed: what `deepspeed.initialize` gets. seed: of the data order.

    loss_mean: as in the section "zeroth_order".
    """

    deepspeed: dict[str, Any]
    selector: SelectorConfig | None
    seed: int
    loss_mean: str = "tokens"

    @property
    def zero_stage(self) -> int:
        return self.deepspeed.get("zero_optimization", {}).get("stage", 0)

    @property
    def scheduler(self) -> dict[str, Any] | None:
        return self.deepspeed.get("scheduler")

    @property
    def zeroth_order(self) -> ZerothOrderConfig:
        """What of that section counts: the seed, the selector and the mean of the loss."""
        return ZerothOrderConfig(method="mezo", seed=self.seed, selector=self.selector, loss_mean=self.loss_mean)

    def to_dict(self) -> dict[str, Any]:
        section = None if self.selector is None else asdict(self.selector)
        return {**self.deepspeed, SECTION: {"seed": self.seed, "selector": section, "loss_mean": self.loss_mean}}


def read_first_order_config(source: str | Path | Mapping[str, Any], world_size: int) -> FirstOrderConfig:
    """As `read_config`, with a section "optimizer"; of "zeroth_order" only `selector`, `seed` and `loss_mean` may be there."""
    whole = load_json(source)
    values = whole.pop(SECTION, {})
    if not isinstance(values, Mapping):
        raise ValueError(f"{SECTION}: found {values!r}, expected a section {{...}}.")
    extra = sorted(set(values) - {"selector", "seed", "loss_mean"})
    if extra:
        raise ValueError(f"{SECTION}.{extra[0]}: belongs to zeroth-order steps. With an optimizer leave it out.")
    section = parse_section({"method": "mezo", **values})
    _resolve_batch(whole, world_size)
    _refuse_auto(whole, "")
    if section.selector is not None:
        check_selector(section.selector, f"{SECTION}.selector", whole["train_batch_size"])
    return FirstOrderConfig(whole, section.selector, section.seed, section.loss_mean)


def load_json(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as a plain dict, from a path or a mapping. Raises ValueError or FileNotFoundError."""
    if isinstance(source, Mapping):
        return json.loads(json.dumps(source))
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"configuration file {path}: not found. Give a DeepSpeed JSON, e.g. one of ds_configs/."
        )

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"configuration file {path}: {', '.join(twice)} given twice.")
        return dict(pairs)

    try:
        loaded = hjson.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except (hjson.HjsonDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"configuration file {path}: not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"configuration file {path}: expected {{...}}, found {type(loaded).__name__}.")
    return loaded


def read_config(source: str | Path | Mapping[str, Any], world_size: int) -> RunConfig:
    """Read, check and split a configuration.

    source: path of a DeepSpeed JSON, or its content. world_size: number of ranks, for the batch sizes.
    Raises ValueError or FileNotFoundError that names the key or file, what was found and what is allowed.
    """
    whole = load_json(source)
    if SECTION not in whole:
        raise ValueError(
            f'configuration: no section "{SECTION}". Add one, e.g. "{SECTION}": {{"method": "mezo", "lr": 1e-6}}, or '
            "call deepspeed.initialize for first-order training."
        )
    section = parse_section(whole.pop(SECTION))
    _refuse_unsupported(whole)
    scheduler = whole.pop("scheduler", None)
    if scheduler is not None:
        scheduler = _resolved_scheduler(scheduler, section)
    _resolve_batch(whole, world_size)
    _refuse_auto(whole, "")
    if section.selector is not None:
        check_selector(section.selector, f"{SECTION}.selector", whole["train_batch_size"])
    return RunConfig(deepspeed=whole, scheduler=scheduler, zeroth_order=section)


def _refuse_unsupported(ds: dict[str, Any]) -> None:
    """Raise ValueError for a part of DeepSpeed that a zeroth-order step cannot use, with the reason."""

    def enabled(key: str) -> bool:
        section = ds.get(key)
        return isinstance(section, dict) and section.get("enabled", False) is not False

    zero = ds.get("zero_optimization", {})
    sections: dict[str, Any] = {
        key: ds[key] for key in ("bf16", "fp16", "torch_autocast", "zero_optimization") if key in ds
    }
    if isinstance(zero, Mapping):
        offloads = ("offload_param", "offload_optimizer")
        sections |= {f"zero_optimization.{key}": zero[key] for key in offloads if key in zero}
    for name, value in sections.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}: found {value!r}, expected a section {{...}}.")
    if "optimizer" in ds:
        raise ValueError(
            f'optimizer: found beside "{SECTION}". A zeroth-order step has no optimizer states: remove the section and '
            f"set {SECTION}.lr and {SECTION}.weight_decay."
        )
    if enabled("fp16"):
        raise ValueError('fp16.enabled: not supported. Use "bf16": {"enabled": true}, or fp32.')
    unknown = sorted(set(ds) - DEEPSPEED_KEYS)
    if unknown:
        raise ValueError(
            f"{unknown[0]}: unknown key; neither DeepSpeed nor zods reads it.{nearest(unknown[0], [*DEEPSPEED_KEYS, SECTION])}"
        )
    for key, instead in (("bfloat16", "bf16"), ("amp", "bf16")):
        if key in ds:
            raise ValueError(f'{key}: not supported; use "{instead}".')
    if enabled("torch_autocast"):
        raise ValueError('torch_autocast.enabled: not supported. Use "bf16": {"enabled": true}, or fp32.')
    if ds.get("gradient_clipping", 0) not in (0, 0.0):
        raise ValueError(
            f"gradient_clipping: found {ds['gradient_clipping']!r}. There is no gradient to clip: remove it."
        )
    for key in ("tensor_parallel", "pipeline", "sequence_parallel_size"):
        if ds.get(key) not in (None, {}, 1):
            raise ValueError(f"{key}: not supported; parameters are sharded by ZeRO-3 alone. Remove it.")
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 3):
        raise ValueError(
            f"zero_optimization.stage: found {stage!r}, allowed are 0 (replicated) and 3 (sharded). Stages 1 and 2 shard "
            "optimizer states and gradients, and a zeroth-order step has neither."
        )
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        raise ValueError(
            "zero_optimization.offload_optimizer: there are no optimizer states to offload. Remove it; parameters are "
            f"offloaded by offload_param, the anchor by {SECTION}.anchor."
        )
    offload = zero.get("offload_param", {})
    if offload.get("device", "none") != "none" and stage != 3:
        raise ValueError(f"zero_optimization.offload_param: needs stage 3, found stage {stage}.")
    if offload.get("device") == "nvme" and not offload.get("nvme_path"):
        raise ValueError("zero_optimization.offload_param.nvme_path: missing; device is nvme.")
    for key, off in (("zero_hpz_partition_size", 1), ("mics_shard_size", -1)):
        if zero.get(key, off) != off:
            raise ValueError(
                f"zero_optimization.{key}: not supported: forwards would read a second copy of the shards that a step "
                "does not update. Remove it."
            )
    for key in ("cpu_offload", "cpu_offload_param", "cpu_offload_params"):
        if zero.get(key, False):
            raise ValueError(f'zero_optimization.{key}: not supported; use "offload_param": {{"device": "cpu"}}.')
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(key, False):
            raise ValueError(f"zero_optimization.{key}: not supported: losses at quantised points differ. Remove it.")


def _resolved_scheduler(scheduler: Any, section: ZerothOrderConfig) -> dict[str, Any]:
    """The section "scheduler" with the "auto" values that follow from `lr` resolved."""
    if not isinstance(scheduler, dict) or not isinstance(scheduler.get("type"), str):
        raise ValueError(f'scheduler: found {scheduler!r}, expected {{"type": NAME, "params": {{...}}}}.')
    unknown = sorted(set(scheduler) - {"type", "params"})
    if unknown:
        raise ValueError(f"scheduler.{unknown[0]}: unknown key. Allowed are type and params.")
    if not isinstance(scheduler.get("params", {}), Mapping):
        raise ValueError(f"scheduler.params: found {scheduler['params']!r}, expected a section {{...}}.")
    known = {"warmup_max_lr": section.lr, "warmup_min_lr": 0.0}
    params = {k: known[k] if v == "auto" and k in known else v for k, v in scheduler.get("params", {}).items()}
    _refuse_auto(params, "scheduler.params.")
    return {**scheduler, "params": params}


def _resolve_batch(ds: dict[str, Any], world_size: int) -> None:
    """Fill in the one of DeepSpeed's three batch keys that is missing or "auto", and check that they multiply out."""
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    given = {key: ds[key] for key in keys if ds.get(key, "auto") != "auto"}
    for key, value in given.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{key}: found {value!r}, expected a whole number, 1 or more.")
    batch, micro, accumulation = (given.get(key) for key in keys)
    if batch is None and micro is None:
        raise ValueError("train_batch_size, train_micro_batch_size_per_gpu: give one of the two.")
    if micro is None and accumulation is None:
        accumulation = 1
    if batch is None:
        assert micro is not None
        accumulation = accumulation or 1
        batch = micro * accumulation * world_size
    elif micro is None:
        assert accumulation is not None
        micro = batch // (accumulation * world_size)
    elif accumulation is None:
        accumulation = batch // (micro * world_size)
    if batch != micro * accumulation * world_size:
        fits = ", ".join(str(number) for number in range(1, batch + 1) if batch % number == 0)
        raise ValueError(
            f"train_batch_size: found {batch}, but train_micro_batch_size_per_gpu ({micro}) x "
            f"gradient_accumulation_steps ({accumulation}) x ranks ({world_size}) = "
            f"{micro * accumulation * world_size}. Change one so that they multiply out: {batch} examples are dealt to {fits} "
            "ranks, in as many micro-batches as divide what each gets."
        )
    ds.update(zip(keys, (batch, micro, accumulation), strict=True))


def resolve_model_auto(ds: dict[str, Any], hidden_size: int | None) -> None:
    """Resolve the ZeRO-3 buckets given as "auto" by transformers' rule, from the model's hidden size, in place.

    Without a hidden size the keys are removed, so that DeepSpeed's defaults hold.
    """
    zero = ds.get("zero_optimization", {})
    rules = {
        "reduce_bucket_size": lambda h: h * h,
        "stage3_prefetch_bucket_size": lambda h: int(0.9 * h * h),
        "stage3_param_persistence_threshold": lambda h: 10 * h,
    }
    for key, rule in rules.items():
        if zero.get(key) == "auto":
            if hidden_size is None:
                del zero[key]
            else:
                zero[key] = rule(hidden_size)


_MODEL_AUTO = {
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
}


def _refuse_auto(values: Mapping[str, Any], path: str) -> None:
    for key, value in values.items():
        here = f"{path}{key}"
        if isinstance(value, Mapping):
            _refuse_auto(value, here + ".")
        elif value == "auto" and here not in _MODEL_AUTO:
            raise ValueError(f'{here}: "auto" cannot be resolved here; give a value, or leave the key out.')
