"""From candidates to the micro-batches that ranks train on: measure, choose, deal out.

Every rank can read every example, by its place in the dataset: what is exchanged is features and losses, never examples.
Candidates are measured in micro-batches that do not depend on the number of ranks, so that their features do not either.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from deepspeed.runtime.dataloader import DeepSpeedDataLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from zods.comm import Communicator
from zods.data import check_dataset, epoch_order
from zods.measuring import to_device
from zods.objectives import IGNORE_INDEX, WEIGHTS, weighted_sum
from zods.section import SelectorConfig, parse_selector
from zods.selection.facility_location import quantised
from zods.selection.features import FeatureExtractor, without_cache
from zods.selection.policy import deal
from zods.selection.selector import NEEDS, CandidateBatch, Report, Selector

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


def sources_of(dataset: Any, column: str | None, path: str) -> list[str] | None:
    """The source of every example of a dataset, by its column. Raises ValueError, naming the columns there are."""
    if column is None:
        return None
    names = getattr(dataset, "column_names", None)
    if names is None:
        first = dataset[0]
        names = list(first) if isinstance(first, Mapping) else []
    if column not in names:
        raise ValueError(
            f"{path}.source_column: the training data has no column {column!r}; its columns are {', '.join(names) or 'none'}."
        )
    if hasattr(dataset, "column_names"):
        return [str(source) for source in dataset[column]]
    return [str(dataset[i][column]) for i in range(len(dataset))]


class SubBatches:
    """Makes this rank's micro-batches of the examples chosen from a candidate batch.

    selected_ids, report: of the last selection.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable | None,
        config: SelectorConfig,
        *,
        model: nn.Module,
        deepspeed_engine: Any,
        comm: Communicator,
        micro_batch: int,
        accumulation: int,
        seed: int,
        path: str,
    ) -> None:
        self.dataset, self._collate = dataset, collate_fn or default_collate
        self._comm, self._micro_batch = comm, micro_batch
        self.accumulation = accumulation
        self._sources = sources_of(dataset, config.source_column, path)
        self._batch_of([0])  # whatever is wrong with it shows before anything is spent
        self._extract: FeatureExtractor | None = None
        if NEEDS[config.strategy] != "nothing":
            self._extract = FeatureExtractor(
                model,
                deepspeed_engine,
                kind=config.features,
                num_directions=config.num_directions,
                rank=config.rank,
                pattern=config.pattern,
                eps=config.eps,
                two_sided=config.two_sided,
            )
        self.selector = Selector(
            config,
            micro_batch * accumulation * comm.world_size,
            seed=seed,
            target=None if self._extract is None else self._extract.target,
            num_parts=comm.world_size,
            share=comm.gather_integers if comm.world_size > 1 else None,
        )
        self.selected_ids: list[int] = []
        self.report: Report | None = None
        self._seconds = 0.0
        self._weights: list[float] = []
        self._num_tokens: list[int] = []

    def choose(self, own_ids: Sequence[int]) -> None:
        """Choose from all ranks' candidates; `own_ids`: those that this rank looks up first, in any split over the ranks.

        Raises RuntimeError on all ranks where not one candidate can be used.
        """
        began = time.perf_counter()
        known = self._looked_up(own_ids)
        ids = sorted(known)
        batch = CandidateBatch(
            ids,
            [known[i][0] for i in ids],
            sources=None if self._sources is None else [self._sources[i] for i in ids],
            losses=torch.tensor([0.0 if known[i][1] else torch.nan for i in ids]),
        )
        quotas, wanted = self.selector.plan(batch)
        if wanted:
            batch = self._measured(batch, wanted)
        places, self._weights, self.report = self.selector.select(batch, quotas)
        if not places:
            raise RuntimeError(
                f"selector: none of {len(ids)} candidates has a label and a finite loss. Look at the data."
            )
        self.selected_ids = [ids[place] for place in places]
        self._num_tokens = [batch.num_tokens[place] for place in places]
        self._seconds += time.perf_counter() - began

    def take_seconds(self) -> float:
        """What choosing took since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def micro_batches(self) -> list[Batch]:
        """This rank's part of what was chosen, `accumulation` batches with an entry `example_weights`.

        Weights are such that the mean of all micro-batches' `weighted_loss` is the weighted mean over the chosen. Where
        there is no example for a micro-batch, it has one of weight 0.
        """
        dealt = deal(self._num_tokens, self._comm.world_size, self.accumulation, self._micro_batch)
        scale = self._comm.world_size * self.accumulation / sum(self._weights)
        batches = []
        for places in dealt[self._comm.rank]:
            batch = self._batch_of([self.selected_ids[place] for place in places or [0]])
            weights = [self._weights[place] * scale for place in places] or [0.0]
            batches.append({**batch, WEIGHTS: torch.tensor(weights)})
        return batches

    def collated(self, rows: Sequence[Any]) -> Batch:
        """A batch, without weights. Raises ValueError where it is not a dict with labels."""
        batch = self._collate(list(rows))
        if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
            found = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"selector: a batch must be a dict with tensors of labels; found {found}.")
        return dict(batch)

    def _batch_of(self, ids: Sequence[int]) -> Batch:
        return self.collated([self.dataset[int(i)] for i in ids])

    def _looked_up(self, own_ids: Sequence[int]) -> dict[int, tuple[int, bool]]:
        """The number of tokens, and whether there is a label, of all ranks' candidates by id."""
        rows: list[tuple[int, int, bool]] = []
        for start in range(0, len(own_ids), self._micro_batch):
            ids = own_ids[start : start + self._micro_batch]
            batch = self._batch_of(ids)
            labels, mask = batch["labels"], batch.get("attention_mask")
            counted = (labels[:, None] if labels.ndim == 1 else labels[:, 1:]) != IGNORE_INDEX
            sizes = mask.sum(1).tolist() if isinstance(mask, Tensor) else [labels[0].numel()] * len(ids)
            rows += zip(ids, sizes, counted.any(1).tolist(), strict=True)
        gathered = self._comm.gather_rows(torch.tensor(rows, dtype=torch.int64).view(-1, 3))
        return {i: (count, bool(labelled)) for of_rank in gathered for i, count, labelled in of_rank.tolist()}

    def _measured(self, batch: CandidateBatch, wanted: list[int]) -> CandidateBatch:
        """The batch with losses and features of the places wanted; losses are not finite where features are not.

        Micro-batches of candidates of like length go to the ranks in turn.
        """
        assert self._extract is not None
        rank, world = self._comm.rank, self._comm.world_size
        order = sorted(wanted, key=lambda place: (-batch.num_tokens[place], place))
        chunks = [order[start : start + self._micro_batch] for start in range(0, len(order), self._micro_batch)]
        seeds = self.selector.direction_seeds() if NEEDS[self.selector.strategy] == "features" else []
        found = []
        for first in range(0, len(chunks), world):  # all ranks make the same number of forwards, as ZeRO-3 needs
            mine = first + rank
            chunk = chunks[mine if mine < len(chunks) else 0]
            inputs = to_device(self._batch_of([batch.ids[place] for place in chunk]), self._comm.device)
            if seeds:
                of_chunk = self._extract(inputs, seeds)
            else:
                losses = self._extract.losses(inputs)
                of_chunk = losses.new_empty(len(losses), 0), losses
            if mine < len(chunks):
                found.append(of_chunk)
        nothing = torch.empty(0, len(seeds), device=self._comm.device), torch.empty(0, device=self._comm.device)
        features, losses = (torch.cat(parts) for parts in zip(nothing, *found, strict=True))
        finite = losses.isfinite() & features.isfinite().all(1)
        features = features.where(finite[:, None], 0.0)
        losses = losses.where(finite, torch.nan)
        own_largest = float(features.abs().max()) if features.numel() else 0.0
        largest = max(row[0] for row in self._comm.gather_scalars([own_largest]))
        sent = torch.cat([quantised(features, largest), losses.float().view(-1, 1).view(torch.int16)], 1)
        rows = torch.cat(self._comm.gather_rows(sent))
        places = torch.tensor([p for r in range(world) for chunk in chunks[r::world] for p in chunk])
        of_all = rows.new_zeros(len(batch.ids), rows.shape[1])
        of_all[places.to(rows.device)] = rows
        known = of_all[:, -2:].contiguous().view(torch.float32).squeeze(1).cpu()
        owned = torch.tensor([place for chunk in chunks[rank::world] for place in chunk], dtype=torch.int64)
        assert batch.losses is not None
        return replace(batch, losses=batch.losses + known, features=of_all[:, :-2], largest=largest, owned=owned)

    def state_dict(self) -> dict[str, Any]:
        return {
            "selector": self.selector.state_dict(),
            "ids": self.selected_ids,
            "weights": self._weights,
            "num_tokens": self._num_tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.selector.load_state_dict(state["selector"])
        self.selected_ids, self._weights, self._num_tokens = state["ids"], state["weights"], state["num_tokens"]


class SelectingLoader:
    """This rank's micro-batches of the chosen examples, epoch after epoch; resumable. The face of `TrainingLoader`.

    An epoch is a pass over the data in candidate batches, `interval` steps for each.
    """

    def __init__(self, selection: SubBatches, comm: Communicator, seed: int) -> None:
        self.selection, self._comm, self._seed = selection, comm, seed
        self._config = selection.selector.config
        self.dataset, self.accumulation = selection.dataset, selection.accumulation
        self.epoch = 0
        self.position = 0  # micro-batches of the running epoch that were handed out

    def collate_fn(self, rows: Sequence[Any]) -> Batch:
        """A batch with weights of 1, whose loss is the mean over its examples, as that of the chosen is."""
        batch = self.selection.collated(rows)
        return {**batch, WEIGHTS: torch.ones(len(batch["labels"]))}

    def __len__(self) -> int:
        """Micro-batches per epoch and rank."""
        return len(self.dataset) // self._config.candidates * self._config.interval * self.accumulation

    def __iter__(self) -> Iterator[Batch]:
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        order = epoch_order(len(self.dataset), self._config.candidates, self._seed, self.epoch)
        batches: list[Batch] = []
        while self.position < len(self):
            step, micro = divmod(self.position, self.accumulation)
            if micro == 0 and step % self._config.interval == 0:
                candidates = order[step // self._config.interval]
                self.selection.choose(candidates[self._comm.rank :: self._comm.world_size].tolist())
            if micro == 0 or not batches:
                batches = self.selection.micro_batches()
            self.position += 1
            yield batches[micro]

    def forever(self) -> Iterator[Batch]:
        """Micro-batches without end, through the epochs."""
        while True:
            yield from self

    def state_dict(self) -> dict[str, Any]:
        steps = self.position // self.accumulation
        return {
            "epoch": self.epoch,
            "steps": steps,
            "size": len(self.dataset),
            "candidates": self._config.candidates,
            **self.selection.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the first step that `state` had not begun, on any number of ranks."""
        for name, key, here in (
            ("training_data", "size", len(self.dataset)),
            ("zeroth_order.selector.candidates", "candidates", self._config.candidates),
        ):
            if state.get(key) != here:
                raise ValueError(
                    f"{name}: {here}, but the checkpoint was made with {state.get(key)}. Resume with the same."
                )
        self.epoch, self.position = state["epoch"], state["steps"] * self.accumulation
        self.selection.load_state_dict(state)


class SelectedBatches:
    """What `select` returns. selection: the last one's ids and report."""

    def __init__(self, loader: DataLoader, selection: SubBatches, comm: Communicator) -> None:
        self._batches: Any = loader.batch_sampler
        self.selection = selection
        self._config = selection.selector.config
        size = int(loader.batch_size or 0) * comm.world_size
        if size == 0 or self._config.candidates % size:
            raise ValueError(
                f"selector.candidates: found {self._config.candidates}, but the loader's batches of {loader.batch_size} on "
                f"{comm.world_size} ranks give {size} at a time. Give a multiple."
            )
        self._loads = self._config.candidates // size

    def __len__(self) -> int:
        """Micro-batches of a pass over the loader, on this rank."""
        per_step = self.selection.accumulation * self._config.interval
        return len(self._batches) // self._loads * per_step

    def __iter__(self) -> Iterator[Batch]:
        ids: list[int] = []
        for count, some in enumerate(self._batches, start=1):
            ids += some
            if count % self._loads == 0:
                self.selection.choose(ids)
                ids = []
                batches = self.selection.micro_batches()
                for _ in range(self._config.interval):
                    yield from batches

    def state_dict(self) -> dict[str, Any]:
        return self.selection.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.selection.load_state_dict(state)


def select(loader: Any, engine: Any, config: Mapping[str, Any], *, seed: int = 42) -> SelectedBatches:
    """Around a loader of first-order DeepSpeed training: micro-batches of chosen examples in place of the loader's own.

        for batch in zods.select(loader, engine, {"candidates": 128, "source_column": "source"}):
            loss = zods.weighted_loss(engine, batch)
            engine.backward(loss)
            engine.step()

    loader: a torch DataLoader, or the one that `deepspeed.initialize` returns, over a map-style dataset that every rank can
    read; its samplers decide who the candidates are. engine: a DeepSpeedEngine; its train_batch_size is the number chosen.
    config: the keys of the section "selector". Each item is a dict of the model's inputs and labels, on the CPU, and
    `example_weights`.

    Raises ValueError, the same on all ranks, where the loader or the configuration does not serve.
    """
    comm = Communicator(torch.device(engine.device))
    with comm.same_on_all_ranks():
        if isinstance(loader, DeepSpeedDataLoader):
            loader = iter(loader).dataloader  # it makes one for each pass
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            raise ValueError(
                f"loader: found {type(loader).__name__}, expected a DataLoader with batches of a map-style dataset."
            )
        size = check_dataset(loader.dataset, "loader.dataset")
        parsed = parse_selector(config, "selector", engine.train_batch_size(), size)
        sub_batches = SubBatches(
            loader.dataset,
            loader.collate_fn,
            parsed,
            model=engine.module,
            deepspeed_engine=engine,
            comm=comm,
            micro_batch=engine.train_micro_batch_size_per_gpu(),
            accumulation=engine.gradient_accumulation_steps(),
            seed=seed,
            path="selector",
        )
        return SelectedBatches(loader, sub_batches, comm)


def weighted_loss(engine: Any, batch: Mapping[str, Any]) -> Tensor:
    """The loss of one of `select`'s micro-batches on `engine`: the weighted sum of its examples' losses, each the mean over
    the example's own labels. 0-d, with a graph; scaled for `engine.backward`, which takes the mean over micro-batches and ranks.
    """
    moved = to_device(batch, engine.device)
    inputs = {key: value for key, value in moved.items() if key not in ("labels", WEIGHTS)}
    return weighted_sum(engine(**inputs, **without_cache(engine.module)), moved)
