"""Resolve values that follow from other values: "auto" and the batch sizes.

`zods.config.deepspeed_json` calls the functions that need the configuration alone. The functions
that need the model are called once the model's configuration is read.

What is resolved, and how:

    three batch sizes                    each from the other two
    gradient_clipping                    0: a zeroth-order step has no gradient
    fp16.enabled                         false, where bf16.enabled is written out
    amp.enabled                          false
    ZeRO-3 buckets and threshold         from the model's hidden size
    offload_param.buffer_size            the largest shard of a parameter
                                         (also where the key is left out)
    offload_param.buffer_count, max_in_cpu   DeepSpeed's defaults
    parameters of the scheduler          see `zods.config.schedules`

`bf16.enabled` is not resolved: an "auto" that becomes fp32 would double the memory silently. Any
other "auto" is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
MOST_RANKS = 1024  # a message lists the divisors of a batch up to this number of ranks
_BUCKETS = {  # the rule of transformers, by hidden size
    "reduce_bucket_size": lambda h: h * h,
    "stage3_prefetch_bucket_size": lambda h: int(0.9 * h * h),
    "stage3_param_persistence_threshold": lambda h: 10 * h,
}
_OFFLOAD = ("buffer_size", "buffer_count", "max_in_cpu")
_MODEL_AUTO = {f"zero_optimization.{key}" for key in _BUCKETS} | {
    f"zero_optimization.offload_param.{key}" for key in _OFFLOAD
}


def resolve_batch(ds: dict[str, Any], world_size: int) -> None:
    """Fill in the missing one of DeepSpeed's three batch sizes, in place, and check their product.

    A size of "auto" counts as missing. Raises ValueError where a size is not a whole number of 1 or
    more, where too few sizes are given, or where train_batch_size is not the product of the other
    two and the number of ranks.
    """
    given = {key: ds[key] for key in BATCH_KEYS if ds.get(key, "auto") != "auto"}
    for key, value in given.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{key}: found {value!r}, expected a whole number, 1 or more.")
    batch, micro, accumulation = (given.get(key) for key in BATCH_KEYS)
    if batch is None and micro is None:
        raise ValueError(
            "train_batch_size, train_micro_batch_size_per_gpu: give one of the two, in the JSON "
            "or on the command line."
        )
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
        named = {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
        }
        factors = [f"{key} ({value})" for key, value in named.items() if key in given]
        product = " x ".join([*factors, f"ranks ({world_size})"])
        multiplied = world_size
        for key in named:
            multiplied *= given.get(key, 1)
        fits = ", ".join(
            str(number) for number in range(1, min(batch, MOST_RANKS) + 1) if batch % number == 0
        )
        raise ValueError(
            f"train_batch_size: found {batch}, but {product} = "
            f"{multiplied}{'' if len(factors) == 2 else ', of which it is no multiple'}. Change "
            f"one so that they multiply out: {batch} examples can be split over {fits} ranks, and "
            "a rank's part over any number of micro-batches that divides it."
        )
    ds.update(zip(BATCH_KEYS, (batch, micro, accumulation), strict=True))


def resolve_precision(ds: dict[str, Any]) -> Iterator[str]:
    """Set fp16.enabled "auto" to false, in place, and remove an amp section that is off or "auto".

    Yields a message where the dtype of the weights would be a guess. The amp section is removed
    because DeepSpeed refuses the key whatever its value.
    """
    amp, bf16, fp16 = ds.get("amp"), ds.get("bf16"), ds.get("fp16")
    if isinstance(amp, Mapping) and amp.get("enabled", False) in (False, "auto"):
        del ds["amp"]
    if isinstance(bf16, Mapping):
        enabled = bf16.get("enabled")
        if enabled == "auto" or "enabled" not in bf16:
            also = (
                ' Then fp16.enabled "auto" is false.'
                if isinstance(fp16, Mapping) and fp16.get("enabled") == "auto"
                else ""
            )
            found = 'found "auto", which is not guessed' if enabled == "auto" else "missing"
            yield (
                f"bf16.enabled: {found}. Write true (weights in bfloat16) or false (in "
                f"float32).{also}"
            )
        elif type(enabled) is not bool:
            yield f"bf16.enabled: found {enabled!r}, allowed are true and false."
    if isinstance(fp16, Mapping) and fp16.get("enabled") == "auto":
        if not isinstance(bf16, Mapping):
            yield (
                'fp16.enabled: found "auto", which is not guessed. Write false (weights in '
                "float32), or add "
                '"bf16": {"enabled": true} (in bfloat16).'
            )
        ds["fp16"] = {**fp16, "enabled": False}


def unresolved(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield a message for every "auto" that cannot be resolved.

    An "auto" can be resolved from the rest of the configuration or from the model.
    """
    for key, value in values.items():
        here = f"{path}{key}"
        if isinstance(value, Mapping):
            yield from unresolved(value, here + ".")
        elif value == "auto" and here not in _MODEL_AUTO and here not in BATCH_KEYS:
            yield f'{here}: "auto" cannot be resolved here; give a value, or leave the key out.'


def hidden_size_of(config: Any) -> int | None:
    """The hidden size in a model's configuration of transformers; None where it has no such key.

    In a configuration of several parts, the text part counts.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "hidden_size", None)


def resolve_model_auto(
    ds: dict[str, Any], hidden_size: int | None, *, overlaps: bool = True
) -> None:
    """Resolve the ZeRO-3 buckets given as "auto" from the model's hidden size, in place.

    The rule is the rule of transformers. Without a hidden size the keys are removed, so that
    DeepSpeed's defaults hold.

    overlaps: whether all-gathers run beside the computation. On CPUs they do not. Prefetching then
    takes memory and gains nothing, so it is turned off unless the JSON gives a number. With NVMe
    offload prefetching stays on, because reading ahead from the drive depends on it.
    """
    zero = ds.get("zero_optimization", {})
    key = "stage3_prefetch_bucket_size"
    if (
        not overlaps
        and zero.get("stage") == 3
        and not offloads_to_nvme(ds)
        and zero.get(key, "auto") == "auto"
    ):
        zero[key] = 0
    for key, rule in _BUCKETS.items():
        if zero.get(key) == "auto":
            if hidden_size is None:
                del zero[key]
            else:
                zero[key] = rule(hidden_size)


def offloads_to_nvme(ds: Mapping[str, Any]) -> bool:
    return ds.get("zero_optimization", {}).get("offload_param", {}).get("device") == "nvme"


def resolve_offload_buffers(ds: dict[str, Any], numels: Iterable[int], world_size: int) -> None:
    """Set the buffer sizes of NVMe offload from the model's parameters, in place.

    A buffer holds one rank's shard of one parameter. Where no size is given, the size becomes the
    size of the largest shard.

    numels: the number of elements of each whole parameter.
    Raises ValueError where the size given is smaller than the largest shard: DeepSpeed 0.19.8
    asserts that a shard fits while it loads the model.
    """
    if not offloads_to_nvme(ds):
        return
    offload = ds["zero_optimization"]["offload_param"]
    for key in _OFFLOAD:
        if offload.get(key) == "auto":
            del offload[key]
    needed = -(-max(numels, default=1) // world_size)
    size = offload.setdefault("buffer_size", needed)
    if size < needed:
        raise ValueError(
            f"zero_optimization.offload_param.buffer_size: found {size}, but the largest shard of "
            f"a parameter has {needed} elements on {world_size} ranks. Give {needed} or more, or "
            "leave the key out."
        )
