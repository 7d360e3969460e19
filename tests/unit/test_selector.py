"""The selector on candidates with given features."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from zods.config.selector_section import STRATEGIES, SelectorConfig, parse_selector
from zods.core.directions import Direction
from zods.selection.baselines import BETAS, EPSILON, PaperFeatures
from zods.selection.facility_location import from_features, lazy_greedy, quantised
from zods.selection.mean_matching import mean_matching
from zods.selection.selector import NEEDS, CandidateBatch, Selector
from zods.selection.target_similarity import most_similar


def batch_of(
    n: int = 40, *, sources: str | None = "aaaabbbcd", m: int = 3, seed: int = 0
) -> CandidateBatch:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, m, generator=generator)
    largest = float(features.abs().max())
    return CandidateBatch(
        ids=list(range(100, 100 + n)),
        num_tokens=[1 + 7 * i % 31 for i in range(n)],
        sources=None if sources is None else [sources[i % len(sources)] for i in range(n)],
        losses=torch.rand(n, generator=generator),
        features=quantised(features, largest),
        largest=largest,
        targets=quantised(torch.randn(7, m, generator=generator), 5.0),
    )


def selector(budget: int = 20, seed: int = 1, **options) -> Selector:
    return Selector(parse_selector({"candidates": 40, **options}, "selector"), budget, seed=seed)


def test_small_sources_are_kept_whole_and_facility_location_chooses_from_the_others():
    batch = batch_of()
    indices, weights, report = selector().select(batch)
    sizes = {name: batch.sources.count(name) for name in "abcd"}
    assert sizes == {"a": 20, "b": 12, "c": 4, "d": 4}
    assert report.quotas == {"a": 8, "b": 4, "c": 4, "d": 4}
    assert report.kept_whole == ["c", "d"]
    assert weights == [1.0] * 20
    for name in "ab":
        members = [i for i in range(40) if batch.sources[i] == name]
        values = batch.features[members].double() * (batch.largest / 32767)
        expected = [members[i] for i in lazy_greedy(from_features(values), report.quotas[name]).ids]
        assert sorted(expected) == [index for index in indices if batch.sources[index] == name]


def test_mean_matching_matches_the_mean_of_each_source():
    batch = batch_of()
    indices, weights, report = selector(strategy="mean_matching").select(batch)
    assert report.quotas == {"a": 8, "b": 4, "c": 4, "d": 4}
    assert weights == [1.0] * 20
    for name in "ab":
        members = [i for i in range(40) if batch.sources[i] == name]
        expected = [members[i] for i in mean_matching(batch.features[members], report.quotas[name])]
        assert expected == [index for index in indices if batch.sources[index] == name]


def test_mean_matching_without_sources_matches_the_mean_of_all_candidates():
    batch = batch_of(sources=None)
    indices, _, report = selector(strategy="mean_matching").select(batch)
    assert report.quotas == {"all": 20}
    assert indices == mean_matching(batch.features, 20)


def test_the_targets_examples_choose_the_most_similar_of_all_candidates():
    batch = batch_of()
    indices, _, report = selector(strategy="target").select(batch)
    assert report.quotas == {"all": 20}
    assert indices == most_similar(batch.features, batch.targets, 20)


def test_each_selection_takes_the_next_target_examples():
    by_target = selector(budget=4, strategy="target")
    of_many, of_few = [], []
    for _ in range(3):
        of_many.append(by_target.target_ids(10))
        of_few.append(by_target.target_ids(3))
        by_target.select(batch_of())
    assert of_many == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert of_few == [
        [0, 1, 2],
        [1, 2, 0],
        [2, 0, 1],
    ]  # each is the first, with one turn more, once


def test_cluster_weights_count_the_candidates_that_each_choice_represents():
    batch = batch_of()
    indices, weights, report = selector(weights="cluster").select(batch)
    assert sum(weights) == 40
    for name in "abcd":
        of_source = [
            w for index, w in zip(indices, weights, strict=True) if batch.sources[index] == name
        ]
        assert sum(of_source) == batch.sources.count(name)
        if name in report.kept_whole:
            assert of_source == [1.0] * 4


def test_without_a_source_column_clusters_of_features_are_the_sources():
    centres = torch.tensor([[0.0, 0], [50, 0], [0, 50]]).repeat_interleave(
        torch.tensor([20, 17, 3]), 0
    )
    features = centres + torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    batch = CandidateBatch(
        list(range(40)), [1] * 40, features=quantised(features, 55.0), largest=55.0
    )
    indices, _, report = selector(num_clusters=3).select(batch)
    assert sorted(report.quotas.values()) == [3, 8, 9]
    assert {37, 38, 39} <= set(indices)
    plain, _, report = selector(num_clusters=1).select(batch)
    assert report.quotas == {"all": 20}
    assert plain == sorted(lazy_greedy(from_features(features), 20).ids)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("weights", ["uniform", "cluster"])
@pytest.mark.parametrize("sources", ["aaaabbbcd", None])
def test_every_strategy_chooses_the_budget_without_repetition_and_reproducibly(
    strategy, weights, sources
):
    options = {"strategy": strategy, "weights": weights}
    batch = batch_of(sources=sources)
    indices, chosen_weights, report = selector(**options).select(batch)
    assert len(indices) == len(set(indices)) == sum(report.quotas.values()) == 20
    assert indices == sorted(indices)
    assert len(chosen_weights) == 20
    assert math.isclose(sum(chosen_weights), 40 if weights == "cluster" else 20)
    assert selector(**options).select(batch)[0] == indices


def test_baselines_choose_as_their_names_say():
    batch = batch_of()
    longest, _, _ = selector(strategy="longest").select(batch)
    assert min(batch.num_tokens[i] for i in longest) >= max(
        batch.num_tokens[i] for i in range(40) if i not in longest
    )
    highest, _, _ = selector(strategy="highest_loss").select(batch)
    assert highest == sorted(batch.losses.topk(20).indices.tolist())
    lowest, _, _ = selector(strategy="lowest_loss").select(batch)
    assert lowest == sorted(batch.losses.topk(20, largest=False).indices.tolist())
    structured, _, report = selector(strategy="structured_random").select(batch)
    assert report.quotas == selector().select(batch)[2].quotas
    assert structured != selector(strategy="structured_random", seed=2).select(batch)[0]
    assert selector(strategy="random").select(batch)[2].quotas == {"all": 20}


def test_selections_differ_from_step_to_step_and_are_determined_by_the_state():
    batch = batch_of()
    first = selector(strategy="random")
    chosen = [first.select(batch)[0] for _ in range(3)]
    assert chosen[0] != chosen[1] != chosen[2]
    resumed = selector(strategy="random")
    resumed.load_state_dict({"step": 2, "history": None})
    assert resumed.select(batch)[0] == chosen[2]
    assert len({*selector().direction_seeds(), *resumed.direction_seeds()}) == 128


def test_warm_up_is_structured_random():
    batch = batch_of()
    warm, plain = selector(warmup_steps=2), selector(strategy="structured_random")
    assert [warm.plan(batch) for _ in range(1)] == [(None, [])]
    assert [warm.select(batch)[0] for _ in range(2)] == [plain.select(batch)[0] for _ in range(2)]
    assert warm.select(batch)[0] == selector().select(batch)[0]


def test_warm_up_counts_steps_not_selections():
    batch = batch_of()
    warm, plain = selector(warmup_steps=3, interval=2), selector(strategy="structured_random")
    # two selections, which serve steps 0 to 3
    assert [warm.select(batch)[0] for _ in range(2)] == [plain.select(batch)[0] for _ in range(2)]
    assert warm.strategy == "greedy"


def test_unusable_candidates_are_counted_and_never_chosen():
    batch = batch_of()
    batch.losses[[0, 1, 4, 7, 39]] = math.nan
    batch.losses[5] = math.inf
    for strategy in STRATEGIES:
        indices, _, report = selector(strategy=strategy).select(batch)
        assert not {0, 1, 4, 5, 7, 39} & set(indices)
        assert (report.unusable, len(indices)) == (6, 20)
    batch.losses[:] = math.nan
    assert selector().select(batch)[:2] == ([], [])
    batch.losses[3] = 1.0
    assert selector().select(batch)[:2] == ([3], [1.0])


def test_only_sources_that_are_not_kept_whole_need_measuring():
    batch = batch_of()
    quotas, wanted = selector().plan(batch)
    assert quotas == {"a": 8, "b": 4, "c": 4, "d": 4}
    assert {batch.sources[index] for index in wanted} == {"a", "b"}
    assert selector().select(batch, quotas)[0] == selector().select(batch)[0]
    assert selector(strategy="longest").plan(batch) == (None, [])
    assert selector(strategy="highest_loss").plan(batch)[1] == list(range(40))
    assert selector().plan(batch_of(sources=None))[1] == list(range(40))


def test_other_sources_fill_the_quota_that_a_source_cannot_fill_after_measuring():
    batch = batch_of()
    quotas, _ = selector().plan(batch)
    of_b = [i for i in range(40) if batch.sources[i] == "b"]
    batch.losses[of_b[:9]] = math.nan
    _, _, report = selector().select(batch, quotas)
    assert report.quotas == {"a": 9, "b": 3, "c": 4, "d": 4}


def test_quotas_of_the_configuration_are_used():
    batch = batch_of()
    requested = {"a": 15, "d": 5}
    indices, _, report = selector(source_column="source", quotas=requested).select(batch)
    # d has only 4 of the 5. b has the most candidates left, and fills the rest.
    assert report.quotas == {
        "a": 15,
        "b": 1,
        "c": 0,
        "d": 4,
    }
    assert len(indices) == 20


def test_the_warning_that_no_source_is_kept_whole_is_given_once(caplog: pytest.LogCaptureFixture):
    batch, chosen_selector = batch_of(), selector(budget=8)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            report = chosen_selector.select(batch)[2]
    assert report.quotas == {"a": 4, "b": 2, "c": 1, "d": 1}
    assert len([r for r in caplog.records if "no source is kept whole" in r.message]) == 1


class Matrix:
    ordinal, shape = 3, (4, 5)


def test_features_of_the_paper_are_normalised_by_the_moments_of_earlier_selections():
    features, z = PaperFeatures(Matrix(), top=20), {}
    for seed in (11, 12, 13):
        z[seed] = Direction().combine_(torch.empty(20), Matrix(), seeds=[seed], coefficients=[1.0])
    features.record(11, 0.5)
    features.record(12, -2.0)
    first = second = torch.zeros(20)
    for gradient in (0.5 * z[11], -2.0 * z[12]):
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
    for row, g in zip(features.expand(torch.tensor([0.3, -0.7]), 13), (0.3, -0.7), strict=True):
        m = (BETAS[0] * first + (1 - BETAS[0]) * g * z[13]) / (1 - BETAS[0] ** 3)
        v = (BETAS[1] * second + (1 - BETAS[1]) * (g * z[13]) ** 2) / (1 - BETAS[1] ** 3)
        torch.testing.assert_close(row, m / (v.sqrt() + EPSILON))
    resumed = PaperFeatures(Matrix(), top=20)
    resumed.load(features.history)
    again = torch.tensor([0.3, -0.7])
    assert torch.equal(resumed.expand(again, 13), features.expand(again, 13))


def test_features_of_the_paper_are_cut_to_the_largest_elements():
    whole = PaperFeatures(Matrix(), top=20).expand(torch.tensor([0.3, -0.7]), 13)
    cut = PaperFeatures(Matrix(), top=6).expand(torch.tensor([0.3, -0.7]), 13)
    kept = whole.abs().sum(0).topk(6).indices.sort().values
    assert torch.equal(cut, whole[:, kept])


@pytest.mark.parametrize("strategy", ["greedy", "mean_matching"])
def test_a_selector_with_features_of_the_paper_resumes_from_its_state(strategy: str):
    config = SelectorConfig(candidates=40, features="paper", top=8, strategy=strategy)
    batch = batch_of(m=1)
    running = Selector(config, 20, seed=1, target=Matrix())
    for _ in range(2):
        running.select(batch)
    resumed = Selector(config, 20, seed=1, target=Matrix())
    assert len(running.state_dict()["history"]) == 2
    resumed.load_state_dict(running.state_dict())
    assert resumed.select(batch) == running.select(batch)


def test_every_strategy_declares_what_it_needs():
    assert set(NEEDS) == set(STRATEGIES)
