"""Tasks that are declared by name: their data as published, prompts, label words and metrics."""

from zods.tasks.published.build import build_published
from zods.tasks.published.custom import custom_task, task_of_module
from zods.tasks.published.declaration import PublishedTask
from zods.tasks.published.files import load_published
from zods.tasks.published.table import TASKS

__all__ = [
    "TASKS",
    "PublishedTask",
    "build_published",
    "custom_task",
    "load_published",
    "task_of_module",
]
