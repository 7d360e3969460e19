"""Read the data of a run: the training data, the held-out data, and the selector's target.

Caller: `zods.finetune`, before the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from zods.cli.adapters import read_peft_config
from zods.cli.arguments import load_mapping
from zods.cli.data_options import DataArguments, TaskArguments
from zods.cli.model_checks import check_adapter, check_kind, check_shapes
from zods.cli.options import Arguments, ModelArguments
from zods.cli.pretrained import Pretrained, check_generation_config
from zods.config.deepspeed_json import FirstOrderConfig, RunConfig
from zods.config.schema import ZerothOrderConfig
from zods.data.columns import sources_of
from zods.data.order import Mixture
from zods.files import check_regular
from zods.selection.sub_batches import check_target_data
from zods.tasks import (
    POSITION_IDS,
    TASKS,
    PackedCollator,
    PlainText,
    PublishedTask,
    RowStream,
    SolvedExamples,
    StreamedTask,
    Task,
    build_published,
    build_task,
    check_rows,
    check_streamable,
    check_token_ids,
    custom_task,
    draw_shots,
    load_examples,
    load_published,
    name_of_rows,
    over_label_words,
    prepare_packed,
    read_chat_template,
    read_escapes,
    split_held_out,
    task_of_module,
    with_lengths,
)
from zods.tasks.answers import with_references
from zods.training.training_data import check_streamed


class PreparedData(NamedTuple):
    """The task, and its data as batches are made of them.

    train: a stream with --streaming. Otherwise it keeps the source column of the selector or the
    mixture, where one is named, and has a column of lengths where batches are grouped by them.
    collate: makes batches of `train`. in_context: the held-out data with solved examples before the
    prompts; None without --icl. target: the examples of the selector's `target_file`; None where
    there is none.
    """

    task: Task
    train: datasets.Dataset | datasets.IterableDataset
    collate: Callable[[Sequence[Any]], dict[str, Any]]
    held_out: datasets.Dataset
    in_context: datasets.Dataset | None
    target: datasets.Dataset | None

    def first_batches(self, number: int) -> list[dict[str, Any]]:
        """Training batches of one example each."""
        return [self.collate([row]) for row in islice(iter(self.train), number)]


def prepare_data(
    arguments: Arguments, tokenizer: Any, run: RunConfig | FirstOrderConfig, pretrained: Pretrained
) -> PreparedData:
    """Build the task, and check and tokenise its data."""
    selector = run.selector
    target_file = None if selector is None else selector.target_file
    mixture = run.zeroth_order.mixture
    with_sources = selector if mixture is None else mixture
    column = None if with_sources is None else with_sources.source_column
    declared = declared_task(arguments.task)
    stream = open_stream(arguments.data, run) if arguments.data.streaming else None
    if declared is None:
        parts = load_parts(arguments.data, run.seed, target_file, stream)
    else:
        parts = load_declared(declared, arguments.data, run.seed, target_file, column)
    train, row_name = parts["train"]
    source = row_name.rpartition(",")[0]
    task = _build(arguments.task, declared, tokenizer, train, pretrained, source)
    if stream is not None:
        check_streamable(task)
    if run.zeroth_order.objective == "candidates":
        task = over_label_words(task)
    if run.zeroth_order.generate is not None:
        _check_prompts(task)
    _check_model(arguments.model, pretrained, task)
    check_rows(task, list(parts.values()))
    if "validation" not in parts:
        train, held_out = split_held_out(train, arguments.data.held_out.value, run.seed)
        parts |= {"train": (train, row_name), "validation": (held_out, row_name)}
    if arguments.data.shots is not None:
        train = draw_shots(task, train, arguments.data.shots, run.seed)
        parts["train"] = (train, row_name)
    shots = arguments.data.icl
    solved = None if shots is None else SolvedExamples.draw(task, train, shots, run.seed)
    if selector is not None:
        target = parts.get("target", (None, ""))[0]
        check_target_data(selector, target, "zeroth_order.selector")
    beside = {"train": _sources_beside(run.zeroth_order, column, train)}
    if arguments.task.packing:
        _check_packed(run.zeroth_order, beside["train"])
        if "target" in parts and not isinstance(task, PlainText):
            raise ValueError(
                "--packing: a row of several examples is not compared with one of the target. Leave "
                "out --packing or the strategy target."
            )
    prepared = {
        name: prepare_packed(task, *part)
        if name == "train" and arguments.task.packing
        else task.prepare(*part, beside.get(name))
        for name, part in parts.items()
    }
    if run.zeroth_order.group_by_length:
        prepared["train"] = with_lengths(prepared["train"])
    if solved is not None:
        held_out, held_out_name = parts["validation"]
        prepared["in_context"] = solved.before(held_out, prepared["validation"], held_out_name)
    if pretrained.num_embeddings is not None:
        for dataset in prepared.values():
            check_token_ids(dataset, pretrained.num_embeddings, tokenizer)
    data: datasets.Dataset | datasets.IterableDataset = prepared["train"]
    collate = with_references(task.collate) if run.zeroth_order.generate else task.collate
    if POSITION_IDS in prepared["train"].column_names:
        collate = PackedCollator(task.pad_id)  # type: ignore[attr-defined]
    if stream is not None:
        streamed = StreamedTask(task, stream, row_name, pretrained.num_embeddings)  # type: ignore[arg-type]
        data = stream.shuffled(arguments.data.shuffle_buffer, run.seed)
        collate = streamed.collated_by(collate)
    return PreparedData(
        task,
        data,
        collate,
        prepared["validation"],
        prepared.get("in_context"),
        prepared.get("target"),
    )


def open_stream(data: DataArguments, run: RunConfig | FirstOrderConfig) -> RowStream:
    """Begin to read the training data, where the configuration fits a stream."""
    check_streamed(run.zeroth_order, run.selector)
    return RowStream.open(
        file=data.train_file,
        dataset_name=data.dataset_name,
        dataset_config=data.dataset_config,
        split=data.train_split,
        column_names=data.column_names,
    )


def _check_model(settings: ModelArguments, pretrained: Pretrained, task: Task) -> None:
    """Raise ValueError or OSError where the files of the model or adapter do not fit the task."""
    check_kind(pretrained, task)
    if task.predicts_next_token:
        check_generation_config(Path(pretrained.base))
    check_shapes(pretrained, task, settings.trust_remote_code)
    check_adapter(pretrained, task, settings.trust_remote_code)
    if settings.peft_config is not None:
        read_peft_config(Path(settings.peft_config), task)


def _check_packed(section: ZerothOrderConfig, sources: Mapping[str, Any]) -> None:
    """Raise ValueError where a row of several examples does not fit the configuration.

    sources: the column of the sources, if any.
    """
    if section.generate is not None:
        raise ValueError(
            "--packing: zeroth_order.generate continues one prompt per row. Leave one of them out."
        )
    if sources:
        raise ValueError(
            "--packing: an example would have texts of several sources. Leave out --packing or "
            "source_column."
        )


def _check_prompts(task: Task) -> None:
    """Raise ValueError where the task has no prompts, which generated texts continue."""
    if isinstance(task, PlainText) or not task.predicts_next_token:
        raise ValueError(
            "zeroth_order.generate: texts are generated from prompts, and the data of "
            f"--task {task.name} have none. Give data with prompts and responses, or remove generate "
            "and use an objective of logits."
        )


def _sources_beside(
    section: ZerothOrderConfig, column: str | None, train: datasets.Dataset
) -> dict[str, Any]:
    """The column of the sources that a mixture or a selector reads, {} where none does.

    Raises ValueError where there is no such column, or where the weights of the mixture do not fit.
    """
    if column is None:
        return {}
    mixture = section.mixture
    sources = sources_of(train, column, "selector" if mixture is None else "mixture")
    if mixture is not None:
        Mixture.of(sources or [], mixture.weights, "mixture.weights")
    return {column: sources}


def declared_task(settings: TaskArguments) -> PublishedTask | None:
    """The declaration of a task that brings its own data; None for a kind of task.

    Raises ValueError or OSError where the file of a custom task cannot be read.
    """
    if settings.task_file is None:
        return TASKS.get(settings.task)
    path = Path(settings.task_file)
    check_regular(path)
    if not path.is_file():
        raise FileNotFoundError(f"--task_file: there is no file {path}. Correct the path")
    if path.suffix == ".py":
        return task_of_module(path)
    return custom_task(load_mapping(path), str(path))


def _build(
    settings: TaskArguments,
    declared: PublishedTask | None,
    tokenizer: Any,
    train: datasets.Dataset,
    pretrained: Pretrained,
    source: str,
) -> Task:
    template = settings.template
    common: dict[str, Any] = {
        "template": None if template is None else read_escapes(template, "--template"),
        "label_words": settings.label_words,
        "scoring": settings.scoring,
        "max_length": settings.max_length,
        "num_embeddings": pretrained.num_embeddings,
        "has_token_types": pretrained.has_token_types,
        "class_names": pretrained.class_names,
        "source": source,
    }
    if declared is not None:
        head = settings.classification_head
        return build_published(declared, tokenizer, train, classification_head=head, **common)
    return build_task(
        settings.task,
        tokenizer,
        train,
        text_column=settings.text_column,
        text_pair_column=settings.text_pair_column,
        label_column=settings.label_column,
        prompt_column=settings.prompt_column,
        response_column=settings.response_column,
        data_format=settings.data_format,
        chat_template=None
        if settings.chat_template is None
        else read_chat_template(settings.chat_template),
        **common,
    )


def load_declared(
    declared: PublishedTask,
    data: DataArguments,
    seed: int,
    target_file: str | None,
    source_column: str | None,
) -> dict[str, tuple[datasets.Dataset, str]]:
    """Load the data of a declared task, as `load_parts` does.

    Held-out data are left out where the training data are a file and no file of held-out data is
    given. source_column: a published column that is kept, where it is there. Raises ValueError with
    the mistakes of all parts.
    """
    wanted = [("train", data.train_file, data.max_train_examples)]
    if data.train_file is None or data.validation_file is not None:
        wanted.append(("validation", data.validation_file, data.max_eval_examples))
    if target_file is not None:
        wanted.append(("target", target_file, None))
    parts, wrong = {}, []
    for name, file, most in wanted:
        try:
            part = load_published(
                declared,
                held_out=name == "validation",
                file=file,
                folder=data.data_dir,
                column_names=data.column_names,
                max_examples=most,
                seed=seed,
                source_column=source_column,
            )
        except (ValueError, OSError) as error:
            wrong.append(str(error))
        else:
            if part is not None:
                parts[name] = part
    if wrong:
        raise ValueError("; ".join(wrong))
    return parts


def load_parts(
    data: DataArguments,
    seed: int,
    target_file: str | None = None,
    stream: RowStream | None = None,
) -> dict[str, tuple[datasets.Dataset, str]]:
    """Load the data: "train", and where they are given "validation" and "target".

    Each dataset comes with the text before a row's number in messages. Raises ValueError with the
    mistakes of all. stream: the training data, whose first rows are then "train".
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
            examples = (
                stream.head
                if stream is not None and part == "train"
                else load_examples(
                    **source, column_names=names, max_examples=most, seed=seed, keep_rows=True
                )
            )
            parts[part] = (examples, name_of_rows(**source))
        except (ValueError, OSError) as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(wrong))
    return parts
