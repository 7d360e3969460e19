"""`ZOTrainingArguments`, and the DeepSpeed JSON that follows from them.

transformers fills each "auto" of the JSON from its arguments (`HfTrainerDeepSpeedConfig`, read in
transformers 5.23). `config_of_arguments` does this for a JSON with the section "zeroth_order", which
has no optimizer and no gradient, and in which "auto" has a meaning for the step size, too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from zods.comm.process import connect_ranks
from zods.config.config_errors import Mistakes
from zods.config.deepspeed_json import load_json, read_config
from zods.config.schedules import LENGTHS, PROVISIONAL
from zods.config.section import SECTION


@dataclass
class ZOTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` for `ZOTrainer`.

    deepspeed: a DeepSpeed JSON with the section "zeroth_order": a path, a dict or its text. The
    whole of it is checked here, before a model is loaded. These values follow from the arguments
    where the JSON leaves them out or has "auto":

        train_micro_batch_size_per_gpu, train_batch_size   per_device_train_batch_size
        gradient_accumulation_steps                        gradient_accumulation_steps
        bf16.enabled                                       bf16 or bf16_full_eval
        zeroth_order.lr                                    learning_rate, where it is given
        zeroth_order.weight_decay                          weight_decay
        zeroth_order.seed                                  data_seed, else seed
        zeroth_order.dataloader_num_workers                dataloader_num_workers
        zeroth_order.group_by_length                       train_sampling_strategy
        scheduler.params: the number of steps, and of warm-up steps

    Without a learning_rate, which is the default here, an lr of "auto" is measured before the first
    step. Without a section "scheduler", `lr_scheduler_type` and the warm-up of the arguments hold,
    as in transformers. `max_grad_norm`, `optim` and the arguments of Adam have no effect: there are
    no gradients and no optimizer states.

    Raises ValueError for values that contradict each other, for a mistake in the JSON, and for
    arguments that a zeroth-order step cannot follow.
    """

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": 'The step size, "lr" of the JSON\'s section "zeroth_order".'},
    )

    def __post_init__(self) -> None:
        """Connect the ranks, and resolve and check the configuration."""
        comm = connect_ranks()
        self.bf16 = bool(self.bf16)  # the arguments of trl 1.16 make true of a missing one
        given = self.deepspeed
        if given is None:
            raise ValueError(
                f'deepspeed: missing. Give a DeepSpeed JSON with the section "{SECTION}".'
            )
        if isinstance(given, str) and given.startswith("{"):
            given = json.loads(given)
        self._config = config_of_arguments(load_json(given), self, comm.world_size)
        lr = self._config[SECTION].get("lr")
        self.learning_rate = None if lr == "auto" else lr
        if self.use_cpu and comm.device.type != "cpu":
            raise ValueError(
                f"use_cpu: found true, but DeepSpeed's accelerator is {comm.device.type}. Set "
                "DS_ACCELERATOR=cpu in the environment of all ranks as well."
            )
        # else accelerate 1.15 knows of one rank only where there is no accelerator
        self.use_cpu = comm.device.type == "cpu"
        # transformers reads DeepSpeed's part, and loads a model by it in shards
        own = (SECTION, "scheduler", "gradient_clipping")
        shared = {key: value for key, value in self._config.items() if key not in own}
        self.deepspeed = copy.deepcopy({"zero_optimization": {"stage": 0}, **shared})
        super().__post_init__()
        self.deepspeed = given
        read_config(self.configuration(PROVISIONAL), comm.world_size)

    def configuration(self, total_steps: int) -> dict[str, Any]:
        """The configuration for `zods.initialize`, of a run of `total_steps` steps."""
        config = copy.deepcopy(self._config)
        scheduler = config.get("scheduler")
        params = scheduler.get("params") if isinstance(scheduler, Mapping) else None
        if isinstance(params, dict):
            lengths = dict.fromkeys(LENGTHS, total_steps)
            # DeepSpeed 0.19.8 refuses a warm-up of 0 steps
            lengths["warmup_num_steps"] = max(1, self.get_warmup_steps(total_steps))
            params |= {key: lengths[key] for key in lengths if params.get(key) == "auto"}
        return config


def config_of_arguments(
    config: Mapping[str, Any], args: TrainingArguments, world_size: int
) -> dict[str, Any]:
    """Fill in a DeepSpeed JSON from transformers' arguments; see `ZOTrainingArguments`.

    Returns a copy. What is wrong in the JSON itself is left for `read_config`. Raises ValueError
    with one line per contradiction and per argument that has no meaning here.
    """
    filled = copy.deepcopy(dict(config))
    section = filled.get(SECTION)
    if not isinstance(section, dict):
        raise ValueError(
            f'{SECTION}: found {section!r} in the DeepSpeed JSON. Add a section, e.g. "{SECTION}": '
            '{"method": "mezo"}, or use transformers\' own Trainer for first-order training.'
        )
    found = list(_unsupported(args, section))
    found += _fill(filled, "", _batch_sizes(args, world_size))
    bf16 = filled.setdefault("bf16", {})
    if isinstance(bf16, dict):
        wanted = args.bf16 or args.bf16_full_eval
        # true in the JSON alone is enough: no autocast depends on the argument
        found += _fill(bf16, "bf16.", {"enabled": (wanted or bf16.get("enabled") is True, "bf16")})
    seed = args.seed if args.data_seed is None else args.data_seed
    section.setdefault("seed", seed)
    section.setdefault("lr", "auto")
    given = {key: (getattr(args, argument), argument) for key, argument in _SECTION_KEYS.items()}
    if args.train_sampling_strategy == "group_by_length":
        given["group_by_length"] = (True, "train_sampling_strategy")
    if section.get("selector") is not None:
        del given["dataloader_num_workers"]  # serves the Trainer's evaluation alone
    # a learning_rate of 0 is a step size; a weight_decay of 0 is the default
    given = {key: pair for key, pair in given.items() if pair[0] or (pair[0] == 0 and key == "lr")}
    found += _fill(section, f"{SECTION}.", given)
    if found:
        raise Mistakes(found)
    return filled


_SECTION_KEYS = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "dataloader_num_workers": "dataloader_num_workers",
}


def _batch_sizes(args: TrainingArguments, world_size: int) -> dict[str, tuple[int, str]]:
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": (micro, "per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "gradient_accumulation_steps"),
        "train_batch_size": (
            micro * accumulation * world_size,
            "per_device_train_batch_size x gradient_accumulation_steps x ranks",
        ),
    }


def _fill(
    section: dict[str, Any], path: str, values: Mapping[str, tuple[Any, str]]
) -> Iterator[str]:
    """Fill in keys that are missing or "auto", in place.

    values: {key: (value, argument it comes from)}. Yields a message for each other value.
    """
    for key, (value, argument) in values.items():
        if section.get(key, "auto") == "auto":
            section[key] = value
        elif section[key] != value:
            yield (
                f"{path}{key}: found {section[key]!r} in the DeepSpeed JSON, but {argument} is "
                f'{value!r}. Write "auto" in the JSON, or make the two equal.'
            )


def _unsupported(args: TrainingArguments, section: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each setting that zeroth-order steps under the Trainer cannot follow."""
    if args.fp16 or args.fp16_full_eval:
        yield "fp16: not supported. Use bf16, or leave both out for fp32."
    if args.label_smoothing_factor:
        yield (
            f"label_smoothing_factor: found {args.label_smoothing_factor}, must be 0. A step uses "
            "the loss that the model's forward returns; smooth it there."
        )
    if args.neftune_noise_alpha is not None:
        yield (
            f"neftune_noise_alpha: found {args.neftune_noise_alpha}, must be left out. The losses of "
            "a step must be values of one function."
        )
    if args.auto_find_batch_size:
        yield "auto_find_batch_size: must be false; the batch size is part of the run. Give a number."
    if args.train_sampling_strategy not in ("random", "group_by_length"):
        yield (
            f"train_sampling_strategy: found {args.train_sampling_strategy!r}, allowed are "
            '"random" and "group_by_length". The order of the examples is a function of the seed '
            "and the epoch."
        )
    loss_type = getattr(args, "loss_type", "nll")  # an argument of trl's SFTConfig
    if loss_type != "nll":
        yield (
            f'loss_type: found "{loss_type}", must be "nll". A step uses the loss that the model\'s '
            "forward returns."
        )
    if args.length_column_name != "length":
        yield (
            f'length_column_name: found {args.length_column_name!r}, must be "length". Rename the '
            "column; without one the number of input_ids counts."
        )
    if section.get("replicas") is not None:
        yield (
            f"{SECTION}.replicas: not supported by ZOTrainer, whose steps are counted by "
            "transformers. Use zods.finetune, or a loop over the engine of zods.initialize."
        )
