"""The weight of the anchor in a step of MeZO-SVRG."""

import re

import pytest
import torch

from tests.reference.dense import DenseReference
from zods.config.schema import parse_section
from zods.core.anchor_weight import AnchorWeight, products, record_products
from zods.core.estimators import spsa, svrg


def test_the_weight_is_one_after_a_refresh_and_stays_in_its_range():
    assert AnchorWeight().value == 1.0
    assert AnchorWeight(ca=-1.0, aa=2.0).value == 0.0
    assert AnchorWeight(ca=3.0, aa=2.0).value == 1.0
    assert AnchorWeight(ca=0.5, aa=2.0).value == 0.25


def test_the_weight_is_that_of_the_dense_reference():
    reference = DenseReference({}, lambda params, batch: 0.0, anchor_weight="auto")
    generator = torch.Generator().manual_seed(1)
    state = AnchorWeight()
    for _ in range(40):
        a = torch.randn(3, generator=generator)
        c = 0.6 * a + 0.3 * torch.randn(3, generator=generator)
        state = record_products(state, products(c.tolist(), a.tolist()))
        reference.products.append((float((c * a).sum()), float((a * a).sum())))
        assert state.value == pytest.approx(reference.weight(), rel=1e-5)
    assert 0.4 < state.value < 0.8


def test_the_weight_leaves_the_least_noise_of_directions():
    """The noise of a direction is proportional to (c - w a)^2."""
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(4000, generator=generator)
    c = 0.7 * a + torch.randn(4000, generator=generator)
    best = products(c.tolist(), a.tolist()).value
    noise = {w: float((c - w * a).square().mean()) for w in (0.0, best, 1.0)}
    assert min(noise, key=noise.__getitem__) == best


def test_a_weight_of_zero_is_mezo_and_a_weight_of_one_the_full_correction():
    seeds, c, a = [1, 2, 3], [0.1, -0.2, 0.3], [0.5, 0.1, -0.7]
    assert svrg(seeds, c, seeds, a, 0.0) == spsa(seeds, c)
    assert svrg(seeds, c, seeds, a, 1.0) == svrg(seeds, c, seeds, a)


def run_dense(**settings: object) -> torch.Tensor:
    dense = DenseReference(
        {"w": torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)},
        lambda params, batch: float(((params["w"] - batch) ** 2).sum()),
        whole_set=torch.tensor(0.5, dtype=torch.float64),
        lr=0.01,
        **settings,  # type: ignore[arg-type]
    )
    for k in range(8):
        dense.step(torch.tensor(0.1 * k, dtype=torch.float64))
    return dense.params["w"]


def test_a_run_with_a_weight_of_zero_makes_the_steps_of_mezo():
    without = run_dense(method="mezo_svrg", anchor_weight=0.0, anchor_lr=0.0, anchor_interval=3)
    assert torch.equal(without, run_dense(method="mezo"))


@pytest.mark.parametrize("weight", [-0.1, 1.5, True, "half", None, float("nan"), [1.0]])
def test_another_weight_is_one_error_that_names_the_key(weight):
    said = f'zeroth_order.anchor_weight: found {weight!r}, expected "auto" or a number from 0 to 1.'
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        parse_section({"method": "mezo_svrg", "anchor_weight": weight})


def test_a_weight_is_read_as_a_number_or_auto():
    svrg = {"method": "mezo_svrg"}
    read = [parse_section({**svrg, "anchor_weight": w}).anchor_weight for w in (0, 0.5, "auto")]
    assert read == [0.0, 0.5, "auto"]


def test_a_measured_weight_needs_shared_directions():
    with pytest.raises(ValueError, match='anchor_weight: "auto" needs share_direction'):
        parse_section({"method": "mezo_svrg", "anchor_weight": "auto", "share_direction": False})
