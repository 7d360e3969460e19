"""Put adapters of PEFT into a loaded model. Caller: `zods.cli.load_model`.

PEFT is an extra, so that it is imported inside the functions.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch

from zods.cli.model_checks import adapter_task_type
from zods.cli.options import ModelArguments
from zods.cli.pretrained import errors_in_one_line
from zods.config.config_errors import nearest
from zods.config.deepspeed_json import load_json
from zods.tasks import Task
from zods.trajectory.base_weights import name_in_files

NEED_GRADIENTS = {"ADALORA": "chooses its ranks by gradients."}
ALL_LINEAR = "all-linear"  # peft's name for all linear modules except the output layer


def with_new_adapter(arguments: ModelArguments, model: Any, task: Task, new: set[str]) -> Any:
    """Wrap the model with new adapters.

    new: names of the parameters that are not in the base model's files. The modules of these
    parameters and a classification head get no adapter: all their weights are trained, and saved
    with the adapter.

    Raises ValueError where an adapter fits no module of the model, or cannot train the modules of
    `new`.
    """
    import peft

    whole = _modules_trained_whole(model, task, new)
    rank = arguments.lora_rank
    if rank is None:
        assert arguments.peft_config is not None
        config = read_peft_config(Path(arguments.peft_config), task)
        if hasattr(config, "modules_to_save"):
            config.modules_to_save = [*whole, *(config.modules_to_save or [])] or None
        elif new:
            raise ValueError(
                f"--peft_config {arguments.peft_config}: {config.peft_type.value} trains no module "
                f"as a whole, but {', '.join(sorted(new))} are not in the model's files and would "
                "keep their random values. Give another peft_type, or a model with these weights."
            )
        what = f"--peft_config {arguments.peft_config}: it does not fit the model"
        with errors_in_one_line(what), _preserve_compilers():
            return peft.get_peft_model(model, config)
    targets = _target_modules(model, arguments.lora_target_modules)
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        exclude_modules=(whole or None) if targets is not None else None,
        modules_to_save=whole or None,
    )
    return peft.get_peft_model(model, lora)


def read_peft_config(path: Path, task: Task) -> Any:
    """Read the configuration of adapters from a JSON file, such as an adapter_config.json.

    Raises ValueError or OSError that names the file, and the key where one is wrong, or does not
    fit the task.
    """
    import peft

    values = load_json(path)
    kinds = {str(kind.value): of for kind, of in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = values.pop("peft_type", None)
    if kind not in kinds or kind in NEED_GRADIENTS:
        raise ValueError(
            f"--peft_config {path}: peft_type is {kind!r}; allowed are "
            f"{', '.join(sorted(kinds.keys() - NEED_GRADIENTS.keys()))}."
            + (f" {kind} {NEED_GRADIENTS[kind]}" if kind in NEED_GRADIENTS else "")
        )
    known = {field.name for field in dataclasses.fields(kinds[kind])}
    for key in values:
        if key not in known:
            raise ValueError(
                f"--peft_config {path}: {kind} has no key {key!r}.{nearest(key, sorted(known))}"
            )
    needed = adapter_task_type(task)
    given = values.get("task_type") or needed
    if given != needed:
        raise ValueError(
            f"--peft_config {path}: task_type is {given!r}, but --task {task.name} needs {needed!r}. "
            "Leave task_type out, or give another --task."
        )
    with errors_in_one_line(f"--peft_config {path}"):
        return kinds[kind](**{**values, "task_type": needed, "inference_mode": False})


def _modules_trained_whole(model: Any, task: Task, new: set[str]) -> list[str]:
    """Names of the modules that get no adapter, because all their weights are trained.

    new: names of the parameters that are not in the base model's files.
    """
    whole = []
    if task.name == "classification":
        base = model.base_model_prefix
        whole = [
            name
            for name, child in model.named_children()
            if name != base and any(True for _ in child.parameters())
        ]
    without_weights = {name.rpartition(".")[0] for name in new}
    return whole + sorted(
        name for name in without_weights if name and name.partition(".")[0] not in whole
    )


def _target_modules(model: Any, names: Sequence[str] | None) -> Any:
    """The value of `LoraConfig.target_modules`: module names, "all-linear", or None.

    names: the option --lora_target_modules. Without it the result is None, which is peft's choice
    for the model type, or "all-linear" where peft has no choice. Raises ValueError for a name that
    no module has.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS

    targets: Any = None if names is None else list(names)
    if targets == [ALL_LINEAR] or (
        targets is None and model.config.model_type not in DEFAULT_TARGETS
    ):
        targets = ALL_LINEAR
    if isinstance(targets, list):
        found = [name for name, _ in model.named_modules()]
        missing = [
            target
            for target in targets
            if not any(f".{name}".endswith(f".{target}") for name in found)
        ]
        if missing:
            linear = sorted(
                {
                    n.rpartition(".")[2]
                    for n, m in model.named_modules()
                    if isinstance(m, torch.nn.Linear)
                }
            )
            raise ValueError(
                f"--lora_target_modules: the model has no module {missing[0]!r}; its linear "
                f"modules are {', '.join(linear)}"
            )
    return targets


def with_trained_adapter(model: Any, adapter: str, new: set[str]) -> Any:
    """Wrap the model with an adapter that was trained before, to continue its training.

    new: names of the parameters that are not in the base model's files.

    Raises ValueError where the adapter does not fit the model, and where a parameter of `new` is
    not in the adapter either. Such a parameter would keep its random initial values.
    """
    import peft

    with errors_in_one_line(f"--model {adapter}: the adapter cannot be put into its base model"):
        config = peft.PeftConfig.from_pretrained(adapter)
        config.inference_mode = False
        with _preserve_compilers():
            model = peft.get_peft_model(model, config)
        weights = peft.load_peft_weights(adapter, device="cpu")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    untrained = sorted(
        new - {name_in_files(name.replace(".modules_to_save.default.", ".")) for name in trained}
    )
    if untrained:
        raise ValueError(
            f"--model {adapter}: neither the adapter nor its base model has weights of "
            f"{', '.join(untrained)}, which would be drawn at random, stay frozen and not be "
            "exported. Give an adapter with these modules in its modules_to_save, or its base "
            "model with --lora_rank."
        )
    fits = errors_in_one_line(f"--model {adapter}: the adapter's weights do not fit its base model")
    with fits, deepspeed.zero.GatheredParameters(list(trained.values()), modifier_rank=0):
        result: Any = peft.set_peft_model_state_dict(model, weights)
    missing = sorted(set(result.missing_keys) & set(trained))
    odd = [*result.unexpected_keys, *missing]
    if odd:
        raise ValueError(
            f"--model {adapter}: the adapter does not fit its base model in this task: {odd[0]} is "
            f"{'in the adapter only' if result.unexpected_keys else 'not in the adapter'}."
        )
    return model


@contextmanager
def _preserve_compilers() -> Iterator[None]:
    """Restore the environment variables CC and CXX after the block.

    PEFT 0.21 sets both to gcc and leaves them so where its CUDA extension for BOFT cannot be built.
    With another compiler, torch would rebuild DeepSpeed's operators, which takes minutes.
    """
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
