"""Read the options of `zods.finetune` from a command line and from a YAML or JSON file.

An option of the command line overrides the file's. `zods.cli.options` defines the options. This
module reads them and checks them together. Caller: `zods.finetune`.
"""

from __future__ import annotations

import argparse
import reprlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from zods.cli.option_values import FractionOrCount, Names, NumberOrAuto, NumberOrName
from zods.cli.options import GROUPS, MINIMUM, Arguments, ModelArguments
from zods.config.config_errors import nearest
from zods.config.deepspeed_json import MOST_KEYS, load_json
from zods.files import check_regular

MOST_BYTES = 1 << 20  # of a YAML file: the parser takes a minute for 50 MB
# Overrides that also apply with an optimizer
FIRST_ORDER = (
    "lr",
    "weight_decay",
    "seed",
    "loss_mean",
    "group_by_length",
    "dataloader_num_workers",
)
USAGE = (
    "%(prog)s --deepspeed_config FILE --model NAME (--task NAME | --train_file FILE | "
    "--dataset_name NAME) --output_dir FOLDER [options]"
)


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Read the options of a command line, which may begin with a YAML or JSON file of options.

    argv: the words of the command line; by default the command line of this process. Where an
    option is wrong, the process ends with code 2, as argparse does.
    """
    parser = option_parser()
    words = _without_local_rank(sys.argv[1:] if argv is None else argv)
    file: dict[str, str] = {}
    if words and words[0].endswith((".yaml", ".yml", ".json")):
        file = _read_file(parser, words.pop(0))
    of_file = [file.pop(key, None) for key in ("deepspeed", "deepspeed_config")]
    words = [*(f"--{key}={text}" for key, text in file.items()), *words]
    *groups, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    model: ModelArguments = groups[0]
    config = _one_of(parser, model.deepspeed, model.deepspeed_config) or _one_of(parser, *of_file)
    if not config:
        parser.error("the following arguments are required: --deepspeed_config")
    arguments = Arguments(replace(model, deepspeed=None, deepspeed_config=config), *groups[1:])
    mistakes = list(_mistakes(arguments))
    if mistakes:
        parser.error("\n  ".join(mistakes))
    return arguments


class _HelpFormatter(argparse.HelpFormatter):
    """A help formatter that shows a switch such as --plot without a value.

    `--plot false` is accepted too: it overrides the value in a file.
    """

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.const is True else super()._format_args(action, default_metavar)


def option_parser() -> HfArgumentParser:
    """The parser of the options, whose help is `--help`."""
    parser = HfArgumentParser(
        GROUPS,
        prog="deepspeed --module zods.finetune",
        usage=USAGE,
        description="Fine-tune a transformer with zeroth-order steps (MeZO, MeZO-SVRG) on "
        "DeepSpeed ZeRO-3. A YAML or JSON file with options as keys may stand before the options, "
        "which override it.",
        epilog="Example: deepspeed --num_gpus 2 --module zods.finetune "
        "--deepspeed_config ds_configs/mezo_zero3.json --model facebook/opt-1.3b --task sst2 "
        "--max_steps 5000 --output_dir runs/sst2",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    metavars: dict[Any, str] = {int: "N", float: "X"}
    endings = {"file": "FILE", "dir": "FOLDER", "column": "NAME", "split": "NAME", "name": "NAME"}
    for action in parser._actions:
        # HfArgumentParser also accepts --max-steps for --max_steps; the help hides it
        action.option_strings = [name for name in action.option_strings if "-" not in name[2:]]
        if action.metavar is None and action.nargs is None and action.choices is None:
            action.metavar = metavars.get(action.type) or endings.get(
                action.dest.rpartition("_")[2], "TEXT"
            )
    return parser


def _without_local_rank(argv: list[str]) -> list[str]:
    """Remove --local_rank, which a launcher puts before all other words, from a command line."""
    launcher = argparse.ArgumentParser(
        prog="deepspeed --module zods.finetune", usage=USAGE, add_help=False, allow_abbrev=False
    )
    launcher.add_argument("--local_rank", type=int)
    return launcher.parse_known_args(argv)[1]


def _one_of(
    parser: argparse.ArgumentParser,
    deepspeed: str | None,
    config: str | None,
) -> str | None:
    """The file that --deepspeed or --deepspeed_config names."""
    if deepspeed and config and deepspeed != config:
        parser.error(
            f"--deepspeed {deepspeed} and --deepspeed_config {config}: give one of the two"
        )
    return deepspeed or config


def _mistakes(arguments: Arguments) -> Iterator[str]:
    """Yield a message for each conflict between options and for each number that is too small."""
    model, data, selection = arguments.model, arguments.data, arguments.selection
    if arguments.task.task.is_declared:
        yield from _mistakes_of_declared(arguments)
    else:
        if (data.train_file is None) == (data.dataset_name is None):
            yield "give either --train_file or --dataset_name"
        for option, value in _only_declared(arguments).items():
            if value:
                yield (
                    f"--{option} belongs to a task that brings its own data, not to --task "
                    f"{arguments.task.task}: leave one of them out"
                )
    for option in ("dataset_config", "train_split", "validation_split"):
        if getattr(data, option) is not None and data.dataset_name is None:
            yield f"--{option} belongs to --dataset_name: give both, or leave --{option} out"
    if data.validation_file is not None and data.validation_split is not None:
        yield "give either --validation_file or --validation_split"
    if (model.replica is None) != (model.replica_store is None):
        yield "--replica and --replica_store go together: give both or neither"
    if model.optimizer is not None and model.replica is not None:
        yield "--replica belongs to zeroth-order steps, not to --optimizer: leave one of them out"
    if model.optimizer is not None:
        zeroth = [key for key in arguments.overrides.section() if key not in FIRST_ORDER]
        if zeroth:
            yield (
                f"--{zeroth[0]} belongs to zeroth-order steps, not to --optimizer: leave one of "
                "them out"
            )
    if model.lora_target_modules is not None and model.lora_rank is None:
        yield (
            "--lora_target_modules belongs to --lora_rank: give both, or leave "
            "--lora_target_modules out"
        )
    if model.lora_rank is not None and model.peft_config is not None:
        yield "give either --lora_rank or --peft_config"
    if selection.select is not None and arguments.overrides.train_batch_size is not None:
        yield "--select K/N sets train_batch_size to K; leave --train_batch_size out"
    if data.streaming:
        yield from _mistakes_of_streaming(arguments)
    elif data.shuffle_buffer is not None:
        yield "--shuffle_buffer belongs to --streaming: give both, or leave --shuffle_buffer out"
    values = {**vars(model), **vars(data), **vars(arguments.task), **vars(arguments.run)}
    for option in MINIMUM:
        wrong = _too_small(option, values[option])
        if wrong:
            yield f"--{option}: {wrong}"


def _mistakes_of_streaming(arguments: Arguments) -> Iterator[str]:
    """Yield a message for each option that needs the whole training data."""
    data, task, selection = arguments.data, arguments.task, arguments.selection
    if arguments.run.max_steps is None:
        yield (
            "--streaming: the number of steps in a pass over the data is not known. Give --max_steps "
            "in place of --num_epochs"
        )
    if data.validation_file is None and data.validation_split is None:
        yield (
            "--streaming: no examples can be held out from a stream. Give --validation_file or "
            "--validation_split"
        )
    if task.task.is_declared:
        yield f"--streaming: --task {task.task} loads its own data whole. Leave one of them out"
    reasons = {
        "shots": (data.shots, "draws from all examples of a class"),
        "icl": (data.icl, "draws from all examples of a class"),
        "max_train_examples": (data.max_train_examples, "draws from all examples; use --max_steps"),
        "mixture_weights": (data.mixture_weights, "draws from all examples of a source"),
        "select": (selection.select, "draws its candidates from all examples"),
        "packing": (task.packing or None, "cuts rows where all texts before them end"),
    }
    for option, (value, reason) in reasons.items():
        if value is not None:
            yield f"--streaming: --{option} {reason}. Leave one of them out"


def _only_declared(arguments: Arguments) -> dict[str, Any]:
    """The options that only tasks with their own data have."""
    return {
        "data_dir": arguments.data.data_dir,
        "task_file": arguments.task.task_file,
        "classification_head": arguments.task.classification_head,
    }


def _mistakes_of_declared(arguments: Arguments) -> Iterator[str]:
    """Yield a message for each option that does not fit a task that brings its own data."""
    task, data = arguments.task, arguments.data
    if (task.task == "custom") != (task.task_file is not None):
        yield "--task custom and --task_file go together: give both or neither"
    if data.dataset_name is not None:
        yield (
            f"--dataset_name: --task {task.task} names its own data. Leave --dataset_name out, or "
            "give --train_file or --data_dir for local data"
        )
    for option in (
        "text_column",
        "text_pair_column",
        "label_column",
        "prompt_column",
        "response_column",
        "data_format",
        "chat_template",
    ):
        if getattr(task, option) is not None:
            yield f"--{option}: --task {task.task} names its own columns. Leave --{option} out"
    for option in ("template", "label_words", "scoring"):
        if task.classification_head and getattr(task, option) is not None:
            yield f"--{option} and --classification_head exclude each other: leave one of them out"


def _too_small(option: str, value: Any) -> str | None:
    if option not in MINIMUM or value is None or value >= MINIMUM[option]:
        return None
    return f"found {value}, must be {MINIMUM[option]} or more"


# --- a file of options ----------------------------------------------------------------------------


def _read_file(parser: argparse.ArgumentParser, name: str) -> dict[str, str]:
    """Read the options of a YAML or JSON file, as {option: its text on a command line}.

    A value is checked like a value of the command line. All mistakes are reported at once, and the
    process ends.
    """
    path = Path(name)
    try:
        check_regular(path)
    except OSError as error:
        parser.error(str(error))
    if not path.is_file():
        parser.error(
            f"{name}: not found. Give a YAML or JSON file with options as keys, or leave it out"
        )
    try:
        content = load_mapping(path)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    options = {action.dest: action for action in parser._actions if action.dest != "help"}
    texts, wrong = {}, []
    for key, value in content.items():
        if key not in options:
            wrong.append(f"{key}: unknown key.{nearest(str(key), list(options))}")
        elif value is not None:
            try:
                texts[key] = _text(options[key], value)
                parsed = parser._get_values(options[key], [texts[key]])
            except argparse.ArgumentError as error:
                wrong.append(f"{key}: {error.message}")
            except ValueError as error:
                wrong.append(f"{key}: {error}")
            else:
                too_small = _too_small(key, parsed)
                wrong += [f"{key}: {too_small}"] if too_small else []
    if len(wrong) == 1:
        parser.error(f"{name}: {wrong[0]}")
    if wrong:
        parser.error("\n  ".join([f"{name}: {len(wrong)} mistakes:", *wrong]))
    return texts


def load_mapping(path: Path) -> dict[Any, Any]:
    """Read keys and values of a YAML or JSON file. Raises ValueError where it cannot be read."""
    if path.suffix == ".json":
        return load_json(path)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes; a file of options has at most {MOST_BYTES}."
        )
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(node, yaml.MappingNode) and len(node.value) > MOST_KEYS:
            raise ValueError(f"{len(node.value)} keys, at most {MOST_KEYS} are read")
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ValueError(
            f"{path}: expected options as keys (lr: 2e-3), found {type(loaded).__name__}."
        )
    counts = Counter(key.value for key, _ in node.value)
    twice = sorted(key for key, number in counts.items() if number > 1)
    if twice:  # yaml would silently use the last one
        raise ValueError(f"{path}: {', '.join(twice)} given twice. Keep one of each.")
    return loaded


def _text(action: argparse.Action, value: Any) -> str:
    """Turn a value of a file into its text on a command line, which argparse then checks.

    A text option needs a text in the file: YAML reads `no`, `010` and `2024-01-01` as a boolean, a
    number and a date, whose texts differ from what was written. Raises ValueError for a value of
    another kind.
    """
    if isinstance(value, str):
        return value
    if action.type is Names:
        names = value if isinstance(value, list) else [value]
        odd = [name for name in names if not isinstance(name, str) or "," in name]
        if odd:
            raise ValueError(
                f"found {_short(odd[0])}, expected names without commas, as texts (in quotes)"
            )
        return ",".join(names)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if action.const is True:
        expected, fits = "true or false", isinstance(value, bool)
    elif action.type in (int, float, FractionOrCount, NumberOrAuto, NumberOrName):
        expected, fits = "a number", is_number
    else:
        expected, fits = "a text (in quotes)", False
    if not fits:
        raise ValueError(f"found {_short(value)} ({type(value).__name__}), expected {expected}")
    return str(value)


def _short(value: Any) -> str:
    """A value as text. The whole text of a few aliases in a YAML file could fill all memory."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, 200, 200
    return short.repr(value)
