"""Load the pretrained model of a run, with a new head or adapters where they are needed.

Caller: `zods.finetune`.
"""

from __future__ import annotations

import logging
import random
import re
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers.integrations import HfDeepSpeedConfig

from zods.cli.adapters import with_new_adapter, with_trained_adapter
from zods.cli.options import ModelArguments
from zods.cli.pretrained import Pretrained
from zods.config.deepspeed_json import FirstOrderConfig, RunConfig
from zods.files import atomic_files
from zods.tasks import Task
from zods.trajectory.base_weights import name_in_files

logger = logging.getLogger(__name__)


def load_model(
    arguments: ModelArguments, run: RunConfig | FirstOrderConfig, task: Task, pretrained: Pretrained
) -> tuple[torch.nn.Module, list[str]]:
    """Load the pretrained model for the task. In a stage 3 run it is sharded while it is loaded.

    A new head is initialised at random from the seed.

    Returns the model, and the names of the parameters that are not in the base model's files: the
    parameters of a new head and of adapters.
    """
    # transformers.set_seed does the same, but its module imports peft: seconds
    random.seed(run.seed)
    numpy.random.seed(run.seed % 2**32)  # larger ones are refused
    torch.manual_seed(run.seed)
    mismatched = pretrained.mismatched_head(task, arguments.trust_remote_code)
    options = task.model_kwargs()
    if mismatched:
        logger.warning(
            "the head of %s is for %d classes, the data have %d: a new head is drawn",
            pretrained.base, pretrained.config.num_labels, options["num_labels"],
        )  # fmt: skip
        # ignore_mismatched_sizes does not work under ZeRO-3 (transformers 5.23: only rank 0 sees
        # the sizes). Instead, the head's weights get names that the model does not have.
        options["key_mapping"] = {f"^{re.escape(name)}$": f"replaced_{name}" for name in mismatched}
    elif pretrained.class_names is not None and task.name == "classification":
        own, data = pretrained.class_names, list(options["id2label"].values())
        # transformers generates names of this form where the classes have no names.
        generated = all(re.fullmatch(r"LABEL_\d+", name) for name in own)
        if own != data and not generated:
            logger.warning(
                "the head's classes %s become %s, in this order", ", ".join(own), ", ".join(data)
            )
    # transformers looks for a live HfDeepSpeedConfig object while from_pretrained runs
    sharded = HfDeepSpeedConfig(run.deepspeed) if run.zero_stage == 3 else None
    model, info = task.auto_class().from_pretrained(
        pretrained.base,
        output_loading_info=True,
        dtype=torch.bfloat16
        if run.deepspeed.get("bf16", {}).get("enabled", False)
        else torch.float32,
        trust_remote_code=arguments.trust_remote_code,
        **options,
    )
    del sharded
    new = set(info["missing_keys"])
    if arguments.new_adapter is not None:
        model = with_new_adapter(arguments, model, task, new)
    elif pretrained.adapter is not None:
        model = with_trained_adapter(model, pretrained.adapter, new)
    if hasattr(model, "peft_config"):
        new = {
            name
            for name, p in model.named_parameters()
            if p.requires_grad or name_in_files(name) in new
        }
    return model, [name for name, _ in model.named_parameters() if name in new]


def save_configuration(model: Any, folder: Path) -> None:
    """Save the configuration of an adapter, or of a model with a new head.

    The base model's configuration does not describe it. A replay needs it to write the model.
    """
    with atomic_files(folder) as temporary:
        if hasattr(model, "peft_config"):
            base = type(model.get_base_model())  # by which peft's AutoPeftModel finds the class
            mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
            model.peft_config["default"].save_pretrained(temporary, auto_mapping_dict=mapping)
        elif getattr(model, "config", None) is not None:
            model.config.save_pretrained(temporary)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer beside an exported model. Raises OSError that names the folder."""
    # the library tokenizers raises a bare Exception for a full disk
    with atomic_files(folder, Exception) as temporary:
        tokenizer.save_pretrained(temporary)
