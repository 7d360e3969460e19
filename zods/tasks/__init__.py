"""Tasks: read examples, make batches of them for a model, and turn its outputs into metrics."""

from zods.tasks.build import build_task
from zods.tasks.prompts import read_escapes
from zods.tasks.sources import load_examples, name_of_rows, split_held_out
from zods.tasks.task import Task, check_rows, check_token_ids

__all__ = [
    "Task",
    "build_task",
    "check_rows",
    "check_token_ids",
    "load_examples",
    "name_of_rows",
    "read_escapes",
    "split_held_out",
]
