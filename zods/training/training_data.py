"""The loader of the training data that a configuration describes.

Called by `zods.initialize` and by first-order training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zods.comm.communicator import Communicator
from zods.config.schema import ZerothOrderConfig
from zods.config.section import SECTION
from zods.data.columns import lengths_of, sources_of
from zods.data.loader import TrainingLoader, check_dataset
from zods.data.order import Mixture


def make_training_loader(
    config: ZerothOrderConfig,
    comm: Communicator,
    dataset: Any,
    collate_fn: Callable | None,
    *,
    micro_batch: int,
    accumulation: int,
    target_data: Any = None,
) -> TrainingLoader:
    """This rank's loader of the training data.

    Raises ValueError where the dataset is not map-style, is smaller than a batch, or lacks the
    column of its sources or lengths.
    """
    check_dataset(dataset, "training_data")
    mixture = None
    if config.mixture is not None:
        path = f"{SECTION}.mixture"
        sources = sources_of(dataset, config.mixture.source_column, path)
        mixture = Mixture.of(sources or [], config.mixture.weights, f"{path}.weights")
    lengths = lengths_of(dataset, f"{SECTION}.group_by_length") if config.group_by_length else None
    return TrainingLoader(
        dataset,
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=comm.rank,
        world_size=comm.world_size,
        seed=config.seed,
        collate_fn=collate_fn,
        target_data=target_data,
        lengths=lengths,
        mixture=mixture,
        num_workers=config.dataloader_num_workers,
    )
