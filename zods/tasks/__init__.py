"""Tasks: examples from files and the hub, as batches for a model, and its outputs as metrics."""

from zods.tasks.build import build_task
from zods.tasks.sources import load_examples, split_held_out
from zods.tasks.task import Task

__all__ = ["Task", "build_task", "load_examples", "split_held_out"]
