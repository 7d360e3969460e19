"""Frozen blocks run on one copy of each row."""

import pytest
import torch
from torch.utils._pytree import tree_flatten

from zods.forward.repeated_rows import RepeatedRows
from zods.forward.stacked import NotStackable

ROWS = RepeatedRows([4, 4, 7, 7, 9, 9])
STACK = torch.tensor([[1.0], [1.0], [2.0], [2.0], [3.0], [3.0]])


def carried(*args, **kwargs):
    """Arguments as `Stacking.carried` returns them: tensors of six rows carry the batch."""
    leaves, spec = tree_flatten((args, kwargs))
    carry = [isinstance(leaf, torch.Tensor) and len(leaf) == 6 for leaf in leaves]
    return leaves, spec, carry


def test_a_call_gets_each_row_once_and_the_rest_as_it_is():
    shared = torch.zeros(1, 2)
    (x, (pair, none)), kwargs = ROWS.once(carried(STACK, (shared, None), flag=True))
    assert x.tolist() == [[1.0], [2.0], [3.0]]
    assert (pair is shared, none, kwargs) == (True, None, {"flag": True})


def test_outputs_are_repeated_and_a_row_for_all_stays_one_row():
    one = torch.full((1, 2), 5.0)
    out, same = ROWS.for_all((torch.tensor([[1.0], [2.0], [3.0]]), one))
    assert out.equal(STACK)
    assert same is one


@pytest.mark.parametrize(
    "arguments",
    [
        (STACK, {"keys": STACK}),  # a block may add to it
        (STACK, [STACK]),
        (STACK, object()),  # such as a cache
        (torch.zeros(3, 1),),  # no row of the batch
    ],
)
def test_a_call_that_may_change_its_inputs_or_has_other_rows_is_left_as_it_is(arguments):
    with pytest.raises(NotStackable):
        ROWS.once(carried(*arguments))


@pytest.mark.parametrize("output", [torch.zeros(2, 1), torch.zeros(())])
def test_an_output_with_other_rows_does_not_fit_a_stack(output):
    with pytest.raises(NotStackable):
        ROWS.for_all(output)
