"""Merge the options of `zods.finetune` that override keys into the DeepSpeed JSON.

Caller: `zods.finetune`.
"""

from __future__ import annotations

from typing import Any

from zods.cli.options import BATCH_OVERRIDES, Arguments
from zods.config.deepspeed_json import load_json
from zods.config.schema import SVRG_ONLY
from zods.config.section import SECTION
from zods.tasks import TASKS

# Keys of the section that an optimizer leaves in force
KEPT_WITH_OPTIMIZER = (
    *("seed", "selector", "loss_mean"),
    *("group_by_length", "mixture", "dataloader_num_workers"),
)
# Parameters of WarmupDecayLR: from lr to 0 over the run. With last_batch_iteration the first step has
# lr; without it, DeepSpeed 0.19.8 gives the first two steps a step size of 0.
DECAY = {
    "last_batch_iteration": 0,
    "warmup_min_lr": 0,
    "warmup_max_lr": "auto",
    "warmup_num_steps": 1,
    "total_num_steps": "auto",
}


def merged_config(arguments: Arguments) -> dict[str, Any]:
    """Merge the options that override keys into the DeepSpeed JSON.

    Where lr is "auto", and the JSON has neither "scheduler" nor "anneal", a linear decay is added: the
    step size is measured at the start only, and the curvature grows.
    """
    model, selection = arguments.model, arguments.selection
    config = load_json(model.deepspeed_config)
    section = config.get(SECTION, {})
    if not isinstance(section, dict) or not isinstance(section.get("selector") or {}, dict):
        return config  # a later check refuses it
    given = arguments.overrides.section()
    if model.optimizer is not None:
        rates: dict[str, Any] = {
            key: given.pop(key) for key in ("lr", "weight_decay") if key in given
        }
        config["optimizer"] = _optimizer(config, rates)
        section = {key: value for key, value in section.items() if key in KEPT_WITH_OPTIMIZER}
    elif given.get("method") == "mezo":
        section = {key: value for key, value in section.items() if key not in SVRG_ONLY}
    if model.replica is not None:
        given["replicas"] = {
            **(section.get("replicas") or {}),
            "store": model.replica_store,
            "index": model.replica,
        }
    selector = selection.selector()
    if arguments.data.mixture_weights is not None:
        given["mixture"] = _mixture(arguments, section.get("mixture"), selector)
    declared = TASKS.get(arguments.task.task)
    written = section.get("selector") or {}
    if (selector or written) and declared is not None and declared.source_column is not None:
        selector = {"source_column": declared.source_column, **written, **selector}
    if selector:
        given["selector"] = {**written, **selector}
    config[SECTION] = {**section, **given}
    measured = config[SECTION].get("lr", "auto") == "auto"
    if model.optimizer is None and measured and config[SECTION].get("anneal") is None:
        config.setdefault("scheduler", {"type": "WarmupDecayLR", "params": dict(DECAY)})
    batch = arguments.overrides.batch()
    if selection.select is not None:
        micro = config.get("train_micro_batch_size_per_gpu")
        batch = {"train_batch_size": selection.select.chosen, **batch}
        if micro is not None and len(batch) == 1:
            batch["train_micro_batch_size_per_gpu"] = micro
    if batch:  # the given sizes determine the sizes that are not given
        config = {key: value for key, value in config.items() if key not in BATCH_OVERRIDES} | batch
    return config


def _mixture(arguments: Arguments, written: Any, selector: dict[str, Any]) -> dict[str, Any]:
    """Build the section "mixture" from the option of the weights and the column of the sources.

    The column is --source_column, which is taken out of `selector`, else that of the JSON's own
    section `written`, else that of a task with its own data.
    """
    assert arguments.data.mixture_weights is not None
    declared = TASKS.get(arguments.task.task)
    columns = (
        selector.pop("source_column", None),
        written.get("source_column") if isinstance(written, dict) else None,
        None if declared is None else declared.source_column,
    )
    column = next((name for name in columns if name is not None), None)
    if column is None:
        raise ValueError(
            "--mixture_weights: given without --source_column. Name the column of the sources."
        )
    return {"source_column": column, "weights": arguments.data.mixture_weights.values}


def _optimizer(config: dict[str, Any], rates: dict[str, Any]) -> dict[str, Any]:
    """Build the section "optimizer" from the JSON's own section, or for AdamW, with these rates."""
    optimizer = config.get("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
    if not isinstance(optimizer, dict) or str(optimizer.get("type")).lower() != "adamw":
        raise ValueError(
            f"optimizer: found {optimizer!r}, but --optimizer adamw was asked for. Change one of "
            "them."
        )
    params = {**optimizer.get("params", {}), **rates}
    if params.get("lr", "auto") == "auto":
        raise ValueError(
            "--lr: missing, or auto; the step size of zeroth-order steps is not used with an "
            "optimizer. Give a step size for the optimizer."
        )
    return {**optimizer, "params": params}
