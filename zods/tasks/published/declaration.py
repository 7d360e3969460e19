"""The declaration of a task whose data are published: a record of facts, without code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PublishedTask:
    """A task: where its data are, what a row is, how it is asked, and how answers are measured.

    Attributes:
        name: name on the command line.
        hub, hub_config, eval_split: name, configuration and held-out split of the data on the hub.
        train_files, eval_files: names of the published files, of which the first one that is there
            is used.
        file_columns: the columns of a published .csv or .tsv file that has no header; empty where
            files have one.
        renamed: {a column's name in a published form: its name here}.
        columns: the columns that a published row must have, after `renamed`, without the label.
        template: the prompt, with the answer's field last.
        words: the label words, in the order of the labels' ids. Empty: a row has candidates or an
            answer of its own.
        labels: the labels' texts in published files, in the order of their ids. Integers count from
            0, or from 1 where the data have no 0. False and true are 0 and 1.
        label_column: column of the label.
        unlabelled: labels of rows that have none, which are left out.
        rows: maps a published row to the rows of the task, with the template's columns.
        document: maps the content of a .json file that is one object to published rows.
        texts: the one or two columns that a classification head reads.
        options: the template's answer is a column of candidates; see `Options`.
        metric: "accuracy", "f1", "f1_macro" or "matthews" with words, "f1" or "last_number" with
            generated answers.
        max_new_tokens: most tokens of a generated answer; 0: nothing is generated.
        source_column: column of an example's source, for the selection of sub-batches.
    """

    name: str
    hub: str | None = None
    hub_config: str | None = None
    eval_split: str = "validation"
    train_files: tuple[str, ...] = ()
    eval_files: tuple[str, ...] = ()
    file_columns: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    columns: tuple[str, ...]
    template: str
    words: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    label_column: str = "label"
    unlabelled: tuple[str | int, ...] = ()
    rows: Callable[[Row], Iterator[Row]] | None = None
    document: Callable[[Any], Iterator[Row]] | None = None
    texts: tuple[str, ...] = ()
    options: bool = False
    metric: str = "accuracy"
    max_new_tokens: int = 0
    source_column: str | None = None

    @property
    def files(self) -> str:
        """The published files and their columns, for messages."""
        columns = [*self.columns, *([self.label_column] if self.words else [])]
        names = " and ".join(" or ".join(group) for group in (self.train_files, self.eval_files))
        return f"{names} (columns {', '.join(columns)})"
