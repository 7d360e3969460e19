"""With fused norms the losses are those of the model's own norms, in every form of evaluation."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.distributed.forms import EPS, POINTS, engine_of
from tests.distributed.ranks import run_ranks
from tests.distributed.zoo import with_adapters, zoo_batch, zoo_model
from zods.comm.communicator import Disagreement
from zods.core.points import Point
from zods.forward import fused_norms
from zods.forward.fused_norms import FusedNorms
from zods.training import initialize

FORMS = ("stacked", "lockstep", "sequential")
ROWS = [Point(9, EPS, rows=(0, 2)), Point(9, -EPS, rows=(0, 2)), Point(10, EPS, rows=(1, 3))]
# name of the model: (how it is made, number of its norms)
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "llama": (lambda: zoo_model("llama"), 5),
    "qwen3": (lambda: zoo_model("qwen3"), 9),
    "llama with adapters": (lambda: with_adapters("llama"), 5),
    "opt": (lambda: zoo_model("opt"), 5),
    "bert": (lambda: zoo_model("bert"), 5),
}
CASES = [
    *((name, form, "gaussian") for name in MODELS for form in FORMS),
    *((name, "stacked", "low_rank") for name in MODELS),
]
SHARDED = [(name, form, "gaussian") for name in ("llama", "opt") for form in FORMS]


def apex(counts: list[str]) -> Any:
    """A stand-in for apex's functions, which need a GPU, in plain operations."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor, shape: Any, eps: float = 1e-6) -> Tensor:
        counts.append("layer")
        centered = x - x.mean(-1, keepdim=True)
        root = (centered.square().mean(-1, keepdim=True) + eps).sqrt()
        return centered / root * weight + bias

    def rms(x: Tensor, weight: Tensor, shape: Any, eps: float = 1e-6) -> Tensor:
        counts.append("rms")
        return functional.rms_norm(x, shape, weight, eps)

    return types.SimpleNamespace(fused_layer_norm_affine=layer, fused_rms_norm_affine=rms)


@torch.no_grad()
def losses(name: str, form: str, direction: str, fused: bool) -> Tensor:
    """The losses of batch and of rows of it at points; with or without fused norms."""
    make, _ = MODELS[name]
    engine = engine_of(make(), direction=direction, evaluation=form, fused_norm=fused)
    batch = zoo_batch(name.split()[0])
    found = engine._evaluator.losses([*POINTS["drifted"], *ROWS], batch).means
    assert engine.evaluation == form
    engine.close()
    return found


def rank_of_forms(cases: list[tuple[str, str, str]]) -> dict[tuple, tuple[float, float, int, int]]:
    """By case: the largest relative change of a loss by fused norms, how far apart the losses are,
    the number of fused norms, and of their calls.
    """
    found: dict[tuple, Any] = {}
    for case in cases:
        counts: list[str] = []
        taken: list[FusedNorms] = []
        own = losses(*case, fused=False)

        def find(model: nn.Module, *_: Any, counts: Any = counts, taken: Any = taken) -> FusedNorms:
            stand_in = apex(counts)
            of_modules = {m: fused_norms._function_for(m, stand_in) for m in model.modules()}
            taken.append(FusedNorms("apex", {m: f for m, f in of_modules.items() if f}))
            return taken[0]

        real, initialize.find_fused_norms = initialize.find_fused_norms, find
        try:
            fused = losses(*case, fused=True)
        finally:
            initialize.find_fused_norms = real
        error = ((fused - own).abs() / own.abs()).max().item()
        apart = ((own.max() - own.min()) / own.abs().max()).item()
        found[case] = (error, apart, len(taken[0].functions), len(counts))
    return found


@pytest.mark.parametrize(("world_size", "cases"), [(1, CASES), (2, SHARDED)])
def test_the_losses_are_those_of_the_own_norms_in_every_form(world_size, cases):
    for found in run_ranks(world_size, rank_of_forms, cases):
        for case, (error, apart, modules, calls) in found.items():
            assert modules == MODELS[case[0]][1], case
            assert calls >= modules, case
            # five norms in float32, each with a few roundings
            assert error < 2e-6, case
            assert apart > 1e-3, case


def rank_of_starts() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for asked in ("auto", False, True):
        engine = engine_of(zoo_model("llama"), fused_norm=asked)
        found[f"code, {asked}"] = engine.recorder.run_record(0).code.get("fused_norm")
        engine.close()
    try:
        engine_of(zoo_model("opt"), fused_norm=True)
    except ValueError as error:
        found["refused"] = str(error)
    if torch.distributed.get_rank() == 1:
        initialize.find_fused_norms = lambda *_: FusedNorms()
    try:
        engine_of(zoo_model("llama"), fused_norm=True)
    except Disagreement as error:
        found["disagreement"] = str(error)
    return found


def test_what_is_fused_is_recorded_and_compared_between_ranks():
    for found in run_ranks(2, rank_of_starts):
        assert found["code, auto"] == "none"
        assert found["code, False"] == "none"
        assert found["code, True"] == "torch, 5"
        assert "zeroth_order.fused_norm: true, but no module" in found["refused"]
        assert "the code" in found["disagreement"]
