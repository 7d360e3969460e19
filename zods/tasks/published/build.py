"""Build a declared task as one of the kinds of `zods.tasks`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import datasets
from transformers import PreTrainedTokenizerBase

from zods.tasks.answers import Answers
from zods.tasks.classification import Classification
from zods.tasks.instruction import Instruction
from zods.tasks.labels import Labels
from zods.tasks.options import Options
from zods.tasks.prompted import Prompted
from zods.tasks.prompts import Template
from zods.tasks.published.declaration import PublishedTask
from zods.tasks.task import Task, check_text_columns, pad_token_id

logger = logging.getLogger(__name__)


def build_published(
    declared: PublishedTask,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: datasets.Dataset,
    *,
    max_length: int,
    num_embeddings: int | None,
    has_token_types: bool,
    class_names: Sequence[str] | None,
    classification_head: bool = False,
    template: str | None = None,
    label_words: Sequence[str] | None = None,
    scoring: str | None = None,
    source: str = "",
) -> Task:
    """Build a declared task for its training data, and check both before a model is loaded.

    Args:
        train_dataset: from `load_published`.
        max_length, num_embeddings, has_token_types, class_names, source: see `build_task`.
        classification_head: train a classification head on the texts, without a prompt.
        template, label_words: in place of those of the declaration.
        scoring: how label words or candidates are compared, see `measure_candidates`; by default
            "mean".

    Raises:
        ValueError: a setting that the task cannot use, or a missing column.
    """
    pad_id = pad_token_id(tokenizer, num_embeddings)
    words = label_words or declared.words
    if scoring is not None and not (declared.words or declared.options):
        raise ValueError(
            f"the task {declared.name} does not use scoring ({scoring!r}): its answers are texts. "
            "Leave it out"
        )
    if label_words is not None and len(label_words) != len(declared.words):
        raise ValueError(
            f"label_words gives {len(label_words)} words; the task {declared.name} has "
            f"{len(declared.words)} labels{_listed(declared.labels)}. Give one word for each"
        )
    try:
        if classification_head:
            return _classification(
                declared, tokenizer, train_dataset, max_length, pad_id, has_token_types, class_names
            )
        parsed = Template.parse(template or declared.template)
        if declared.words:
            check_text_columns(train_dataset, parsed.columns, [declared.label_column])
            labels = Labels.declared(train_dataset, declared.label_column, words, declared.labels)
            return Prompted(
                tokenizer, parsed, labels, max_length, pad_id, scoring or "mean", declared.metric
            )
        if declared.options:
            check_text_columns(train_dataset, parsed.columns, [parsed.answer, "answer"])
            return Options(tokenizer, parsed, max_length, pad_id, scoring or "mean")
        check_text_columns(train_dataset, [*parsed.columns, parsed.answer])
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from None
    if not declared.max_new_tokens:
        return Instruction(tokenizer, parsed, max_length, pad_id, skips_empty=True)
    learning = Instruction(tokenizer, parsed, max_length, pad_id)
    task = Answers(learning, declared.max_new_tokens, declared.metric)
    if task.num_generated < declared.max_new_tokens:
        logger.warning(
            "generated answers have at most %d tokens, half of max_length %d, not %d: raise "
            "max_length for longer ones",
            task.num_generated,
            max_length,
            declared.max_new_tokens,
        )
    return task


def _classification(
    declared: PublishedTask,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: datasets.Dataset,
    max_length: int,
    pad_id: int,
    has_token_types: bool,
    class_names: Sequence[str] | None,
) -> Classification:
    if not declared.texts:
        raise ValueError(
            f"the task {declared.name} has no form for a classification head. Leave "
            "--classification_head out"
        )
    check_text_columns(train_dataset, declared.texts, [declared.label_column])
    names = declared.labels or declared.words
    labels = Labels.declared(train_dataset, declared.label_column, names, declared.labels)
    return Classification(
        tokenizer,
        declared.texts,
        labels.in_order_of(class_names or ()),
        max_length,
        pad_id,
        has_token_types,
        declared.metric,
    )


def _listed(labels: Sequence[str]) -> str:
    return f" ({', '.join(labels)})" if labels else ""
