"""Few-shot samples: k training examples of each class. Callers:
`zods.cli.prepared_data` and `zods.tasks.in_context`."""

from __future__ import annotations

import random

import datasets

from zods.tasks.classification import Classification
from zods.tasks.prompted import Prompted
from zods.tasks.sources import draw
from zods.tasks.task import Task


def draw_shots(
    task: Task, dataset: datasets.Dataset, shots: int, seed: int, option: str = "--shots"
) -> datasets.Dataset:
    """Draw `shots` examples of each class by `seed`, in the order of the dataset.

    Where the task has no classes, `shots` examples in all are drawn. option: the option that asks
    for them, for messages.

    Raises ValueError where a class has fewer examples; it names all such classes.
    """
    if not isinstance(task, (Classification, Prompted)):
        if shots > len(dataset):
            raise ValueError(
                f"{option} {shots}: the training data have {len(dataset)} examples. Give a smaller "
                "number"
            )
        return draw(dataset, shots, seed)
    labels = task.labels
    of_class: list[list[int]] = [[] for _ in labels.names]
    for position, label in enumerate(labels.ids(dataset[labels.column][:])):
        of_class[label].append(position)
    few = [
        f"{name} ({len(positions)})"
        for name, positions in zip(labels.names, of_class, strict=True)
        if len(positions) < shots
    ]
    if few:
        raise ValueError(
            f"{option} {shots}: fewer training examples of the classes {', '.join(few)}. Give a "
            "smaller number, or more data"
        )
    generator = random.Random(seed)
    drawn = [position for positions in of_class for position in generator.sample(positions, shots)]
    return dataset.select(sorted(drawn))
