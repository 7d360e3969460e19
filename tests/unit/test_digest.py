"""Digests of examples: each example counts, and nothing but the examples."""

from __future__ import annotations

import copy
import datetime
import random
import time
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from zods.data import digest
from zods.data.digest import ExampleDigests
from zods.data.loader import TrainingLoader, check_dataset

SIZE = 120
Rows = list[dict[str, Any]]


def rows() -> Rows:
    draw = random.Random(0)
    return [
        {
            "input_ids": [draw.randrange(50_000) for _ in range(draw.randrange(1, 20))],
            "source": None if i % 10 == 3 else f"\u0153uvre {i % 4}",
            "weight": i / 7,
            "nested": [[i], [], [i + 1, i + 2]],
            "marked": i % 3 == 0,
            "group": {"name": f"g{i}"},
        }
        for i in range(SIZE)
    ]


def as_table(values: Rows) -> datasets.Dataset:
    return datasets.Dataset.from_list(values)


def as_tensors(values: Rows) -> list[torch.Tensor]:
    return [torch.tensor(row["input_ids"]) for row in values]


def whole(dataset: Any) -> str | None:
    return ExampleDigests(dataset).digest(len(dataset))


CHANGES = {
    "input_ids": [1],
    "source": None,
    "weight": 0.5,
    "nested": [[1, 2], [3]],
    "marked": None,
    "group": {"name": "other"},
}


@pytest.mark.parametrize("make", [list, as_table], ids=["list", "table"])
@pytest.mark.parametrize("column", CHANGES)
def test_a_change_of_any_value_of_any_example_changes_the_digest(make, column):
    before = whole(make(rows()))
    assert whole(make(rows())) == before
    for i in (0, 1, SIZE // 2 + 1, SIZE - 1):
        changed = rows()
        changed[i][column] = CHANGES[column]
        if changed[i][column] != rows()[i][column]:
            assert whole(make(changed)) != before


@pytest.mark.parametrize("make", [list, as_table, as_tensors], ids=["list", "table", "tensors"])
def test_the_order_of_the_examples_counts(make):
    swapped = rows()
    swapped[70], swapped[71] = swapped[71], swapped[70]
    assert whole(make(swapped)) != whole(make(rows()))


def test_the_division_of_a_tables_columns_does_not_count():
    """Lengths and values are digested apart, so that equal values in other rows differ."""
    one = as_table([{"input_ids": [1, 2], "text": "ab"}, {"input_ids": [3], "text": "c"}])
    other = as_table([{"input_ids": [1], "text": "a"}, {"input_ids": [2, 3], "text": "bc"}])
    assert whole(one) != whole(other)


def test_how_a_table_is_stored_does_not_count(tmp_path):
    table = as_table(rows())
    table.save_to_disk(tmp_path / "saved", num_shards=3)
    parts = [table.select(range(50)), table.select(range(50, SIZE))]
    reversed_twice = table.select(range(SIZE - 1, -1, -1)).select(range(SIZE - 1, -1, -1))
    for same in (
        datasets.load_from_disk(tmp_path / "saved"),
        datasets.concatenate_datasets(parts),
        reversed_twice,
        table.with_format("torch"),
    ):
        assert whole(same) == whole(table)


def test_a_table_with_a_function_for_its_examples_is_digested_by_its_examples():
    table = as_table(rows())
    doubled = table.with_transform(lambda batch: {"double": [2 * w for w in batch["weight"]]})
    assert whole(doubled) not in (None, whole(table))


class Slow(list):
    def __getitem__(self, index: Any) -> Any:
        time.sleep(1e-3)
        return super().__getitem__(index)


def test_of_examples_that_are_slow_to_read_as_many_are_digested_as_time_allows(monkeypatch):
    monkeypatch.setattr(digest, "SECONDS", 1.0)
    digests = ExampleDigests(Slow(range(5000)))
    assert 64 <= digests.affordable <= 1000
    text = digests.digest(digests.affordable)
    assert text is not None
    assert text.startswith(f"{digests.affordable}:")
    # the number is in the digest, so that a restart on a slower machine digests as many
    assert ExampleDigests(list(range(5000))).digest(digests.affordable) == text


class Augmented(list):
    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index) if index < 30 else random.random()


def test_examples_that_change_at_random_have_no_digest():
    assert whole(Augmented(range(100))) is None
    assert not ExampleDigests(Augmented(range(100))).repeatable


def test_the_digest_covers_the_examples_of_a_target():
    data, targets = list(range(100)), [[1, 2], [3, 4]]
    alone = ExampleDigests(data).digest(100)
    both = ExampleDigests(data, targets).digest(100)
    assert len({alone, both, ExampleDigests(data, [[1, 2], [3, 5]]).digest(100)}) == 3
    assert ExampleDigests(data, [[1, 2], [3, 4]]).digest(100) == both
    assert not ExampleDigests(data, Augmented(range(100))).repeatable


def test_what_the_digest_does_not_cover_is_said_at_the_start(monkeypatch, caplog):
    def said(dataset: Any, rank: int = 0) -> list[str]:
        caplog.clear()
        TrainingLoader(dataset, micro_batch=1, accumulation=1, rank=rank, world_size=2, seed=1)
        return [record.getMessage() for record in caplog.records]

    assert said(list(range(100))) == []
    (text,) = said(Augmented(range(100)))
    assert "differs when it is read again" in text
    monkeypatch.setattr(digest, "SECONDS", 0.5)
    (text,) = said(Slow(range(5000)))
    assert "all 5000 examples" in text
    assert said(Slow(range(5000)), rank=1) == []


def test_a_stream_is_refused_where_a_length_is_needed():
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"a": 1}]))
    with pytest.raises(
        ValueError, match="target_data: found IterableDataset, expected a map-style"
    ):
        check_dataset(stream, "target_data")


@dataclass
class Example:
    text: str
    when: datetime.date


OTHER_TYPES: dict[str, tuple[Any, Any]] = {
    "date": (datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)),
    "decimal": (Decimal("1.10"), Decimal("1.11")),
    "set": ({"a", "b"}, {"a", "c"}),
    "dataclass": (
        Example("a", datetime.date(2026, 1, 1)),
        Example("a", datetime.date(2026, 1, 2)),
    ),
    "array of objects": (np.array(["a", None], object), np.array(["b", None], object)),
}


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_the_content_of_values_of_other_types_counts(kind):
    one, other = OTHER_TYPES[kind]
    assert whole([{"x": one}]) == whole([{"x": copy.deepcopy(one)}])
    assert whole([{"x": one}]) != whole([{"x": other}])


def test_the_content_and_the_shape_of_an_image_count():
    image = pytest.importorskip("PIL.Image").new
    images = [image("L", (2, 3), 1), image("L", (2, 3), 2), image("L", (3, 2), 1)]
    digests = {whole([{"x": of}]) for of in [*images, image("L", (2, 3), 1)]}
    assert len(digests) == len(images)


def test_the_order_of_a_set_does_not_count():
    assert list({0, 8}) != list({8, 0}), "the order of small sets depends on the insertion"
    assert whole([{0, 8}]) == whole([{8, 0}])


def test_the_digest_of_common_types_stays_as_it_was():
    """A changed one would refuse the resume of earlier runs."""
    row = {"ids": [1, 2], "text": "a", "n": 1.5, "none": None, "t": torch.ones(2), "a": np.ones(2)}
    assert digest.digest_of([row]) == "05c8047640eb067d"
