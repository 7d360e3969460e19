"""The options of `zods.finetune`."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from zods.config import load_json
from zods.section import METHODS, SECTION, STRATEGIES, SVRG_ONLY, ZerothOrderConfig

OVERRIDES = {  # option: help; each sets the key of the same name in the section "zeroth_order"
    "method": f"{' or '.join(METHODS)}; mezo drops the keys that only mezo_svrg has",
    "lr": "step size",
    "eps": "perturbation scale",
    "direction": "gaussian, rademacher or low_rank (rank 1; other ranks in the JSON)",
    "num_directions": "directions per step",
    "loss_mean": "of the global batch: tokens (over its label tokens) or examples (of each one's own mean)",
    "anchor_lr": "step size of the full-batch step at a refresh",
    "anchor_interval": "steps between two refreshes of the anchor",
    "anchor_directions": "directions per refresh",
    "weight_decay": "decoupled weight decay",
    "seed": "of directions and data order",
}
FIRST_ORDER = ("lr", "weight_decay", "seed", "loss_mean")  # those that mean something with an optimizer, too
BATCH_OVERRIDES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deepspeed --module zods.finetune",
        usage="%(prog)s --deepspeed_config FILE --model NAME (--train_file FILE | --dataset_name NAME) "
        "--output_dir FOLDER [options]",
        description="Fine-tune a transformer with zeroth-order steps (MeZO, MeZO-SVRG) on DeepSpeed ZeRO-3.",
        epilog="Example: deepspeed --num_gpus 2 --module zods.finetune --deepspeed_config ds_configs/svrg_zero3.json "
        "--model facebook/opt-1.3b --task prompted --template '{sentence} It was {label}' --label_words terrible,great "
        "--dataset_name glue --dataset_config sst2 --validation_split validation --max_steps 5000 --output_dir runs/sst2",
        allow_abbrev=False,
    )
    main = parser.add_argument_group("model and method")
    main.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed JSON with a section zeroth_order")
    main.add_argument("--deepspeed", nargs="?", const="", metavar="FILE",
                      help="as other scripts for DeepSpeed have it: without a FILE it changes nothing, with one it is "
                      "--deepspeed_config")  # fmt: skip
    main.add_argument(
        "--model", required=True, metavar="NAME", help="name on the hub, or folder; also of a PEFT adapter"
    )
    main.add_argument("--tokenizer", help="name or folder (default: the model's)")
    main.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    main.add_argument("--output_dir", required=True, help="the run's folder: config, metrics, log, checkpoints, model")
    main.add_argument("--resume", metavar="auto|FOLDER", help="auto: go on where the run in output_dir stopped, or begin it; "
                      "FOLDER: begin from the latest checkpoint of that run")  # fmt: skip

    main.add_argument("--replica", type=int, metavar="INDEX", help="one of several launches that train one model together: "
                      "0 leads and keeps the log, others come and go")  # fmt: skip
    main.add_argument("--replica_store", metavar="HOST:PORT", help="where replica 0 keeps what they share")
    main.add_argument("--optimizer", choices=("adamw",), help="first-order training by DeepSpeed, for comparison")
    main.add_argument("--lora_rank", type=int, help="train LoRA adapters of this rank only (needs peft)")
    main.add_argument("--lora_target_modules", type=_names, metavar="NAMES", help="modules that get an adapter, "
                      "comma-separated, or all-linear (default: peft's for the model type, or else all-linear)")  # fmt: skip

    select = parser.add_argument_group("selection of sub-batches")
    select.add_argument("--select", type=_select, metavar="K/N", help="choose K (the train_batch_size) of N candidates")
    select.add_argument("--source_column", help="the column of an example's source (default: clusters of features)")
    select.add_argument("--strategy", choices=STRATEGIES, help="default: greedy")

    data = parser.add_argument_group("data: local files or a dataset of the hub")
    data.add_argument("--train_file", help=".jsonl, .json, .csv, .tsv or .parquet (.gz too)")
    data.add_argument("--validation_file", help="held-out examples")
    data.add_argument("--dataset_name", help="name on the hub, or a folder that datasets loads")
    data.add_argument("--dataset_config", help="the hub dataset's configuration")
    data.add_argument("--train_split", help="default: train")
    data.add_argument("--validation_split", help="held-out split of the hub dataset")
    data.add_argument("--held_out", type=_fraction_or_count, default=0.1, metavar="FRACTION_OR_COUNT",
                      help="taken from the training data where no validation data is given (default: %(default)s)")  # fmt: skip
    data.add_argument("--column_names", type=_names, help="columns of a CSV or TSV without a header, comma-separated")
    data.add_argument("--max_train_examples", type=int, help="keep this many")
    data.add_argument("--max_eval_examples", type=int, help="keep this many")

    task = parser.add_argument_group("task")
    task.add_argument("--task", default="classification", choices=("classification", "prompted", "instruction"),
                      help="a classification head; label words after a prompt; or responses (default: %(default)s)")  # fmt: skip
    task.add_argument("--text_column", help="classification (default: text)")
    task.add_argument("--text_pair_column", help="classification of pairs")
    task.add_argument("--label_column", help="classification, prompted (default: label)")
    task.add_argument(
        "--template",
        help=r"prompted: '{text}\nTopic: {label}'; instruction: '{question}\n{answer}'; \n, \t, \r, \\ are read",
    )
    task.add_argument("--label_words", type=_names, help="prompted: words of the labels 0, 1, ..., comma-separated")
    task.add_argument("--prompt_column", help="instruction (default: instruction)")
    task.add_argument("--response_column", help="instruction (default: output)")
    task.add_argument("--max_length", type=int, default=256, help="tokens per example (default: %(default)s)")

    run = parser.add_argument_group("run")
    run.add_argument("--max_steps", type=int, help="steps (default: num_epochs passes over the data)")
    run.add_argument("--num_epochs", type=int, default=1, help="passes, where max_steps is not given (default: 1)")
    run.add_argument("--eval_interval", type=int, default=0, help="steps between evaluations; 0: before and after only")
    run.add_argument("--save_interval", type=int, default=0, help="steps between checkpoints; 0: none")
    run.add_argument("--save_total_limit", type=int, help="checkpoints that are kept, the last ones (default: all)")
    run.add_argument("--save_model", action="store_true", help="export the model for from_pretrained at the end")
    run.add_argument("--plot", action="store_true", help="draw curves.png at the end (needs matplotlib)")
    run.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # set by the launcher

    override = parser.add_argument_group("overrides of the JSON")
    for key, text in OVERRIDES.items():
        override.add_argument(f"--{key}", type=_type_of(key), help=text)
    for key in BATCH_OVERRIDES:
        override.add_argument(f"--{key}", type=int, help="as in the JSON")
    metavars: dict[Any, str] = {int: "N", float: "X"}
    endings = {"file": "FILE", "dir": "FOLDER", "column": "NAME", "split": "NAME", "name": "NAME"}
    for action in parser._actions:
        if action.metavar is None and action.nargs is None and action.choices is None:
            action.metavar = metavars.get(action.type) or endings.get(action.dest.rpartition("_")[2], "TEXT")
    arguments = parser.parse_args(argv)
    _check(parser, arguments)
    return arguments


def _type_of(key: str) -> type:
    """The type of an option that sets `key` of the section "zeroth_order"."""
    annotation = ZerothOrderConfig.model_fields[key].annotation
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in (float, int) if kind in kinds), str)


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    given = arguments.deepspeed or arguments.deepspeed_config
    if not given:
        parser.error("the following arguments are required: --deepspeed_config")
    if arguments.deepspeed_config not in (None, given):
        parser.error(f"--deepspeed {given} and --deepspeed_config {arguments.deepspeed_config}: give one of the two")
    arguments.deepspeed_config = given
    if (arguments.train_file is None) == (arguments.dataset_name is None):
        parser.error("give either --train_file or --dataset_name")
    for option in ("dataset_config", "train_split", "validation_split"):
        if getattr(arguments, option) is not None and arguments.dataset_name is None:
            parser.error(f"--{option} belongs to --dataset_name")
    if arguments.validation_file is not None and arguments.validation_split is not None:
        parser.error("give either --validation_file or --validation_split")
    if (arguments.replica is None) != (arguments.replica_store is None):
        parser.error("--replica and --replica_store go together")
    if arguments.optimizer is not None and arguments.replica is not None:
        parser.error("--replica belongs to zeroth-order steps, not to --optimizer")
    if arguments.optimizer is not None:
        zeroth = [key for key in OVERRIDES if getattr(arguments, key) is not None and key not in FIRST_ORDER]
        if zeroth:
            parser.error(f"--{zeroth[0]} belongs to zeroth-order steps, not to --optimizer")
    if arguments.lora_target_modules is not None and arguments.lora_rank is None:
        parser.error("--lora_target_modules belongs to --lora_rank")
    if arguments.select is not None and arguments.train_batch_size is not None:
        parser.error("--select K/N sets train_batch_size to K; leave --train_batch_size out")
    for option in (
        "lora_rank",
        "max_length",
        "num_epochs",
        "max_steps",
        "max_train_examples",
        "max_eval_examples",
        "save_total_limit",
    ):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            parser.error(f"--{option}: found {value}, must be 1 or more")
    for option in ("eval_interval", "save_interval"):
        if getattr(arguments, option) < 0:
            parser.error(f"--{option}: found {getattr(arguments, option)}, must be 0 or more")


def merged_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """The JSON with the overrides of the command line."""
    config = load_json(arguments.deepspeed_config)
    section = config.get(SECTION, {})
    if not isinstance(section, dict) or not isinstance(section.get("selector") or {}, dict):
        return config  # which is refused for that
    given = {key: getattr(arguments, key) for key in OVERRIDES if getattr(arguments, key) is not None}
    if arguments.optimizer is not None:
        rates: dict[str, float] = {key: given.pop(key) for key in ("lr", "weight_decay") if key in given}
        config["optimizer"] = _optimizer(config, rates)
        section = {key: value for key, value in section.items() if key in ("seed", "selector", "loss_mean")}
    elif given.get("method") == "mezo":
        section = {key: value for key, value in section.items() if key not in SVRG_ONLY}
    if arguments.replica is not None:
        given["replicas"] = {
            **(section.get("replicas") or {}),
            "store": arguments.replica_store,
            "index": arguments.replica,
        }
    config[SECTION] = {**section, **given, **_selector(section, arguments)}
    batch = {key: getattr(arguments, key) for key in BATCH_OVERRIDES if getattr(arguments, key) is not None}
    if arguments.select is not None:
        micro = config.get("train_micro_batch_size_per_gpu")
        batch = {"train_batch_size": arguments.select[0], **batch}
        if micro is not None and len(batch) == 1:
            batch["train_micro_batch_size_per_gpu"] = micro
    if batch:  # those not given follow from those that are
        config = {key: value for key, value in config.items() if key not in BATCH_OVERRIDES} | batch
    return config


def _selector(section: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """{"selector": ...} with the overrides of the command line, or nothing where there is no selector."""
    given = {
        key: getattr(arguments, key) for key in ("source_column", "strategy") if getattr(arguments, key) is not None
    }
    if arguments.select is not None:
        given["candidates"] = arguments.select[1]
    return {"selector": {**(section.get("selector") or {}), **given}} if given else {}


def _optimizer(config: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """DeepSpeed's section: the JSON's own, or AdamW, with the rates given."""
    optimizer = config.get("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
    if not isinstance(optimizer, dict) or str(optimizer.get("type")).lower() != "adamw":
        raise ValueError(f"optimizer: found {optimizer!r}, but --optimizer adamw was asked for. Change one of them.")
    params = {**optimizer.get("params", {}), **rates}
    if "lr" not in params:
        raise ValueError("--lr: missing; the step size of zeroth-order steps does not serve an optimizer. Give one.")
    return {**optimizer, "params": params}


def _select(text: str) -> tuple[int, int]:
    chosen, _, candidates = text.partition("/")
    if not (chosen.isdigit() and candidates.isdigit() and 0 < int(chosen) <= int(candidates)):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected K/N with 0 < K <= N, as in 64/128")
    return int(chosen), int(candidates)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _fraction_or_count(text: str) -> float | int:
    return int(text) if text.isdigit() else float(text)
