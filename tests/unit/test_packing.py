"""Plain texts that are concatenated and cut into rows of equal length."""

from __future__ import annotations

from itertools import chain

import datasets
import pytest
from tiny_tasks import TEXTS, make_task

from zods.tasks import prepare_packed

DOCUMENTS = datasets.Dataset.from_dict({"text": [*TEXTS, " ", *TEXTS]})


def texts_task(max_length: int, kind: str = "llama"):
    return make_task("instruction", kind, DOCUMENTS, max_length)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("length", [3, 8, 17])
def test_packed_rows_are_the_tokens_of_all_texts_in_order(kind, length):
    packed = prepare_packed(texts_task(length, kind), DOCUMENTS, "row")
    whole = texts_task(10_000, kind).prepare(DOCUMENTS)
    for column in ("input_ids", "labels"):
        tokens = list(chain.from_iterable(whole[column]))
        assert [len(row) for row in packed[column]] == [length] * (len(tokens) // length)
        assert list(chain.from_iterable(packed[column])) == tokens[: len(tokens) // length * length]


def test_a_packed_row_is_one_example_without_padding():
    task = texts_task(8)
    batch = task.collate(list(prepare_packed(task, DOCUMENTS, "row")))
    assert batch["input_ids"].shape[1] == 8
    assert batch["attention_mask"].all()
    assert task.tokenizer.eos_token_id in batch["labels"]


def test_texts_that_fill_no_row_are_refused():
    with pytest.raises(ValueError, match=r"--packing: the 8 texts do not fill one row of 9999 "):
        prepare_packed(texts_task(9999), DOCUMENTS, "row")


@pytest.mark.parametrize("name", ["instruction", "prompted", "classification"])
def test_other_data_than_plain_texts_are_refused_with_the_reason(name):
    task = make_task(name, "gpt2")
    with pytest.raises(ValueError, match=r"--packing: .* would attend to each other.* plain texts"):
        prepare_packed(task, DOCUMENTS, "row")
