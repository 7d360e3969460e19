"""Quotas of sources, and division of the chosen examples among ranks and micro-batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import selection as reference
from zods.core.shares import largest_remainder
from zods.selection.quotas import capped_quotas, deal, quotas_of

SIZES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 40), min_size=1).filter(
    lambda s: sum(s.values()) > 0
)


def test_small_sources_are_kept_whole_and_the_others_share_the_rest():
    # The mean size is 25. c and d are smaller and kept whole. a and b share 50 - 6 = 44 as 60 : 34.
    assert quotas_of({"a": 60, "b": 34, "c": 4, "d": 2}, 50) == {"a": 28, "b": 16, "c": 4, "d": 2}


def test_where_the_small_sources_leave_nothing_all_share_the_budget():
    assert quotas_of({"a": 60, "b": 20, "c": 20}, 40) == {"a": 24, "b": 8, "c": 8}
    assert quotas_of({"a": 60, "b": 20, "c": 20}, 41) == {"a": 1, "b": 20, "c": 20}


def test_a_budget_for_all_keeps_all():
    assert quotas_of({"a": 3, "b": 1}, 4) == quotas_of({"a": 3, "b": 1}, 9) == {"a": 3, "b": 1}


@given(SIZES, st.integers(0, 200))
def test_quotas_fit_the_sources_and_fill_the_budget(sizes: dict[str, int], budget: int):
    quotas = quotas_of(sizes, budget)
    assert list(quotas) == sorted(sizes)
    assert all(0 <= quotas[name] <= sizes[name] for name in sizes)
    assert sum(quotas.values()) == min(budget, sum(sizes.values()))


@given(SIZES, st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 40)))
def test_requested_quotas_are_met_where_the_sources_are_large_enough(
    sizes: dict[str, int], wanted: dict[str, int]
):
    quotas = capped_quotas(wanted, sizes)
    assert sum(quotas.values()) == min(sum(wanted.values()), sum(sizes.values()))
    assert all(
        min(wanted.get(name, 0), sizes[name]) <= quotas[name] <= sizes[name] for name in sizes
    )
    if all(wanted.get(name, 0) <= sizes[name] for name in sizes) and set(wanted) <= set(sizes):
        assert quotas == {name: wanted.get(name, 0) for name in sorted(sizes)}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(sum), st.data())
def test_the_largest_remainders_get_the_rest_of_the_budget(sizes: list[int], data: st.DataObject):
    budget = data.draw(st.integers(0, sum(sizes)))
    shares = largest_remainder(sizes, budget)
    assert shares == reference.largest_remainder(sizes, budget)
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))


@given(
    st.lists(st.integers(1, 500), max_size=70),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_every_example_is_dealt_once_and_no_micro_batch_overflows(
    tokens, ranks, accumulation, micro_batch
):
    tokens = tokens[: ranks * accumulation * micro_batch]
    dealt = deal(tokens, ranks, accumulation, ranks * micro_batch)
    assert sorted(index for rank in dealt for batch in rank for index in batch) == list(
        range(len(tokens))
    )
    assert [len(rank) for rank in dealt] == [accumulation] * ranks
    assert all(len(batch) <= micro_batch for rank in dealt for batch in rank)
    if len(tokens) == ranks * accumulation * micro_batch:
        assert all(len(batch) == micro_batch for rank in dealt for batch in rank)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_get_nearly_the_same_number_of_tokens(ranks: int):
    """For very uneven lengths, the number of tokens of each rank is within 5% of the mean."""
    tokens = [1 + (37 * i * i) % 400 for i in range(64)]
    dealt = deal(tokens, ranks, 64 // ranks // 4, 4 * ranks)
    loads = [sum(tokens[index] for batch in rank for index in batch) for rank in dealt]
    assert max(loads) <= 1.05 * sum(tokens) / ranks
    assert min(loads) >= 0.95 * sum(tokens) / ranks
