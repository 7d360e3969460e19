"""The exchange of measurements between replicas."""

from collections.abc import Sequence

import pytest
import torch

from zods.selection import measurement
from zods.selection.measurement import exchanged_with_replicas

NUMBER, WIDTH = 5, 3


class Recorded:
    """The rows of one rank, as they are sent; `of_others` is added to them."""

    split = (0, 2)

    def __init__(self, of_others: torch.Tensor | None) -> None:
        self.of_others = of_others
        self.sent: list[float] = []
        self.names: list[str] = []

    def sum(self, values: Sequence[float], what: str) -> list[float] | None:
        start = len(self.sent)
        self.sent += values
        self.names.append(what)
        if self.of_others is None:
            return None
        others = self.of_others.flatten()[start : start + len(values)].tolist()
        return [a + b for a, b in zip(values, others, strict=True)]


def rows_of(features: torch.Tensor, losses: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The rows that a rank sends."""
    sent = Recorded(None)
    exchanged_with_replicas(sent, features, losses, own, NUMBER, "x")
    return torch.tensor(sent.sent).view(NUMBER, -1)


@pytest.fixture
def measured() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(NUMBER, generator=generator)
    losses[3] = torch.nan  # an example that cannot be used
    return torch.randn(NUMBER, WIDTH, generator=generator) / 3, losses


@pytest.mark.parametrize("at_a_time", [2**18, 2 * (WIDTH + 2), 1])
def test_all_replicas_get_the_bits_that_each_has_measured(measured, at_a_time, monkeypatch):
    monkeypatch.setattr(measurement, "SUMMED_VALUES", at_a_time)
    features, losses = measured
    others = rows_of(features[1::2], losses[1::2], torch.tensor([1, 3]))
    sharing = Recorded(others)
    own = torch.tensor([0, 2, 4])
    found = exchanged_with_replicas(sharing, features[own], losses[own], own, NUMBER, "x")
    assert torch.equal(found[0], features)
    assert torch.equal(found[1].nan_to_num(-1.0), losses.nan_to_num(-1.0))
    assert len(set(sharing.names)) == len(sharing.names)


def test_what_a_lost_replica_would_have_measured_cannot_be_chosen(measured):
    features, losses = measured
    nothing = Recorded(torch.zeros(NUMBER, WIDTH + 2))
    own = torch.tensor([0, 1])
    _, found = exchanged_with_replicas(nothing, features[own], losses[own], own, NUMBER, "x")
    assert torch.equal(found[:2], losses[:2])
    assert found[2:].isnan().all()


def test_a_replica_that_was_left_out_can_choose_anything(measured):
    features, losses = measured
    own = torch.arange(NUMBER)
    _, found = exchanged_with_replicas(Recorded(None), features, losses, own, NUMBER, "x")
    assert found.isfinite().all()
