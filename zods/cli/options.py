"""The options of `zods.finetune`, as dataclasses for transformers' `HfArgumentParser`.

One dataclass is one group of the help. A field's metadata are arguments of argparse's
`add_argument`. A field's type converts the text of the command line to the value.
`zods.cli.arguments` reads the options.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from zods.cli.option_values import (
    FractionOrCount,
    Names,
    NumberOrAuto,
    NumberOrName,
    SubBatch,
    TaskName,
    Weights,
)
from zods.config.schema import METHODS, STRATEGIES
from zods.tasks import SCORINGS, TASKS

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
class DataArguments:
    """The training data and the held-out data."""

    _argument_group_name = "data: local files or a dataset of the hub"

    train_file: str | None = field(
        default=None,
        metadata={"help": ".jsonl, .json, .csv, .tsv or .parquet (.gz too)"},
    )
    validation_file: str | None = field(default=None, metadata={"help": "held-out examples"})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "name on the hub, or a folder that datasets loads"},
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "the hub dataset's configuration"},
    )
    train_split: str | None = field(default=None, metadata={"help": "default: train"})
    validation_split: str | None = field(
        default=None,
        metadata={"help": "held-out split of the hub dataset"},
    )
    held_out: FractionOrCount = field(
        default=FractionOrCount("0.1"),
        metadata={
            "help": "share or number of examples held out from the training data where no "
            "validation data is given (default: %(default)s)",
            "metavar": "FRACTION_OR_COUNT",
        },
    )
    column_names: Names | None = field(
        default=None,
        metadata={"help": "columns of a CSV or TSV without a header, comma-separated"},
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "a task with its own data: folder with the published files (default: the hub)"
        },
    )
    shots: int | None = field(
        default=None,
        metadata={"help": "train on this many examples of each class, drawn by the seed"},
    )
    mixture_weights: Weights | None = field(
        default=None,
        metadata={
            "help": "draw training examples by weights of their --source_column: code=2,web=1",
            "metavar": "SOURCE=WEIGHT,...",
        },
    )
    icl: int | None = field(
        default=None,
        metadata={
            "help": "also evaluate the model before training with this many solved training "
            "examples of each class before each prompt (--max_steps 0: no training)"
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "read the training data while training (.jsonl, .csv, .parquet or the hub): "
            "rows are checked and tokenised when their step comes; needs --max_steps and held-out "
            "data"
        },
    )
    shuffle_buffer: int | None = field(
        default=None,
        metadata={
            "help": "streaming: draw each row from a buffer of the next N rows, by the seed "
            "(default: the order of the data)"
        },
    )
    max_train_examples: int | None = field(default=None, metadata={"help": "keep this many"})
    max_eval_examples: int | None = field(default=None, metadata={"help": "keep this many"})


@dataclass(frozen=True, kw_only=True)
class TaskArguments:
    """The task: what the model learns from an example. See `zods.tasks.build_task`."""

    _argument_group_name = "task"

    task: TaskName = field(
        default=TaskName("classification"),
        metadata={
            "help": "classification: train a classification head; prompted: label words after a "
            "prompt; instruction: responses to a prompt; or a task that brings its own data and "
            f"prompt: {', '.join(TASKS)}; or custom, see --task_file (default: %(default)s)",
            "metavar": "NAME",
        },
    )
    task_file: str | None = field(
        default=None,
        metadata={
            "help": "custom: a YAML file with the keys of zods.tasks.PublishedTask, or a Python file "
            "that sets `task` to one"
        },
    )
    classification_head: bool = field(
        default=False,
        metadata={"help": "a task with label words: train a head, without a prompt"},
    )
    scoring: str | None = field(
        default=None,
        metadata={
            "help": "log-likelihood by which label words or candidates are compared: per token, "
            "its sum, or its sum less the sum without the text (default: mean)",
            "choices": SCORINGS,
        },
    )
    text_column: str | None = field(
        default=None,
        metadata={"help": "classification: column of the text (default: text)"},
    )
    text_pair_column: str | None = field(default=None, metadata={"help": "classification of pairs"})
    label_column: str | None = field(
        default=None,
        metadata={"help": "classification, prompted: column of the label (default: label)"},
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": r"prompted: '{text}\nTopic: {label}'; instruction: '{question}\n{answer}'; "
            r"\n, \t, \r and \\ are replaced as in Python"
        },
    )
    label_words: Names | None = field(
        default=None,
        metadata={"help": "prompted: words of the labels 0, 1, ..., comma-separated"},
    )
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "instruction: column of the prompt, instead of a data format"},
    )
    response_column: str | None = field(
        default=None,
        metadata={"help": "instruction: column of the response, instead of a data format"},
    )
    data_format: Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"] | None = (
        field(
            default=None,
            metadata={"help": "instruction: format of the data (default: found by the columns)"},
        )
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "instruction on conversations: a Jinja template (default: the tokenizer's, or "
            "else 'User: ...', 'Assistant: ...')",
            "metavar": "FILE_OR_TEXT",
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "instruction: put several training examples into a row of max_length tokens, "
            "apart from each other; plain texts are concatenated and cut"
        },
    )
    max_length: int = field(
        default=256,
        metadata={
            "help": "tokens per example (default: %(default)s); of a longer conversation the first "
            "ones are kept"
        },
    )


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
