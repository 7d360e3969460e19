"""Build a task from its name and settings, and check that the training data fit it.

Caller: `zods.finetune`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from zods.tasks.chat import ChatTemplate
from zods.tasks.classification import Classification
from zods.tasks.formats import ConversationFormat, TextFormat, find_format
from zods.tasks.instruction import Instruction
from zods.tasks.labels import Labels
from zods.tasks.prompted import Prompted
from zods.tasks.prompts import Template
from zods.tasks.sequences import Chat, PlainText
from zods.tasks.task import Task, check_text_columns, pad_token_id

logger = logging.getLogger(__name__)

_SETTINGS = {
    Classification.name: ("text_column", "text_pair_column", "label_column"),
    Prompted.name: ("template", "label_column", "label_words", "scoring"),
    Instruction.name: (
        "template",
        "prompt_column",
        "response_column",
        "data_format",
        "chat_template",
    ),
}
KINDS = tuple(_SETTINGS)


def build_task(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: datasets.Dataset,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    template: str | None = None,
    label_words: Sequence[str] | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
    scoring: str | None = None,
    data_format: str | None = None,
    chat_template: str | None = None,
    max_length: int,
    num_embeddings: int | None,
    has_token_types: bool,
    class_names: Sequence[str] | None,
    source: str = "",
) -> Task:
    """Build a task for the training data, and check both before a model is loaded.

    Args:
        name: "classification", "prompted" or "instruction".
        train_dataset: its columns are checked, and its labels are the task's labels.
        text_column, text_pair_column: for classification; by default "text", and no pair.
        label_column: for classification and prompted; "label" by default.
        template: for prompted: columns as fields, with {label} last. For instruction: columns as
            fields, with the response's column last.
        label_words: for prompted: the words of the integer labels 0, 1, ...; by default the labels
            or their names.
        prompt_column, response_column: for instruction, instead of a template:
            "{prompt}\\n{response}"; where only one is given, the other is "instruction" or "output".
        scoring: for prompted: how label words are compared, "mean", "sum" or "calibrated"; see
            `zods.tasks.candidates.measure_candidates`. "mean" by default.
        data_format: for instruction without a template and without these columns: a key of
            `zods.tasks.formats.FORMATS`; by default the first one whose columns are there.
        chat_template: for instruction with conversations: a Jinja template, which the tokenizer
            gets; by default the tokenizer's own, or else `zods.tasks.chat.FALLBACK`.
        max_length: maximum length of an example, in tokens.
        num_embeddings: number of tokens that the model embeds; None where it is not known.
        has_token_types: for classification: whether the model embeds token types.
        class_names: for classification: the class names of the head that comes with the model, or
            None. Where they are the labels of the data, the ids follow the head.
        source: name of the training data in messages, e.g. "train.csv".

    Raises:
        ValueError: an unknown name, a setting that the task does not use or cannot use, or a
            missing column.
    """
    settings = {
        "text_column": text_column,
        "text_pair_column": text_pair_column,
        "label_column": label_column,
        "template": template,
        "label_words": label_words,
        "prompt_column": prompt_column,
        "response_column": response_column,
        "scoring": scoring,
        "data_format": data_format,
        "chat_template": chat_template,
    }
    _check_settings(name, settings)
    used: dict[str, Any] = {setting: settings[setting] for setting in _SETTINGS[name]}
    common = tokenizer, train_dataset, source, max_length, pad_token_id(tokenizer, num_embeddings)
    if name == Classification.name:
        return _build_classification(
            *common, **used, has_token_types=has_token_types, class_names=class_names or ()
        )
    if name == Prompted.name:
        return _build_prompted(*common, **used)
    return _build_instruction(*common, **used)


def _check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown task, and for a setting that the task does not use."""
    if name not in _SETTINGS:
        raise ValueError(f"unknown task {name!r}; allowed are {', '.join(_SETTINGS)}")
    for setting, value in settings.items():
        if value is not None and setting not in _SETTINGS[name]:
            raise ValueError(
                f"the task {name} does not use {setting} ({value!r}); it uses "
                f"{', '.join(_SETTINGS[name])}"
            )


def _build_classification(
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: datasets.Dataset,
    source: str,
    max_length: int,
    pad_id: int,
    *,
    text_column: str | None,
    text_pair_column: str | None,
    label_column: str | None,
    has_token_types: bool,
    class_names: Sequence[str],
) -> Classification:
    label_column = label_column or "label"
    text_column = text_column or "text"
    text_columns = (text_column,) if text_pair_column is None else (text_column, text_pair_column)
    _check_columns(train_dataset, source, text_columns, [label_column])
    num_special = tokenizer.num_special_tokens_to_add(pair=text_pair_column is not None)
    if max_length < num_special + len(text_columns):
        raise ValueError(
            f"max_length {max_length} is too short: a text of one token has {num_special} "
            f"special tokens. Give {num_special + len(text_columns)} or more"
        )
    labels = Labels.of(train_dataset, label_column).in_order_of(class_names)
    return Classification(tokenizer, text_columns, labels, max_length, pad_id, has_token_types)


def _build_prompted(
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: datasets.Dataset,
    source: str,
    max_length: int,
    pad_id: int,
    *,
    template: str | None,
    label_column: str | None,
    label_words: Sequence[str] | None,
    scoring: str | None,
) -> Prompted:
    label_column = label_column or "label"
    if template is None:
        raise ValueError("the task prompted needs a template, such as '{text}\\nArea: {label}'")
    parsed = Template.parse(template)
    if parsed.answer != "label":
        raise ValueError(
            f"template {template!r} must end with {{label}}; it ends with {{{parsed.answer}}}"
        )
    _check_columns(train_dataset, source, parsed.columns, [label_column])
    labels = Labels.of(train_dataset, label_column, label_words)
    return Prompted(tokenizer, parsed, labels, max_length, pad_id, scoring or "mean")


def _build_instruction(
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: datasets.Dataset,
    source: str,
    max_length: int,
    pad_id: int,
    *,
    template: str | None,
    prompt_column: str | None,
    response_column: str | None,
    data_format: str | None,
    chat_template: str | None,
) -> Task:
    has_columns = prompt_column is not None or response_column is not None
    if template is None and not has_columns:
        return _build_from_format(
            tokenizer, train_dataset, source, max_length, pad_id, data_format, chat_template
        )
    if data_format is not None or chat_template is not None:
        raise ValueError(
            "pass either data_format and chat_template, or a template with columns as fields, or "
            "prompt_column and response_column"
        )
    if template is None:
        template = f"{{{prompt_column or 'instruction'}}}\n{{{response_column or 'output'}}}"
    elif has_columns:
        raise ValueError(
            "pass either a template, which names its columns, or prompt_column and response_column"
        )
    parsed = Template.parse(template)
    _check_columns(train_dataset, source, [*parsed.columns, parsed.answer])
    return Instruction(tokenizer, parsed, max_length, pad_id)


def _build_from_format(
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: datasets.Dataset,
    source: str,
    max_length: int,
    pad_id: int,
    name: str | None,
    chat_template: str | None,
) -> Task:
    """Build the task `instruction` for data of a known format, and say which one it is."""
    try:
        found = find_format(train_dataset, name)
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from None
    logger.info(
        "data format %s%s: columns %s",
        found.name,
        "" if name else ", found by the columns (--data_format names another)",
        ", ".join(found.used_columns(train_dataset)),
    )
    if isinstance(found, ConversationFormat):
        if chat_template is None and tokenizer.chat_template is None:
            logger.warning(
                "the tokenizer has no chat template: turns are rendered as 'User: ...' and "
                "'Assistant: ...' (--chat_template gives another)"
            )
        template = ChatTemplate.of(tokenizer, chat_template)
        return Chat(tokenizer, max_length, pad_id, template, found)
    if chat_template is not None:
        raise ValueError(
            f"chat_template is for conversations; the data have the format {found.name}, whose "
            "texts are used as they are"
        )
    if isinstance(found, TextFormat):
        return PlainText(tokenizer, max_length, pad_id)
    parsed = Template.parse(f"{{prompt}}{found.separator}{{response}}")
    return Instruction(tokenizer, parsed, max_length, pad_id, found, skips_empty=True)


def _check_columns(
    dataset: datasets.Dataset, source: str, texts: Sequence[str], others: Sequence[str] = ()
) -> None:
    try:
        check_text_columns(dataset, texts, others)
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from None
