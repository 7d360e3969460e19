"""Streams as training data: the examples of each step, on any number of ranks and after a resume."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
from torch.utils.data import IterableDataset

from zods.config.schema import ZerothOrderConfig
from zods.data.stream import HEAD, BadRow, StreamLoader
from zods.integrations.hf import StreamedMicroBatches
from zods.training.training_data import check_streamed

BATCH, SIZE = 12, 100  # 8 steps are an epoch, and 4 examples are left over


class Numbers(IterableDataset):
    """The numbers 0 to size - 1. reads: how often the stream was begun."""

    def __init__(self, size: int = SIZE) -> None:
        self.size, self.reads = size, 0

    def __iter__(self) -> Iterator[int]:
        self.reads += 1
        return iter(range(self.size))


def numbers(size: int) -> Iterator[dict[str, int]]:
    return ({"i": i} for i in range(size))


def collate(rows: list[Any]) -> list[int]:
    return [row["i"] if isinstance(row, dict) else row for row in rows]


def shuffled() -> IterableDataset:
    rows = datasets.IterableDataset.from_generator(numbers, gen_kwargs={"size": SIZE})
    return rows.shuffle(seed=3, buffer_size=10)


def shuffled_shards() -> IterableDataset:
    """`skip` of datasets 5.2 gives other examples than these in the second epoch."""
    rows = datasets.Dataset.from_dict({"i": list(range(SIZE))})
    return rows.to_iterable_dataset(num_shards=5).shuffle(seed=3, buffer_size=10)


STREAMS = {"torch": Numbers, "datasets": shuffled, "shards": shuffled_shards}


def loaders(ranks: int, accumulation: int = 1, make: Any = Numbers, **how: Any) -> list[Any]:
    sizes = {"micro_batch": BATCH // (ranks * accumulation), "accumulation": accumulation}
    how = {"collate_fn": collate, **sizes, **how}
    return [StreamLoader(make(), rank=rank, world_size=ranks, **how) for rank in range(ranks)]


def steps_of(group: list[Any], number: int) -> list[list[int]]:
    """The global batch of each of the next `number` steps, in the order of its positions."""
    streams = [loader.forever() for loader in group]
    return [
        [i for _ in range(group[0].accumulation) for stream in streams for i in next(stream)]
        for _ in range(number)
    ]


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 3), (2, 1), (3, 2)])
def test_an_examples_place_does_not_depend_on_the_ranks_and_the_accumulation(
    ranks, accumulation, kind
):
    whole = steps_of(loaders(1, make=STREAMS[kind]), 20)
    assert steps_of(loaders(ranks, accumulation, STREAMS[kind]), 20) == whole
    for epoch in (whole[:8], whole[8:16]):
        seen = [i for batch in epoch for i in batch]
        assert len(set(seen)) == len(seen) == 96
    if kind == "torch":
        assert whole[0] == whole[8] == list(range(BATCH)), "in the order of the stream"
    else:
        assert whole[:8] != whole[8:16], "each epoch is shuffled anew"


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("done", [1, 7, 8, 9, 16])
def test_a_run_resumes_at_any_step_with_another_number_of_ranks(kind, done):
    """By a checkpoint's state, and by the position in a log. An epoch ends after 8 steps."""
    make = STREAMS[kind]
    before = loaders(2, 3, make)
    head = steps_of(before, done)
    by_state, by_position = loaders(3, 1, make), loaders(1, 2, make)
    for loader in by_state:
        loader.load_state_dict(before[0].state_dict())
    for loader in by_position:
        loader.go_to(before[0].epoch_and_step)
    whole = steps_of(loaders(1, make=make), done + 9)
    assert head + steps_of(by_state, 9) == whole
    assert head + steps_of(by_position, 9) == whole


def test_workers_yield_the_same_batches_and_what_they_loaded_ahead_is_dropped():
    (alone,), (together,) = loaders(1), loaders(1, num_workers=2)
    for number, (a, b) in enumerate(zip(alone.forever(), together.forever(), strict=False)):
        assert a == b
        assert alone.state_dict() == together.state_dict()
        assert alone.digest_of_last_step() == together.digest_of_last_step() != ""
        for loader in (alone, together):
            if number == 3:
                loader.go_to((1, 6))
            if number == 5:
                loader.split = (1, 3)  # as when replicas join
        if number == 12:
            break
    assert len(a) == BATCH // 3


def test_the_digest_of_a_step_is_of_the_examples_of_all_ranks():
    first, second = loaders(2)
    steps_of([first, second], 3)
    assert first.digest_of_last_step() == second.digest_of_last_step()
    assert first.last_examples() == list(range(24, 36))
    steps_of([first], 1)
    assert first.digest_of_last_step() != second.digest_of_last_step()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unusable_row_ends_the_steps_with_its_own_message(workers):
    def picky(rows: list[int]) -> list[int]:
        if 40 in rows:
            raise BadRow("data.jsonl, line 41: no text")
        return rows

    batches = loaders(1, collate_fn=picky, num_workers=workers)[0].forever()
    list(itertools.islice(batches, 3))
    with pytest.raises(BadRow, match=r"^data\.jsonl, line 41: no text$"):
        next(batches)


class Shuffled(Numbers):
    def __iter__(self) -> Iterator[int]:
        self.reads += 1
        return iter(range(self.reads, self.size))


class Once(Numbers):
    def __iter__(self) -> Iterator[int]:
        self.reads += 1
        return iter(range(self.size) if self.reads == 1 else ())


@pytest.mark.parametrize("kind", [Shuffled, Once])
def test_a_stream_that_cannot_be_read_again_is_refused(kind):
    with pytest.raises(ValueError, match=r"^training_data: a stream with other examples when it"):
        loaders(1, make=kind)


def test_a_stream_of_fewer_examples_than_a_step_is_refused():
    with pytest.raises(ValueError, match=r"ends after 11 examples.*train_batch_size of 12"):
        loaders(1, make=lambda: Numbers(11))


def test_a_stream_that_is_shorter_than_the_run_is_refused_on_resume():
    (loader,) = loaders(1, make=lambda: Numbers(70))
    loader.go_to((0, 7))
    with pytest.raises(ValueError, match=r"ends after 70 examples, but the run stands at .*84"):
        next(iter(loader))


def test_a_state_of_a_map_style_dataset_is_refused():
    (loader,) = loaders(1)
    with pytest.raises(ValueError, match="a stream, but the checkpoint was made with 96 examples"):
        loader.load_state_dict({"epoch": 0, "examples": 12, "size": 96})


def test_only_the_first_examples_are_read_at_the_start():
    class Endless(Numbers):
        def __iter__(self) -> Iterator[int]:
            return itertools.count()

    (loader,) = loaders(1, make=Endless)
    assert len(loader.dataset) == len(loader.examples) == HEAD
    assert loader.examples.digest(HEAD).startswith(f"{HEAD}:")
    assert steps_of([loader], 30)[29] == list(range(29 * BATCH, 30 * BATCH))


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"method": "mezo_svrg"}, r'method "mezo_svrg": its anchor passes over the training set'),
        ({"selector": {"candidates": 8}}, r"selector: it draws its candidates by their positions"),
        (
            {"mixture": {"source_column": "kind", "weights": {"a": 1}}},
            r"mixture: it draws from all examples.*interleave_datasets",
        ),
        ({"group_by_length": True}, r"group_by_length: it sorts examples by length ahead"),
        ({"anneal": {"alpha": 2.0}}, r"anneal: it compares epochs, whose length is not known"),
    ],
)
def test_what_needs_the_whole_set_is_refused_with_its_reason(section, reason):
    check_streamed(ZerothOrderConfig())
    with pytest.raises(ValueError, match=rf"^training_data: a stream does not go .*{reason}"):
        check_streamed(ZerothOrderConfig.model_validate(section))


def test_the_trainer_takes_a_run_on_a_stream_for_one_epoch_of_known_length():
    (loader,) = loaders(1, accumulation=2)
    batches = StreamedMicroBatches(loader, 20)
    assert len(batches) == 40
    assert batches.num_examples == 20 * BATCH
    whole = list(itertools.islice(loaders(1, accumulation=2)[0].forever(), 40))
    assert [batches[position] for position in range(40)] == whole
