"""The order of the training examples by length and by weights of sources, and worker processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections import Counter

import pytest
import torch
from torch.utils.data import Dataset

from zods.data.columns import lengths_of, sources_of
from zods.data.loader import TrainingLoader
from zods.data.order import Mixture, anchor_order, epoch_order

SIZE, BATCH = 250, 12
LENGTHS = torch.randint(1, 100, (SIZE,), generator=torch.Generator().manual_seed(0))
SOURCES = ["code"] * 20 + ["web"] * 200 + ["math"] * 30
WEIGHTS = {"code": 0.25, "web": 0.25, "math": 0.5}


def mixture() -> Mixture:
    return Mixture.of(SOURCES, WEIGHTS, "weights")


KINDS = {
    "shuffled": {},
    "by length": {"lengths": LENGTHS},
    "mixture": {"mixture": mixture()},
    "mixture by length": {"lengths": LENGTHS, "mixture": mixture()},
}


class Indices(Dataset):
    """The numbers 0 to SIZE - 1."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> int:
        return index


def loader(
    rank: int = 0, ranks: int = 1, accumulation: int = 1, num_workers: int = 0, **order
) -> TrainingLoader:
    return TrainingLoader(
        Indices(), micro_batch=BATCH // (ranks * accumulation), accumulation=accumulation,
        rank=rank, world_size=ranks, seed=3, collate_fn=list, num_workers=num_workers, **order,
    )  # fmt: skip


def steps(ranks: int, accumulation: int, number: int, at=(0, 0), **order) -> list[list[int]]:
    """The global batches of `number` steps, in the order of their positions."""
    streams = []
    for rank in range(ranks):
        of_rank = loader(rank, ranks, accumulation, **order)
        of_rank.go_to(at)
        streams.append(of_rank.forever())
    return [
        [e for _ in range(accumulation) for stream in streams for e in next(stream)]
        for _ in range(number)
    ]


# --- every order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (3, 1), (4, 1), (1, 3), (2, 3)])
def test_the_order_is_the_same_on_any_number_of_ranks(kind, ranks, accumulation):
    assert steps(ranks, accumulation, 30, **KINDS[kind]) == steps(1, 1, 30, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [1, 19, 20, 21, 45])
def test_a_run_resumed_on_other_ranks_sees_the_examples_that_follow(kind, done):
    """An epoch has 20 steps."""
    first = loader(**KINDS[kind])
    seen = list(itertools.islice(first.forever(), done))
    rest = steps(2, 2, 10, first.epoch_and_step, **KINDS[kind])
    assert seen + rest == steps(1, 1, done + 10, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_drawn_by_seed_and_epoch(kind):
    orders = [
        epoch_order(SIZE, BATCH, seed, epoch, **KINDS[kind]).tolist()
        for seed, epoch in ((1, 0), (1, 1), (2, 0), (2, 1), (1, 0))
    ]
    assert orders[0] == orders[4]
    assert all(a != b for a, b in itertools.combinations(orders[:4], 2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_examples_are_those_of_the_last_step(kind):
    one = loader(accumulation=2, **KINDS[kind])
    stream = one.forever()
    for _ in range(30):
        step = next(stream) + next(stream)
        assert one.last_examples() == step


# --- by length ------------------------------------------------------------------------------------


def padded(batches: torch.Tensor) -> float:
    """The share of padding, where a batch is as long as its longest example."""
    lengths = LENGTHS[batches]
    return 1 - float(lengths.sum() / (lengths.amax(1) * BATCH).sum())


def test_batches_by_length_hold_each_example_once_and_little_padding():
    batches = epoch_order(SIZE, BATCH, 3, 0, lengths=LENGTHS)
    assert batches.shape == (20, BATCH)
    assert len(set(batches.flatten().tolist())) == 240
    assert padded(epoch_order(SIZE, BATCH, 3, 0)) > 0.4
    assert padded(batches) < 0.1


def test_batches_by_length_are_in_random_order():
    longest = LENGTHS[epoch_order(SIZE, BATCH, 3, 0, lengths=LENGTHS)].amax(1)
    assert not torch.equal(longest, longest.sort().values)
    correlation = torch.corrcoef(torch.stack([longest.float(), torch.arange(20.0)]))[0, 1]
    assert abs(correlation) < 0.6


def test_lengths_are_a_column_or_the_numbers_of_tokens():
    rows = [{"input_ids": [1] * n, "length": 2 * n} for n in (3, 1)]
    assert lengths_of(rows, "key").tolist() == [6, 2]
    assert lengths_of([{"input_ids": row["input_ids"]} for row in rows], "key").tolist() == [3, 1]
    with pytest.raises(ValueError, match=r"^key: .* no column 'length' or 'input_ids'.* are x\."):
        lengths_of([{"x": 1}], "key")


# --- mixtures -------------------------------------------------------------------------------------


def test_an_epoch_of_a_mixture_has_each_source_by_its_weight():
    order = epoch_order(SIZE, BATCH, 3, 7, mixture=mixture()).flatten().tolist()
    assert Counter(SOURCES[i] for i in order) == {"code": 60, "web": 60, "math": 120}


def test_weights_are_shared_by_largest_remainder():
    thirds = Mixture.of(["a", "b", "c"] * 4, {"a": 1, "b": 1, "c": 1}, "weights")
    drawn = Counter(i % 3 for i in thirds.draw(10, seed=1).tolist())
    assert drawn == {0: 4, 1: 3, 2: 3}


def test_a_source_repeats_an_example_only_when_all_its_examples_were_drawn():
    """Across the ends of epochs, too."""
    draws = [i for epoch in range(4) for i in mixture().draw(240, 3, epoch).tolist()]
    for source in WEIGHTS:
        members = [i for i, name in enumerate(SOURCES) if name == source]
        counts = [0] * SIZE
        for i in draws:
            counts[i] += SOURCES[i] == source
        found = {counts[i] for i in members}
        assert max(found) - min(found) <= 1, source
        assert sum(counts) == 4 * 240 * WEIGHTS[source]


def test_the_passes_of_a_source_are_its_draws_over_its_size():
    assert mixture().passes(240) == {"code": 3.0, "web": 0.3, "math": 4.0}


def test_draws_of_a_mixture_vary_as_those_from_as_many_examples_as_its_effective_size():
    values = torch.randn(SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for members in mixture().members:  # each source has the mean 0 and the variance 1
        values[members] = (values[members] - values[members].mean()) / values[members].std()
    draws = 40  # at most two thirds of a source
    means = torch.stack([values[mixture().draw(draws, seed)].mean() for seed in range(1000)])
    size = mixture().effective_size
    assert means.square().mean().item() == pytest.approx(1 / draws - 1 / size, rel=0.15)
    sizes = Mixture.of(SOURCES, {"code": 20, "web": 200, "math": 30}, "weights")
    assert sizes.effective_size == SIZE


def test_sources_of_a_batch_are_mixed():
    batches = epoch_order(SIZE, BATCH, 3, 0, mixture=mixture())
    assert all(len({SOURCES[i] for i in batch}) > 1 for batch in batches.tolist())


def test_a_refresh_draws_from_the_mixture():
    """Else the anchor would be the mean of another distribution than that of the steps."""
    for examples, number in ((None, SIZE), (40, 40)):
        order = anchor_order(SIZE, examples=examples, shuffled=False, seed=5, mixture=mixture())
        drawn = Counter(SOURCES[i] for i in order.tolist())
        assert len(order) == number
        assert abs(drawn["math"] - number / 2) <= 1


@pytest.mark.parametrize(
    "weights", [{"code": 1, "web": 1}, {**WEIGHTS, "wiki": 1}, {"code": 1, "web": 1, "maths": 1}]
)
def test_weights_of_other_sources_are_refused(weights):
    with pytest.raises(ValueError, match=r"^mixture\.weights: .*sources are code, math, web\."):
        Mixture.of(SOURCES, weights, "mixture.weights")


def test_sources_are_a_column():
    assert sources_of([{"s": 1}, {"s": "b"}], "s", "key") == ["1", "b"]


# --- worker processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shuffled", "mixture by length"])
def test_workers_yield_the_same_batches_and_the_position_counts_those_yielded(kind):
    alone, together = loader(**KINDS[kind]), loader(num_workers=2, **KINDS[kind])
    for a, b in itertools.islice(zip(alone.forever(), together.forever(), strict=False), 23):
        assert a == b
        assert alone.state_dict() == together.state_dict()
        assert alone.last_examples() == together.last_examples()


def test_what_workers_have_loaded_ahead_is_dropped_where_the_position_or_the_split_changes():
    alone, together = loader(), loader(num_workers=2)
    streams = alone.forever(), together.forever()
    for number in range(12):
        assert next(streams[0]) == next(streams[1]), number
        for one in (alone, together):
            if number in (2, 9):
                one.go_to((number // 9, 6))
            if number == 5:
                one.split = (1, 3)
    assert len(next(streams[1])) == BATCH // 3


def test_workers_end_with_the_loop_that_started_them():
    for _ in itertools.islice(loader(num_workers=2), 3):
        assert len(multiprocessing.active_children()) == 2
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not multiprocessing.active_children()


def _terminate(processes: list[int]) -> None:
    for process in processes:
        os.kill(process, signal.SIGTERM)


def test_a_worker_outlives_a_request_to_stop_that_all_processes_of_a_run_get():
    stream = loader(num_workers=1).forever()
    batches = [next(stream)]
    (worker,) = multiprocessing.active_children()
    launcher = multiprocessing.get_context("spawn").Process(target=_terminate, args=([worker.pid],))
    launcher.start()
    launcher.join()
    batches += itertools.islice(stream, 30)
    assert batches == list(itertools.islice(loader().forever(), 31))


def test_workers_leave_the_global_random_state_as_it_was():
    before = torch.random.get_rng_state()
    list(loader(num_workers=1))
    assert torch.equal(torch.random.get_rng_state(), before)
