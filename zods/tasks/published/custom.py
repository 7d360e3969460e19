"""A user's own declaration of a task, from the content of a YAML file or from a Python file."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zods.tasks.metrics import METRICS
from zods.tasks.prompts import Template, read_escapes
from zods.tasks.published.declaration import PublishedTask

# what a declaration in code has; for the source there is --source_column
_NOT_IN_FILES = ("name", "rows", "document", "columns", "source_column")
_LISTS = ("train_files", "eval_files", "file_columns", "words", "labels", "unlabelled", "texts")


def custom_task(content: Mapping[str, Any], source: str) -> PublishedTask:
    """Declare a task from the keys of `PublishedTask`, of which only `template` is needed.

    source: the file, for messages. Raises ValueError with all mistakes: unknown keys with the
    nearest allowed one, values of another type, and a template or metric that cannot be used.
    """
    fields = {
        field.name: field
        for field in dataclasses.fields(PublishedTask)
        if field.name not in _NOT_IN_FILES
    }
    wrong: list[str] = []
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), list(fields), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Allowed are {', '.join(fields)}."
            wrong.append(f"{key}: unknown key.{hint}")
            continue
        expected = _expected(key, value)
        if expected:
            wrong.append(f"{key}: found {value!r:.100}, expected {expected}")
        values[key] = tuple(value) if key in _LISTS and isinstance(value, list) else value
    if isinstance(values.get("template"), str):
        values["template"] = read_escapes(values["template"], f"{source}: template")
    if "template" not in content:
        wrong.append("template: missing. Give a prompt such as '{text} It was {label}'")
    if wrong:
        raise ValueError("; ".join(f"{source}: {what}" for what in wrong))
    try:
        columns = Template.parse(values["template"]).columns
        _check_kinds(values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return PublishedTask(name="custom", columns=columns, **values)


def task_of_module(path: Path) -> PublishedTask:
    """Run a Python file that declares a task: it sets `task` to a `PublishedTask`.

    Unlike a YAML file it can have functions that make rows. The module's name contains a digest of
    the file, because `datasets` knows functions by their names, and would reuse the rows that an
    older version of the file has made.

    Raises ValueError that names the file where it fails, or declares no task that can be used.
    """
    source = path.read_bytes()
    name = f"zods_task_{hashlib.sha256(source).hexdigest()[:16]}"
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = str(path)
    try:
        # Not by importlib: its bytecode files are those of another version where a file is changed
        # within a second and keeps its size.
        exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    except Exception as error:  # whatever the user's file raises
        raise ValueError(f"{path}: {type(error).__name__}: {error}. Mend the file") from error
    task = getattr(module, "task", None)
    if not isinstance(task, PublishedTask):
        raise ValueError(
            f"{path}: `task` is {type(task).__name__}, expected zods.tasks.PublishedTask. Add "
            "task = PublishedTask(name=..., template=..., columns=...)"
        )
    if task.source_column is not None:
        raise ValueError(f"{path}: source_column is an option, --source_column. Leave it out")
    try:
        Template.parse(task.template)
        _check_kinds(vars(task))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return task


def _expected(key: str, value: Any) -> str:
    """What the value of a key must be; empty where it is so."""
    if key in _LISTS:
        kinds: tuple[type, ...] = (str, int) if key == "unlabelled" else (str,)
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        fits = is_list and all(isinstance(item, kinds) for item in value)
        return "" if fits else "a list of texts (in quotes)"
    if key == "renamed":
        return "" if isinstance(value, Mapping) else "old: new names of columns"
    if key == "options":
        return "" if isinstance(value, bool) else "true or false"
    if key == "max_new_tokens":
        return "" if isinstance(value, int) and value > 0 else "a number of tokens, 1 or more"
    return "" if isinstance(value, str) else "a text (in quotes)"


def _check_kinds(values: Mapping[str, Any]) -> None:
    """Raise ValueError where keys of different kinds of tasks are mixed."""
    kinds = [key for key in ("words", "options", "max_new_tokens") if values.get(key)]
    if len(kinds) > 1:
        raise ValueError(f"{' and '.join(kinds)} exclude each other: give one of them")
    allowed: tuple[str, ...] = METRICS
    if "max_new_tokens" in kinds:
        allowed = ("f1", "last_number")
    elif "options" in kinds:  # the F1 of each candidate is made by a function
        allowed = ("accuracy", "f1") if values.get("rows") else ("accuracy",)
    metric = values.get("metric", allowed[0])
    if metric not in allowed:
        raise ValueError(f"metric: found {metric!r}, allowed are {', '.join(allowed)}")
    labels, words = values.get("labels") or (), values.get("words") or ()
    if labels and len(labels) != len(words):
        raise ValueError(f"labels has {len(labels)} texts, words {len(words)}: give as many")
