"""Division of the training data among ranks and steps.

The global batches do not depend on the number of ranks. An epoch holds each example at most once.
A run resumes at any step.
"""

import itertools

import pytest
import torch
from torch.utils.data import Dataset

from zods.core.example_groups import divide, group_starts, part_starts, positions_of
from zods.data.loader import TrainingLoader, WholePass, check_dataset
from zods.data.order import anchor_order, epoch_order


class Numbers(Dataset):
    """The numbers 0 to size - 1."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return index


def loaders(
    size: int, ranks: int, accumulation: int = 1, batch: int = 12, seed: int = 0
) -> list[TrainingLoader]:
    micro = batch // (ranks * accumulation)
    return [
        TrainingLoader(
            Numbers(size), micro_batch=micro, accumulation=accumulation, rank=rank,
            world_size=ranks, seed=seed, collate_fn=list,
        )
        for rank in range(ranks)
    ]  # fmt: skip


def steps_of(group: list[TrainingLoader], number: int) -> list[list[int]]:
    """The global batch of each of the next `number` steps, sorted."""
    accumulation = group[0].accumulation
    streams = [loader.forever() for loader in group]
    taken = [[list(itertools.islice(s, accumulation)) for _ in range(number)] for s in streams]
    return [
        sorted(example for rank in taken for micro in rank[step] for example in micro)
        for step in range(number)
    ]


@pytest.mark.parametrize(
    ("ranks", "accumulation"), [(1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 2), (4, 3), (12, 1)]
)
def test_global_batches_do_not_depend_on_the_ranks_and_the_accumulation(ranks, accumulation):
    assert steps_of(loaders(100, ranks, accumulation), 20) == steps_of(loaders(100, 1), 20)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 3), (4, 1)])
def test_an_epoch_holds_each_example_at_most_once(ranks, accumulation):
    batches = steps_of(loaders(100, ranks, accumulation), 3 * (100 // 12))
    for epoch in range(3):
        seen = [example for batch in batches[epoch * 8 : epoch * 8 + 8] for example in batch]
        assert len(set(seen)) == len(seen) == 96


def test_an_epoch_of_whole_batches_holds_every_example():
    batches = steps_of(loaders(96, 2), 8)
    assert sorted(itertools.chain(*batches)) == list(range(96))


def test_the_examples_left_out_change_with_the_epoch():
    batches = steps_of(loaders(100, 2), 8 * 20)
    left_out = [
        frozenset(range(100)) - {e for batch in batches[epoch * 8 : epoch * 8 + 8] for e in batch}
        for epoch in range(20)
    ]
    assert all(len(tail) == 4 for tail in left_out)
    assert len(set(left_out)) == 20
    assert not frozenset.intersection(*left_out)


def test_epochs_and_seeds_are_shuffled_differently():
    first, second = steps_of(loaders(96, 1), 16)[:8], steps_of(loaders(96, 1), 16)[8:]
    assert first != second
    assert steps_of(loaders(96, 1, seed=1), 8) != first


def test_an_iterator_ends_with_its_epoch_and_the_next_iterator_begins_another_epoch():
    (loader,) = loaders(100, 1, accumulation=2)
    assert len(loader) == 16
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == 16
    assert first != second
    assert loader.epoch == 1


def test_a_loop_left_in_the_middle_of_an_epoch_continues_there():
    (loader,), (whole,) = loaders(100, 1), loaders(100, 1)
    head = list(itertools.islice(loader, 3))
    assert head + list(loader) == list(whole)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("done", [0, 1, 5, 7, 8, 9, 16, 21])
def test_a_run_resumes_at_any_step_with_any_number_of_ranks(done, ranks, accumulation):
    """100 examples in batches of 12: an epoch ends after 8 steps."""
    before = loaders(100, 2, 3)
    head = steps_of(before, done)
    states = [loader.state_dict() for loader in before]
    assert all(state == states[0] for state in states)
    after = loaders(100, ranks, accumulation)
    for loader in after:
        loader.load_state_dict(states[0])
    assert head + steps_of(after, 10) == steps_of(loaders(100, 1), done + 10)


def test_an_unfinished_step_is_repeated_on_resume():
    (loader,) = loaders(100, 1, accumulation=3)
    whole = list(itertools.islice(loaders(100, 1, accumulation=3)[0].forever(), 12))
    list(itertools.islice(loader.forever(), 5))  # one step and two of three micro-batches
    (resumed,) = loaders(100, 1, accumulation=3)
    resumed.load_state_dict(loader.state_dict())
    assert list(itertools.islice(resumed.forever(), 9)) == whole[3:]


@pytest.mark.parametrize("target", [(0, 2), (1, 1), (2, 0)])
def test_a_pass_follows_a_change_of_the_position_and_ends_with_its_epoch(target):
    """A replica that was left out of steps goes to the leader's position."""
    (loader,) = loaders(60, 1)
    size = loader.steps_per_epoch
    seen = []
    for _ in loader:
        seen.append(loader.epoch_and_step)
        if len(seen) == 1:
            loader.go_to(target)
    rest = range(target[1] + 1, size + 1) if target[0] == 0 else ()
    assert seen == [(0, 1), *((0, step) for step in rest)]
    next(iter(loader))
    assert loader.epoch_and_step == ((1, 1) if target[0] == 0 else (target[0], target[1] + 1))


def test_a_loader_that_goes_back_to_an_earlier_state_repeats_what_followed():
    (loader,) = loaders(100, 1)
    steps_of([loader], 3)
    state = loader.state_dict()
    following = steps_of([loader], 12)
    loader.load_state_dict(state)
    assert steps_of([loader], 12) == following


def test_a_state_of_another_batch_size_is_refused_where_it_does_not_fit():
    (loader,) = loaders(100, 1)
    steps_of([loader], 1)
    (other,) = loaders(100, 1, batch=10)
    with pytest.raises(ValueError, match=r"train_batch_size.* 10.*example 12"):
        other.load_state_dict(loader.state_dict())


def test_a_step_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"training_data: 11 examples.*train_batch_size of 12"):
        loaders(11, 2)


@pytest.mark.parametrize("dataset", [Numbers(0), [], iter(range(3)), object(), None])
def test_a_dataset_without_a_length_or_without_examples_is_refused(dataset):
    with pytest.raises(ValueError, match=r"^training_data: "):
        check_dataset(dataset, "training_data")


def test_lists_are_datasets():
    assert check_dataset([1, 2, 3], "training_data") == 3


@pytest.mark.parametrize(
    "make", [lambda: loaders(24, 1)[0], lambda: WholePass(Numbers(24), 5, 0, 2, list)]
)
def test_loading_leaves_the_global_random_state_as_it_was(make):
    before = torch.random.get_rng_state()
    list(make())
    assert torch.equal(torch.random.get_rng_state(), before)


# --- a whole pass ---

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 12, 31]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 50])
def test_a_whole_pass_counts_every_example_once_in_the_same_number_of_rounds_on_every_rank(
    ranks, micro_batch
):
    for size in SIZES:
        passes = [
            list(WholePass(Numbers(size), micro_batch, rank, ranks, list)) for rank in range(ranks)
        ]
        counted = [
            example for one in passes for batch, _, counts in one if counts for example in batch
        ]
        assert sorted(counted) == list(range(size))
        rounds = {len(one) for one in passes} | {
            len(WholePass(Numbers(size), micro_batch, 0, ranks))
        }
        assert len(rounds) == 1, f"{size} examples: ranks run {rounds} rounds, not the same number"
        assert all(0 < len(batch) <= micro_batch for one in passes for batch, *_ in one)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_micro_batches_of_a_whole_pass_do_not_depend_on_the_ranks(ranks):
    for size in SIZES:
        passes = [list(WholePass(Numbers(size), 3, rank, ranks, list)) for rank in range(ranks)]
        counted = sorted(batch for one in passes for batch, _, counts in one if counts)
        assert counted == [list(range(start, min(start + 3, size))) for start in range(0, size, 3)]


def test_a_rank_without_a_chunk_still_runs_its_forwards():
    """With one chunk on four ranks, three ranks run a batch that does not count."""
    passes = [list(WholePass(Numbers(2), 8, rank, 4, list)) for rank in range(4)]
    assert [[counts for *_, counts in one] for one in passes] == [[True], [False], [False], [False]]
    assert all(batch == [0, 1] for one in passes for batch, *_ in one)


def test_a_state_of_other_data_is_refused():
    loader = make_loader_of(list(range(40)))
    next(iter(loader))
    with pytest.raises(ValueError, match="24 examples, but the checkpoint was made with 40"):
        make_loader_of(list(range(24))).load_state_dict(loader.state_dict())


def make_loader_of(data):
    return TrainingLoader(data, micro_batch=4, accumulation=1, rank=0, world_size=1, seed=1)


# --- the examples of a refresh --------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 64, 5])
@pytest.mark.parametrize("examples", [None, 4, 100])
def test_a_refresh_takes_an_example_once(size, examples):
    order = anchor_order(size, examples=examples, shuffled=True, seed=3).tolist()
    assert len(set(order)) == len(order) == (size if examples is None else min(size, examples))
    assert set(order) <= set(range(size))


def test_the_order_of_a_refresh_is_drawn_by_the_seed():
    draws = [
        anchor_order(1000, examples=100, shuffled=False, seed=seed) for seed in (1, 1, 2**64 - 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_refresh_on_the_whole_set_takes_it_in_its_order():
    order = anchor_order(6, examples=None, shuffled=False, seed=3)
    assert order.tolist() == list(range(6))


# --- groups of examples ---------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "parts"), [(10, 1), (10, 3), (64, 64), (5, 8)])
def test_parts_are_those_of_tensor_split(size, parts):
    expected = torch.arange(size).tensor_split(parts)
    starts = part_starts(size, parts)
    found: dict[int, list[int]] = {}
    for group in divide(range(size), starts):
        rows = range(size) if group.rows is None else group.rows
        found[group.index] = list(rows)
    assert [found.get(part, []) for part in range(parts)] == [part.tolist() for part in expected]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 4, 5, "all"])
def test_an_examples_group_does_not_depend_on_the_ranks_or_micro_batches(size, ranks, accumulation):
    starts = group_starts(24, size)
    groups: dict[int, int] = {}
    for micro in range(accumulation):
        for rank in range(ranks):
            positions = positions_of(24, accumulation, micro, (rank, ranks))
            for group in divide(positions, starts):
                for row in range(len(positions)) if group.rows is None else group.rows:
                    groups[positions[row]] = group.index
    assert groups == {i: 0 if size == "all" else i // size for i in range(24)}


def test_the_examples_of_a_micro_batch_are_those_of_its_positions():
    data = list(range(24))
    for ranks, accumulation in ((1, 1), (2, 3), (4, 2)):
        loaders = [
            TrainingLoader(
                data, micro_batch=24 // (ranks * accumulation), accumulation=accumulation,
                rank=rank, world_size=ranks, seed=1,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        order = epoch_order(24, 24, 1, 0)[0].tolist()
        for rank, loader in enumerate(loaders):
            for micro, batch in enumerate(loader):
                positions = positions_of(24, accumulation, micro, (rank, ranks))
                assert batch.tolist() == [order[position] for position in positions]
