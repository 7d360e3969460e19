"""The options of `zods.finetune`, as dataclasses for transformers' `HfArgumentParser`.

One dataclass is one group of the help; the groups of the data and the task are in
`zods.cli.data_options`. A field's metadata are arguments of argparse's `add_argument`. A field's
type converts the text of the command line to the value. `zods.cli.arguments` reads the options.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from zods.cli.data_options import DataArguments, TaskArguments
from zods.cli.option_values import (
    FractionOrCount,
    Names,
    NumberOrAuto,
    NumberOrName,
    SubBatch,
    Weights,
)
from zods.config.schema import METHODS
from zods.config.selector_section import STRATEGIES

BATCH_OVERRIDES = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
MINIMUM = {  # smallest allowed value
    "lora_rank": 1,
    "max_length": 1,
    "num_epochs": 1,
    "max_steps": 0,
    "max_train_examples": 1,
    "max_eval_examples": 1,
    "shots": 1,
    "icl": 1,
    "shuffle_buffer": 2,
    "save_total_limit": 1,
    "eval_interval": 0,
    "save_interval": 0,
}


def _given(group: Any) -> dict[str, Any]:
    """The options of a group that have a value."""
    return {key: value for key, value in vars(group).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """The model, the training method and the folder of the run."""

    _argument_group_name = "model and method"

    deepspeed_config: str = field(
        default="",
        metadata={"help": "DeepSpeed JSON with a section zeroth_order", "metavar": "FILE"},
    )
    deepspeed: str | None = field(
        default=None,
        metadata={
            "help": "accepted as in other scripts for DeepSpeed: without a FILE it has no effect, "
            "with one it is the same as --deepspeed_config",
            "nargs": "?",
            "const": "",
            "metavar": "FILE",
        },
    )
    model: str = field(
        metadata={"help": "name on the hub, or folder; also of a PEFT adapter", "metavar": "NAME"},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "name or folder (default: the model's)"},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "run code that comes with the model"},
    )
    output_dir: str = field(
        metadata={"help": "the run's folder: config, metrics, log, checkpoints, model"},
    )
    resume: str | None = field(
        default=None,
        metadata={
            "help": "auto: continue where the run in output_dir stopped, or start it; "
            "FOLDER: start from the latest checkpoint of that run",
            "metavar": "auto|FOLDER",
        },
    )
    replica: int | None = field(
        default=None,
        metadata={
            "help": "index of this launch among several that train one model together: "
            "0 leads and writes the log, others may join and leave",
            "metavar": "INDEX",
        },
    )
    replica_store: str | None = field(
        default=None,
        metadata={"help": "address of the store that replica 0 runs", "metavar": "HOST:PORT"},
    )
    optimizer: Literal["adamw"] | None = field(
        default=None,
        metadata={"help": "first-order training by DeepSpeed, for comparison"},
    )
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "train LoRA adapters of this rank only (needs peft)"},
    )
    lora_target_modules: Names | None = field(
        default=None,
        metadata={
            "help": "modules that get an adapter, comma-separated, or all-linear "
            "(default: peft's for the model type, or else all-linear)",
            "metavar": "NAMES",
        },
    )
    peft_config: str | None = field(
        default=None,
        metadata={
            "help": "train adapters of any kind of peft: a JSON file with peft_type (LORA, IA3, "
            "PREFIX_TUNING, ...) and the keys of its configuration",
            "metavar": "FILE",
        },
    )

    @property
    def new_adapter(self) -> str | None:
        """The option that asks for new adapters, or None."""
        if self.lora_rank is not None:
            return "--lora_rank"
        return None if self.peft_config is None else "--peft_config"


@dataclass(frozen=True, kw_only=True)
class SelectionArguments:
    """The selection of training examples from a large batch."""

    _argument_group_name = "selection of sub-batches"

    select: SubBatch | None = field(
        default=None,
        metadata={"help": "choose K (the train_batch_size) of N candidates", "metavar": "K/N"},
    )
    source_column: str | None = field(
        default=None,
        metadata={"help": "the column of an example's source (default: clusters of features)"},
    )
    strategy: str | None = field(
        default=None,
        metadata={"help": "default: greedy", "choices": STRATEGIES},
    )
    target_file: str | None = field(
        default=None,
        metadata={"help": "strategy target: a file with examples of the target task"},
    )

    def selector(self) -> dict[str, Any]:
        """The given keys of the section "selector"."""
        keys = _given(self)
        if self.select is not None:
            del keys["select"]
            keys["candidates"] = self.select.candidates
        return keys


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """The length of the run and its outputs."""

    _argument_group_name = "run"

    max_steps: int | None = field(
        default=None,
        metadata={
            "help": "number of steps; 0: evaluate only (default: num_epochs passes over the data)"
        },
    )
    num_epochs: int = field(
        default=1,
        metadata={"help": "passes over the data, where max_steps is not given (default: 1)"},
    )
    eval_interval: int = field(
        default=0,
        metadata={"help": "steps between evaluations; 0: before and after only"},
    )
    save_interval: int = field(default=0, metadata={"help": "steps between checkpoints; 0: none"})
    save_total_limit: int | None = field(
        default=None,
        metadata={"help": "number of latest checkpoints to keep (default: all)"},
    )
    save_model: bool = field(
        default=False,
        metadata={"help": "export the model for from_pretrained at the end"},
    )
    plot: bool = field(
        default=False,
        metadata={"help": "draw curves.png at the end (needs matplotlib)"},
    )


@dataclass(frozen=True, kw_only=True)
class OverrideArguments:
    """Overrides of the DeepSpeed JSON: its section "zeroth_order" and the batch sizes."""

    _argument_group_name = "overrides of the JSON"

    method: str | None = field(
        default=None,
        metadata={"help": f"{' or '.join(METHODS)}; mezo drops the keys that only mezo_svrg has"},
    )
    lr: NumberOrAuto | None = field(
        default=None, metadata={"help": "step size; auto, the default, measures it"}
    )
    eps: float | None = field(default=None, metadata={"help": "perturbation scale"})
    direction: str | None = field(
        default=None,
        metadata={"help": "gaussian, rademacher or low_rank (rank 1; other ranks in the JSON)"},
    )
    num_directions: int | None = field(
        default=None, metadata={"help": "directions of each group of examples in a step"}
    )
    examples_per_direction: NumberOrName | None = field(
        default=None,
        metadata={"help": "size of the groups of examples that share directions, or all"},
    )
    normalize: bool | None = field(
        default=None, metadata={"help": "divide each step by the running size of the estimates"}
    )
    anchor_weight: NumberOrName | None = field(
        default=None, metadata={"help": "how much of the anchor a step takes: 0 to 1, or auto"}
    )
    loss_mean: str | None = field(
        default=None,
        metadata={
            "help": "mean loss of the global batch: over its label tokens (tokens), "
            "or over the means of its examples (examples)",
        },
    )
    objective: str | None = field(
        default=None,
        metadata={
            "help": "what training lowers or raises: loss; candidates, the cross entropy over the "
            "label words alone; or, without gradients, accuracy (of the label tokens among the "
            "whole vocabulary), token_accuracy or package.module:function"
        },
    )
    anchor_lr: float | None = field(
        default=None,
        metadata={"help": "step size of the full-batch step at a refresh"},
    )
    anchor_interval: int | None = field(
        default=None,
        metadata={"help": "steps between two refreshes of the anchor"},
    )
    anchor_directions: int | None = field(default=None, metadata={"help": "directions per refresh"})
    weight_decay: float | None = field(default=None, metadata={"help": "decoupled weight decay"})
    seed: int | None = field(default=None, metadata={"help": "seed of directions and data order"})
    group_by_length: bool | None = field(
        default=None,
        metadata={"help": "batches of examples of similar length", "nargs": "?", "const": True},
    )
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "processes per rank that load batches ahead (default: 0)"}
    )
    train_batch_size: int | None = field(default=None, metadata={"help": "as in the JSON"})
    train_micro_batch_size_per_gpu: int | None = field(
        default=None,
        metadata={"help": "as in the JSON"},
    )
    gradient_accumulation_steps: int | None = field(
        default=None,
        metadata={"help": "as in the JSON"},
    )

    def section(self) -> dict[str, Any]:
        """The given keys of the section "zeroth_order"."""
        return {
            key: value.value if isinstance(value, (NumberOrAuto, NumberOrName)) else value
            for key, value in _given(self).items()
            if key not in BATCH_OVERRIDES
        }

    def batch(self) -> dict[str, int]:
        """The given batch sizes."""
        return {key: value for key, value in _given(self).items() if key in BATCH_OVERRIDES}


@dataclass(frozen=True)
class Arguments:
    """All options of a run, by group."""

    model: ModelArguments
    selection: SelectionArguments
    data: DataArguments
    task: TaskArguments
    run: RunArguments
    overrides: OverrideArguments

    def to_dict(self) -> dict[str, Any]:
        """The options that have a value, in the form of a JSON file for `zods.finetune`."""
        return {
            key: value.text
            if isinstance(value, (SubBatch, FractionOrCount, NumberOrAuto, NumberOrName, Weights))
            else value
            for group in vars(self).values()
            for key, value in _given(group).items()
        }


GROUPS: tuple[Any, ...] = (
    ModelArguments,
    SelectionArguments,
    DataArguments,
    TaskArguments,
    RunArguments,
    OverrideArguments,
)
