"""Read the data of a run: the training data, the held-out data, and the selector's target.

Caller: `zods.finetune`, before the model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import datasets

from zods.cli.model_checks import check_adapter, check_kind, check_shapes
from zods.cli.options import Arguments, DataArguments
from zods.cli.pretrained import Pretrained, check_generation_config
from zods.config.deepspeed_json import FirstOrderConfig, RunConfig
from zods.selection.sub_batches import check_target_data, sources_of
from zods.tasks import (
    Task,
    build_task,
    check_rows,
    check_token_ids,
    load_examples,
    name_of_rows,
    read_escapes,
    split_held_out,
)


class PreparedData(NamedTuple):
    """The task, and its data as batches are made of them.

    train: it keeps the selector's source column, where one is named. target: the examples of the
    selector's `target_file`; None where there is none.
    """

    task: Task
    train: datasets.Dataset
    held_out: datasets.Dataset
    target: datasets.Dataset | None


def prepare_data(
    arguments: Arguments, tokenizer: Any, run: RunConfig | FirstOrderConfig, pretrained: Pretrained
) -> PreparedData:
    """Build the task, and check and tokenise its data."""
    selector = run.selector
    parts = load_parts(arguments.data, run.seed, None if selector is None else selector.target_file)
    train, row_name = parts["train"]
    settings = arguments.task
    task = build_task(
        settings.task,
        tokenizer,
        train,
        text_column=settings.text_column,
        text_pair_column=settings.text_pair_column,
        label_column=settings.label_column,
        template=None
        if settings.template is None
        else read_escapes(settings.template, "--template"),
        label_words=settings.label_words,
        prompt_column=settings.prompt_column,
        response_column=settings.response_column,
        max_length=settings.max_length,
        num_embeddings=pretrained.num_embeddings,
        has_token_types=pretrained.has_token_types,
        class_names=pretrained.class_names,
        source=row_name.rpartition(",")[0],
    )
    check_kind(pretrained, task)
    if task.predicts_next_token:
        check_generation_config(Path(pretrained.base))
    check_shapes(pretrained, task, arguments.model.trust_remote_code)
    check_adapter(pretrained, task, arguments.model.trust_remote_code)
    check_rows(task, list(parts.values()))
    if "validation" not in parts:
        train, held_out = split_held_out(train, arguments.data.held_out.value, run.seed)
        parts |= {"train": (train, row_name), "validation": (held_out, row_name)}
    if selector is not None:
        target = parts.get("target", (None, ""))[0]
        check_target_data(selector, target, "zeroth_order.selector")
    column = None if selector is None else selector.source_column
    sources = None if column is None else sources_of(train, column, "selector")
    prepared = {name: task.prepare(*part) for name, part in parts.items()}
    if pretrained.num_embeddings is not None:
        for dataset in prepared.values():
            check_token_ids(dataset, pretrained.num_embeddings, tokenizer)
    if column is not None:
        prepared["train"] = prepared["train"].add_column(column, sources)
    return PreparedData(task, prepared["train"], prepared["validation"], prepared.get("target"))


def load_parts(
    data: DataArguments, seed: int, target_file: str | None = None
) -> dict[str, tuple[datasets.Dataset, str]]:
    """Load the data: "train", and where they are given "validation" and "target".

    Each dataset comes with the text before a row's number in messages. Raises ValueError with the
    mistakes of all.
    """
    wanted = [
        ("train", data.train_file, data.train_split, data.max_train_examples),
        ("validation", data.validation_file, data.validation_split, data.max_eval_examples),
        ("target", target_file, None, None),
    ]
    parts, wrong = {}, []
    for part, file, split, most in wanted:
        if part != "train" and file is None and split is None:
            continue
        hub = {
            "dataset_name": data.dataset_name,
            "dataset_config": data.dataset_config,
            "split": split,
        }
        source: dict[str, Any] = hub if file is None else {"file": file}
        names = None if file is None else data.column_names
        try:
            examples = load_examples(
                **source, column_names=names, max_examples=most, seed=seed, keep_rows=True
            )
            parts[part] = (examples, name_of_rows(**source))
        except (ValueError, OSError) as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(wrong))
    return parts
