"""The loader of the training data that a configuration describes.

Called by `zods.initialize` and by first-order training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zods.comm.communicator import Communicator
from zods.config.schema import ZerothOrderConfig
from zods.config.section import SECTION
from zods.config.selector_section import SelectorConfig
from zods.data.columns import lengths_of, sources_of
from zods.data.loader import TrainingLoader, check_dataset
from zods.data.order import Mixture
from zods.data.stream import StreamLoader, is_stream


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
    """This rank's loader of the training data, a map-style dataset or a stream.

    Raises ValueError where the dataset is neither, is smaller than a batch, or lacks the column of
    its sources or lengths.
    """
    ranks: dict[str, Any] = {
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "rank": comm.rank,
        "world_size": comm.world_size,
        "collate_fn": collate_fn,
        "num_workers": config.dataloader_num_workers,
    }
    if is_stream(dataset):
        return StreamLoader(dataset, **ranks)
    check_dataset(dataset, "training_data")
    mixture = None
    if config.mixture is not None:
        path = f"{SECTION}.mixture"
        sources = sources_of(dataset, config.mixture.source_column, path)
        mixture = Mixture.of(sources or [], config.mixture.weights, f"{path}.weights")
    lengths = lengths_of(dataset, f"{SECTION}.group_by_length") if config.group_by_length else None
    return TrainingLoader(
        dataset,
        seed=config.seed,
        target_data=target_data,
        lengths=lengths,
        mixture=mixture,
        **ranks,
    )


def check_streamed(config: ZerothOrderConfig, selector: SelectorConfig | None = None) -> None:
    """Raise ValueError, with all reasons, where training on a stream cannot follow a key.

    selector: that of first-order training, which is not in the section.
    """
    wrong = []
    if config.is_svrg:
        wrong.append(
            'method "mezo_svrg": its anchor passes over the training set. Use method "mezo"'
        )
    if config.selector is not None or selector is not None:
        wrong.append(
            "selector: it draws its candidates by their positions in the whole set. Remove it"
        )
    if config.mixture is not None:
        wrong.append(
            "mixture: it draws from all examples of a source. Remove it, and mix several streams by "
            "datasets.interleave_datasets(streams, probabilities=..., seed=...)"
        )
    if config.group_by_length:
        wrong.append("group_by_length: it sorts examples by length ahead. Remove it")
    if config.anneal is not None:
        wrong.append(
            "anneal: it compares epochs, whose length is not known. Remove it, and lower lr by a "
            "scheduler"
        )
    if wrong:
        raise ValueError(
            f"training_data: a stream does not go with these keys of {SECTION}: {'; '.join(wrong)}; "
            "or give a map-style dataset."
        )
