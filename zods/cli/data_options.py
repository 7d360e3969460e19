"""The options of `zods.finetune` about data and task; see `zods.cli.options`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from zods.cli.option_values import FractionOrCount, Names, TaskName, Weights
from zods.tasks import SCORINGS, TASKS


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
