"""Tasks: read examples, make batches of them for a model, and turn its outputs into metrics."""

from zods.tasks.build import KINDS, build_task
from zods.tasks.candidates import SCORINGS
from zods.tasks.chat import read_chat_template
from zods.tasks.in_context import SolvedExamples
from zods.tasks.metrics import with_derived
from zods.tasks.packing import POSITION_IDS, PackedCollator, prepare_packed
from zods.tasks.prompted import over_label_words
from zods.tasks.prompts import read_escapes
from zods.tasks.published import (
    TASKS,
    PublishedTask,
    build_published,
    custom_task,
    load_published,
    task_of_module,
)
from zods.tasks.sequences import PlainText
from zods.tasks.shots import draw_shots
from zods.tasks.sources import load_examples, name_of_rows, split_held_out
from zods.tasks.streams import RowStream, StreamedTask, check_streamable
from zods.tasks.task import Task, check_rows, check_token_ids, with_lengths

__all__ = [
    "KINDS",
    "POSITION_IDS",
    "SCORINGS",
    "TASKS",
    "PackedCollator",
    "PlainText",
    "PublishedTask",
    "RowStream",
    "SolvedExamples",
    "StreamedTask",
    "Task",
    "build_published",
    "build_task",
    "check_rows",
    "check_streamable",
    "check_token_ids",
    "custom_task",
    "draw_shots",
    "load_examples",
    "load_published",
    "name_of_rows",
    "over_label_words",
    "prepare_packed",
    "read_chat_template",
    "read_escapes",
    "split_held_out",
    "task_of_module",
    "with_derived",
    "with_lengths",
]
