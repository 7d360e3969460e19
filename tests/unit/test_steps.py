"""The loss of a training forward: a tensor that can also be read as a model's outputs."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch

from zods.training.step_outputs import StepLoss


@pytest.fixture
def loss() -> StepLoss:
    return torch.tensor(2.5).as_subclass(StepLoss)


def test_the_loss_among_the_outputs_is_the_loss_itself(loss: StepLoss):
    assert loss.loss is loss
    assert loss[0] is loss
    assert loss["loss"] is loss
    assert loss.mean() is loss


def test_values_computed_from_the_loss_are_plain_tensors(loss: StepLoss):
    total = torch.zeros(())
    total += loss
    found = [
        loss / 4,
        2 * loss,
        loss.detach(),
        total,
        torch.stack([loss, loss]).sum(),
        copy.deepcopy(loss),
        sum([loss, loss]),
    ]
    assert all(type(value) is torch.Tensor for value in found)
    assert (float(loss), loss.item(), f"{loss:.2f}", str(loss)) == (
        2.5,
        2.5,
        "2.50",
        "tensor(2.5000)",
    )
    assert np.mean([loss, loss]) == 2.5


def test_a_saved_loss_is_loaded_without_code_of_zods(loss: StepLoss):
    file = io.BytesIO()
    torch.save({"loss": loss}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["loss"] == 2.5


def test_other_outputs_raise_an_error_that_says_how_to_get_them(loss: StepLoss):
    for kind, read in (
        (AttributeError, lambda: loss.logits),
        (IndexError, lambda: loss[1]),
        (KeyError, lambda: loss["logits"]),
    ):
        with pytest.raises(kind, match=r"engine\.eval\(\)"):
            read()
    assert not hasattr(loss, "hidden_states")
    with pytest.raises(RuntimeError, match=r"engine\.backward\(loss\)"):
        loss.backward()
