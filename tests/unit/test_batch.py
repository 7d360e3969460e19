"""A model gets all entries of a batch of any type, and the entries are found by name."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from zods.data.batch import (
    WEIGHTS,
    Inputs,
    Signature,
    call_model,
    num_examples,
    take_rows,
    to_device,
)

X, MASK, Y = torch.arange(6.0).view(3, 2), torch.tensor([[1, 0]] * 3), torch.tensor([0, 1, 1])
Batch = namedtuple("Batch", "x labels mask")


@dataclasses.dataclass(frozen=True)
class Example:
    x: Tensor
    labels: Tensor
    mask: Tensor


class Named(nn.Module):
    """A model that returns its arguments."""

    def forward(self, x: Any, labels: Any = None, *, mask: Any = None) -> Any:
        return x, labels, mask


class OneArgument(nn.Module):
    def forward(self, batch: Any) -> Any:
        return batch


class AnyArguments(nn.Module):
    def forward(self, *inputs: Any, **options: Any) -> Any:
        return inputs, options


class AnyKeywords(nn.Module):
    def forward(self, x: Any, **more: Any) -> Any:
        return x, more


def received(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return call_model(model, Signature(model).bind(*args, **kwargs))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, Y), {"mask": MASK}),
        ((X,), {"mask": MASK, "labels": Y}),
        ((), {"labels": Y, "x": X, "mask": MASK}),
        (({"mask": MASK, "x": X, "labels": Y},), {}),
        ((BatchEncoding({"mask": MASK, "x": X, "labels": Y}),), {}),
        ((Batch(X, Y, MASK),), {}),
        ((Example(X, Y, MASK),), {}),
        (([{"mask": MASK, "x": X, "labels": Y}],), {}),
        ((({"mask": MASK, "x": X, "labels": Y, WEIGHTS: torch.ones(3)},),), {}),
    ],
    ids=[
        "mixed",
        "one position",
        "keywords",
        "dict",
        "encoding",
        "namedtuple",
        "dataclass",
        "in a list",
        "with weights",
    ],
)
def test_positions_keywords_and_containers_give_a_model_the_same_arguments(args: Any, kwargs: Any):
    found = received(Named(), *args, **kwargs)
    assert all(one is other for one, other in zip(found, (X, Y, MASK), strict=True))
    bound = Signature(Named()).bind(*args, **kwargs)
    assert isinstance(bound, dict)
    assert bound["labels"] is Y


def test_a_tuple_or_list_is_unpacked_by_position():
    for batch in ((X, Y), [X, Y]):
        assert Signature(Named()).bind(batch) == {"x": X, "labels": Y}


def test_a_forward_with_one_argument_gets_the_whole_batch():
    one = OneArgument()
    for batch in ({"ids": X}, Example(X, Y, MASK), Batch(X, Y, MASK), ["a", "b"], X, "text"):
        assert received(one, batch) is batch
        assert received(one, (batch,)) is batch


def test_a_forward_with_variable_arguments_gets_them_unchanged():
    inputs, options = received(AnyArguments(), X, Y, mask=MASK)
    assert inputs[0] is X
    assert inputs[1] is Y
    assert options["mask"] is MASK
    assert received(AnyArguments(), {"x": X})[1]["x"] is X


def test_a_forward_that_takes_any_keyword_gets_values_that_are_not_tensors():
    x, more = received(
        AnyKeywords(), {"x": X, "texts": ["a", "b", "c"], "flag": True, "none": None}
    )
    assert x is X
    assert more == {"texts": ["a", "b", "c"], "flag": True, "none": None}


@pytest.mark.parametrize("model", [Named(), OneArgument(), AnyArguments(), AnyKeywords()])
def test_bound_inputs_can_be_bound_again(model: nn.Module):
    signature = Signature(model)
    for batch in ({"x": X}, {"batch": X}, (X,), X):
        try:
            bound = signature.bind(batch)
        except ValueError:
            continue
        assert signature.bind(bound) == bound


def test_entries_that_forward_does_not_take_are_named_in_one_error():
    with pytest.raises(
        ValueError, match=r"Named\.forward takes no idx, text; it takes x, labels, mask"
    ):
        Signature(Named()).bind({"x": X, "idx": Y, "text": ["a"]})
    with pytest.raises(ValueError, match="too many positional arguments"):
        Signature(Named()).bind(X, Y, MASK)
    with pytest.raises(ValueError, match="unexpected keyword argument 'ids'"):
        Signature(Named()).bind(X, ids=Y)


def test_moving_a_batch_keeps_its_type_and_the_values_that_are_not_tensors():
    meta = torch.device("meta")
    for batch in (
        Batch(X, Y, "a"),
        Example(X, Y, MASK),
        [X, ("a", Y)],
        {"x": X, "n": 3},
        Inputs((X,), {"y": Y}),
        X,
    ):
        moved = to_device(batch, meta)
        assert type(moved) is type(batch)
        assert num_examples(moved) == 3
    assert to_device(Batch(X, Y, "a"), meta).mask == "a"
    assert to_device(Example(X, Y, MASK), meta).labels.device == meta
    assert X.device.type == "cpu"
    assert type(to_device(BatchEncoding({"x": X}), meta)) is dict

    class Graph:
        device = "cpu"

        def to(self, device: Any) -> Any:
            self.device = device
            return self

    assert to_device({"graph": Graph()}, meta)["graph"].device == meta


def test_the_number_of_examples_does_not_depend_on_the_order_of_the_entries():
    """A row shared by all examples, and a table, may come before or after the inputs."""
    entries = {
        "position_ids": torch.zeros(1, 7),
        "mask": torch.zeros(4, 7),
        "table": torch.zeros(50, 2),
        "ids": torch.zeros(4, 7),
    }
    for order in permutations(entries):
        assert num_examples({key: entries[key] for key in order}) == 4
        assert num_examples({"labels": torch.zeros(3), **{key: entries[key] for key in order}}) == 3
    assert num_examples((torch.zeros(1, 7), torch.zeros(9), torch.zeros(5, 2))) == 5


def test_the_number_of_examples_is_dim_0_of_a_tensor():
    for batch in (
        torch.zeros(3),
        {"n": torch.tensor(5), "x": X},
        ("a", X),
        Batch(X, Y, MASK),
        Example(X, Y, MASK),
    ):
        assert num_examples(batch) == 3
    for batch in ({}, {"n": torch.tensor(1)}, "text"):
        with pytest.raises(ValueError, match="no tensor with a batch dimension"):
            num_examples(batch)


def test_rows_of_a_batch_are_those_of_its_tensors_and_of_its_lists_of_examples():
    images = [torch.full((3, 2), float(i)) for i in range(3)]
    positions, labels = torch.zeros(1, 4), torch.arange(3)
    batch = {"images": images, "labels": labels, "sizes": [(1, 2), (3, 4)], "p": positions}
    part = take_rows(batch, (2, 0))
    assert part["images"] == [images[2], images[0]]
    assert part["labels"].tolist() == [2, 0]
    assert part["sizes"] == batch["sizes"]
    assert part["p"] is positions
    inputs = take_rows(Inputs((images, labels), {"scale": 2.0}), (1,))
    assert inputs.args[0] == [images[1]]
    assert inputs.args[1].tolist() == [1]
    assert inputs.kwargs == {"scale": 2.0}
    assert take_rows(batch, None) is batch
