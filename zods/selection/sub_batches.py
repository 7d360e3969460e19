"""From candidates to micro-batches: measure the candidates, choose, divide the chosen among ranks.

Every rank can read every example by its index in the dataset. Sources that are kept whole are not
measured, so that their examples are trained on whatever their losses are.

Caller: `zods.selection.loaders`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from zods.comm.communicator import Communicator
from zods.config.selector_section import SelectorConfig, check_selector
from zods.data.batch import POSITIONS, WEIGHTS
from zods.data.columns import sources_of
from zods.data.loader import check_dataset
from zods.data.objectives import label_counts
from zods.forward.dataset_metrics import check_own_loss
from zods.selection.features import without_cache
from zods.selection.measurement import Measurement, Sharing
from zods.selection.quotas import deal
from zods.selection.selector import NEEDS, CandidateBatch, Report, Selector

Batch = dict[str, Any]


def _label_counts(labels: Tensor) -> list[int]:
    """The number of labels that count in each row; 1 where labels are not integers."""
    counts = label_counts(labels)
    return [1] * len(labels) if counts is None else counts.tolist()


def _check_quotas(quotas: Mapping[str, int], sources: Sequence[str], path: str) -> None:
    """Raise ValueError where a quota is for a source that no example has."""
    unknown = sorted(set(quotas) - set(sources))
    if unknown:
        raise ValueError(
            f"{path}.quotas: no example's source is {unknown[0]!r}; there are "
            f"{', '.join(sorted(set(sources)))}."
        )


def check_target_data(config: SelectorConfig, target_data: Any, path: str) -> None:
    """Raise ValueError unless there are target examples exactly where the strategy needs them."""
    if config.strategy == "target":
        if target_data is None:
            raise ValueError(
                f'{path}.strategy: "target" chooses the candidates that are most similar to target '
                "examples, and there are none. Give target_data to zods.initialize or zods.select; "
                "to zods.finetune, --target_file."
            )
        check_dataset(target_data, "target_data")
    elif target_data is not None:
        raise ValueError(
            f'target_data: given, but {path}.strategy is "{config.strategy}". Set it to "target", '
            "or remove the data."
        )


class SubBatches:
    """Makes this rank's micro-batches from the examples chosen from a candidate batch.

    selected_ids: ids of the last selection, ascending. report: its report. split: (index of this
    rank, number of ranks) among the ranks that share the chosen examples. It may change between
    steps.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable | None,
        config: SelectorConfig,
        *,
        deepspeed_engine: Any,
        comm: Communicator,
        seed: int,
        path: str,
        loss_mean: str = "tokens",
        target_data: Any = None,
    ) -> None:
        """Check that data, model and configuration fit each other.

        path: key of the selector's configuration in messages. loss_mean: as in
        `zods.data.objectives`. target_data: a dataset like the first one, for the strategy
        "target".

        Raises ValueError where data, model and configuration do not fit each other.
        """
        self.dataset, self._collate = dataset, collate_fn or default_collate
        self.target_data = target_data
        self._comm = comm
        self.split = (comm.rank, comm.world_size)
        self._loss_mean = loss_mean
        self._model: nn.Module = deepspeed_engine.module
        self._micro_batch: int = deepspeed_engine.train_micro_batch_size_per_gpu()
        self.accumulation: int = deepspeed_engine.gradient_accumulation_steps()
        self._loss_checked = False
        budget = self._micro_batch * self.accumulation * comm.world_size
        check_selector(config, path, budget, check_dataset(dataset, "training_data"))
        self._sources = sources_of(dataset, config.source_column, path)
        _check_quotas(config.quotas or {}, self._sources or [], path)
        check_target_data(config, target_data, path)
        # raises the errors of a batch before anything is spent
        self._batch_of([0])
        if target_data is not None:
            for first in range(0, len(target_data), self._micro_batch):
                ids = range(first, min(first + self._micro_batch, len(target_data)))
                self._batch_of(ids, target_data)
        self._measure: Measurement | None = None
        if NEEDS[config.strategy] != "nothing":
            self._measure = Measurement(
                config, deepspeed_engine, comm, self.collated, self._micro_batch
            )
        self.selector = Selector(
            config,
            budget,
            seed=seed,
            target=None if self._measure is None else self._measure.matrix,
            num_parts=comm.world_size,
            exchange=comm.gather_integers if comm.world_size > 1 else None,
        )
        self.selected_ids: list[int] = []
        self.report: Report | None = None
        self._seconds = 0.0
        self._weights: list[float] = []
        self._num_tokens: list[int] = []
        self._num_labels: list[int] = []

    def share_with(self, sharing: Sharing) -> None:
        """Measure only this replica's part of the candidates."""
        if self._measure is not None:
            self._measure.sharing = sharing

    def choose(self, own_ids: Sequence[int]) -> None:
        """Choose examples from the candidates of all ranks.

        own_ids: this rank's part of the candidates; any split over the ranks of this replica gives
        the same result.

        Raises RuntimeError on all ranks if no candidate is usable.
        """
        began = time.perf_counter()
        known = self._token_and_label_counts(own_ids)
        if not self._loss_checked:
            check_own_loss(
                self._model,
                {
                    **without_cache(self._model),
                    **self._batch_of(sorted(known)[: self._micro_batch]),
                },
                self._comm,
            )
            self._loss_checked = True
        ids = sorted(known)
        batch = CandidateBatch(
            ids,
            [known[i][0] for i in ids],
            sources=None if self._sources is None else [self._sources[i] for i in ids],
            # A candidate without a label is not usable.
            losses=torch.tensor([0.0 if known[i][1] else torch.nan for i in ids]),
        )
        quotas, wanted = self.selector.plan(batch)
        if wanted:
            batch = self._measured(batch, wanted)
            if self.selector.strategy == "target":
                batch = replace(batch, targets=self._measured_targets())
        indices, self._weights, self.report = self.selector.select(batch, quotas)
        if not indices:
            raise RuntimeError(
                f"selector: none of {len(ids)} candidates has a label and a finite loss. Look at "
                "the data."
            )
        if wanted and self._measure is not None and self._measure.compares_gradients:
            self.report = replace(self.report, matrix=self._measure.matrix.name)
        self.selected_ids = [ids[index] for index in indices]
        self._comm.check_agreement(json.dumps(self.selected_ids).encode(), "what was selected")
        self._num_tokens = [batch.num_tokens[index] for index in indices]
        self._num_labels = [known[i][1] for i in self.selected_ids]
        self._seconds += time.perf_counter() - began

    def take_seconds(self) -> float:
        """Return the seconds spent on selections since the last call, and reset them."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def micro_batches(self) -> list[Batch]:
        """Make this rank's micro-batches: `accumulation` batches with the entries
        `example_weights` and `example_positions` (among the chosen examples).

        The weights are scaled so that the mean of `weighted_loss` over all micro-batches is the
        weighted mean over the chosen examples, by label token or by example. A micro-batch for
        which there is no example holds one example of weight 0.
        """
        index, num_ranks = self.split
        rows = self.selector.budget // self.accumulation
        indices_by_rank = deal(self._num_tokens, num_ranks, self.accumulation, rows)
        over_tokens = self._loss_mean == "tokens"
        counts = self._num_labels if over_tokens else [1] * len(self._weights)
        total = sum(weight * count for weight, count in zip(self._weights, counts, strict=True))
        scale = num_ranks * self.accumulation / total
        batches = []
        for indices in indices_by_rank[index]:
            batch = self._batch_of([self.selected_ids[index] for index in indices or [0]])
            weights = [self._weights[index] * scale for index in indices] or [0.0]
            positions = torch.tensor(indices or [0])
            batches.append({**batch, WEIGHTS: torch.tensor(weights), POSITIONS: positions})
        return batches

    def collated(self, rows: Sequence[Any]) -> Batch:
        """Collate rows into a batch without weights.

        Raises ValueError if the batch is no dict with a tensor `labels`.
        """
        batch = self._collate(list(rows))
        if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
            found = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f'selector: a batch must be a dict with a tensor "labels"; found {found}. Return '
                "such a dict from collate_fn."
            )
        return dict(batch)

    def _batch_of(self, ids: Sequence[int], dataset: Any = None) -> Batch:
        rows = self.dataset if dataset is None else dataset
        return self.collated([rows[int(i)] for i in ids])

    def _token_and_label_counts(self, own_ids: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Map the id of each candidate of all ranks to (tokens, labels that count).

        Raises ValueError if different ranks give the same candidates.
        """
        rows: list[tuple[int, int, int]] = []
        with self._comm.same_on_all_ranks():
            for start in range(0, len(own_ids), self._micro_batch):
                ids = own_ids[start : start + self._micro_batch]
                batch = self._batch_of(ids)
                mask = batch.get("attention_mask")
                # Without a mask, each example is collated alone: a batch is padded.
                alone = (
                    []
                    if isinstance(mask, Tensor)
                    else [self._batch_of([i])["labels"].numel() for i in ids]
                )
                sizes = mask.sum(1).tolist() if isinstance(mask, Tensor) else alone
                rows += zip(ids, sizes, _label_counts(batch["labels"]), strict=True)
        gathered = self._comm.gather_rows(torch.tensor(rows, dtype=torch.int64).view(-1, 3))
        found = {
            i: (tokens, labels) for of_rank in gathered for i, tokens, labels in of_rank.tolist()
        }
        if 2 * len(found) <= sum(map(len, gathered)):
            raise ValueError(
                f"selector: {sum(map(len, gathered))} candidates are {len(found)} different ones: "
                "ranks give the same. Use a DistributedSampler."
            )
        return found

    def _measured(self, batch: CandidateBatch, wanted: list[int]) -> CandidateBatch:
        """Add the losses and features of the candidates with the indices `wanted`.

        A loss is NaN where a feature of the candidate is not finite. Candidates of similar length
        form a micro-batch.
        """
        order = sorted(wanted, key=lambda index: (-batch.num_tokens[index], index))
        assert self._measure is not None
        found = self._measure(
            self.dataset,
            [batch.ids[index] for index in order],
            self._seeds(),
            what=f"selection {self.selector.step}, candidates",
            by_row=self.selector.strategy == "target",  # a cosine does not depend on lengths
        )
        where = torch.tensor(order)
        features = found.features.new_zeros(len(batch.ids), found.features.shape[1])
        features[where.to(features.device)] = found.features
        assert batch.losses is not None
        losses = batch.losses.clone()
        losses[where] += found.losses
        return replace(
            batch,
            losses=losses,
            features=features,
            largest=found.largest,
            owned=where[found.owned],
        )

    def _seeds(self) -> list[int]:
        """Seeds of the directions of the features, if the strategy needs features."""
        needs_features = NEEDS[self.selector.strategy] == "features"
        return self.selector.direction_seeds() if needs_features else []

    def _measured_targets(self) -> Tensor:
        """The features (T, m) int16 of the target examples of this selection.

        Raises RuntimeError on all ranks if none of them has a gradient.
        """
        number = str(len(self.target_data)).encode()
        self._comm.check_agreement(number, "the number of target examples")
        ids = self.selector.target_ids(len(self.target_data))
        assert self._measure is not None
        what = f"selection {self.selector.step}, targets"
        features = self._measure(
            self.target_data, ids, self._seeds(), what=what, by_row=True
        ).features
        usable = features[features.any(1)]
        if not len(usable):
            raise RuntimeError(
                f"selector: none of {len(ids)} target examples has a label and a finite gradient "
                "that is not 0. Look at the target data."
            )
        return usable

    @property
    def chosen(self) -> tuple[list[int], list[float]]:
        """The last selection: (ids, ascending; their weights)."""
        return self.selected_ids, self._weights

    def restore_selection(
        self,
        own_ids: Sequence[int],
        ids: Sequence[int],
        weights: Sequence[float],
        mean: float | None,
    ) -> None:
        """Restore a selection that was made before a restart.

        own_ids: this rank's part of the candidates. ids, weights: the selection. mean: as in
        `Selector.restore`.
        """
        known = self._token_and_label_counts(own_ids)
        self.selected_ids, self._weights = list(ids), list(weights)
        self._num_tokens, self._num_labels = [known[i][0] for i in ids], [known[i][1] for i in ids]
        self.selector.restore(mean)

    def state_dict(self) -> dict[str, Any]:
        return {
            "selector": self.selector.state_dict(),
            "ids": self.selected_ids,
            "weights": self._weights,
            "num_tokens": self._num_tokens,
            "num_labels": self._num_labels,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.selector.load_state_dict(state["selector"])
        self.selected_ids, self._weights = state["ids"], state["weights"]
        self._num_tokens, self._num_labels = state["num_tokens"], state["num_labels"]
