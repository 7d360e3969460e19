"""Norms in a stack run once, with each stream's weights for the stream's rows."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from tests.unit.perturbed import output_at, perturbed_forward
from zods.core.points import Center, Point, pair
from zods.forward.module_runners import StackRunner
from zods.forward.perturbed_modules import PerturbedModules
from zods.forward.row_norms import find_row_norms

WIDTH = 8


class NoSquareNorm(LlamaRMSNorm):
    """Neither of torch's norms, but each row has its own output."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + self.variance_epsilon) * (3 - self.weight)


class OverTheBatchNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True))


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


class WeightsSummedNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.sum()


class CountingNorm(LlamaRMSNorm):
    """A forward that changes a buffer must not be called to compare it."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def own_forward() -> nn.Module:
    module = LlamaRMSNorm(WIDTH)
    module.forward = lambda x: 2 * module.weight * x
    return module


ROW_NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "layer norm without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "torch's RMS norm": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
    **{
        kind.__name__: functools.partial(kind, WIDTH)
        for kind in (LlamaRMSNorm, Olmo2RMSNorm, Gemma3RMSNorm, T5LayerNorm, NoSquareNorm)
    },
}


class TupleNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


class ChannelsFirstNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight[:, None, None] * x


class OneWeightNorm(LlamaRMSNorm):
    def __init__(self, width: int) -> None:
        super().__init__(1)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    **{
        kind.__name__: functools.partial(kind, WIDTH)
        for kind in (OverTheBatchNorm, GatedRMSNorm, WeightsSummedNorm, CountingNorm, TupleNorm)
    },
    "channels first": lambda: ChannelsFirstNorm(WIDTH),
    "weights of heads": lambda: CohereLayerNorm((2, WIDTH)),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "layer norm without parameters": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "layer norm over two dims": lambda: nn.LayerNorm((2, WIDTH)),
    "forward replaced": own_forward,
    "pruned": lambda: prune.l1_unstructured(LlamaRMSNorm(WIDTH), "weight", 0.5),
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
}


def made(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    module = make()
    generator = torch.Generator().manual_seed(3)
    for param in module.parameters():
        param.data.normal_(1.0, 0.5, generator=generator)
    return module.to(dtype)


def rows_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def stacked(module: nn.Module, points: list[Point], x: Tensor) -> tuple[Tensor, ...]:
    """The output at each point, from one forward of a stack."""
    modules = perturbed_forward(module, observe=False)
    stack = StackRunner(modules)
    with modules.observing():
        module(x)
    with stack.recording(points[0], len(x)):
        module(x)
    rows = [range(len(x)) if p.rows is None else p.rows for p in points]
    with stack.at(points, rows):
        output = module(torch.cat([x[list(r)] for r in rows]))
    modules.remove()
    return output.split([len(r) for r in rows])


def called(module: nn.Module, monkeypatch) -> list[tuple]:
    """The shapes of the inputs that a row norm is called with."""
    calls: list[tuple] = []

    def counted(model: nn.Module) -> dict:
        def wrapped(compute: Callable) -> Callable:
            def run(m: nn.Module, x: Tensor) -> Tensor:
                calls.append(tuple(x.shape))
                return compute(m, x)

            return run

        return {m: wrapped(compute) for m, compute in find_row_norms(model).items()}

    monkeypatch.setattr("zods.forward.perturbed_modules.find_row_norms", counted)
    return calls


def drifted(weight: Tensor) -> Callable:
    """A center with a scale and a term of its own."""
    center = Center(weight, 0.9, (77,), (0.3,))
    return lambda parameter, stored: center


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROW_NORMS)
def test_a_norm_runs_once_with_the_outputs_of_its_forwards_at_the_points(name, dtype, monkeypatch):
    """Tolerance: a few roundings, since a fused norm rounds once where the function rounds after
    the division and after the product.
    """
    module = made(ROW_NORMS[name], dtype)
    calls = called(module, monkeypatch)
    for param in list(module.parameters())[1:]:
        param.requires_grad = False  # a bias; its value is the same for all rows
    elsewhere = drifted(module.weight.data.clone())
    points = [
        *pair(5, 0.2, rows=(0, 1)),
        Point(6, 0.1, rows=(2,)),
        *pair(7, 0.2),
        *pair(8, 0.1, center=elsewhere),
    ]
    tolerance = 4 * torch.finfo(dtype).eps
    for shape in [(3, WIDTH), (3, 5, WIDTH), (3, 5, 2, WIDTH)]:
        x = rows_of(shape, dtype)
        calls.clear()
        found = stacked(module, points, x)
        assert calls == [(2 + 2 + 1 + 4 * 3, *shape[1:])]
        modules = perturbed_forward(module, observe=False)
        for point, output in zip(points, found, strict=True):
            of_point = x if point.rows is None else x[list(point.rows)]
            expected = output_at(modules, module, of_point, point)
            torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
        modules.remove()


def test_a_bias_is_perturbed_too():
    module = made(ROW_NORMS["layer norm"])
    found = stacked(module, pair(5, 0.2), rows_of((3, WIDTH)))
    modules = perturbed_forward(module, observe=False)
    for point, output in zip(pair(5, 0.2), found, strict=True):
        expected = output_at(modules, module, rows_of((3, WIDTH)), point)
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", ROW_NORMS)
def test_a_row_has_the_same_bits_in_any_stack(name):
    module, x = made(ROW_NORMS[name]), rows_of((4, 5, WIDTH))
    whole = stacked(module, [*pair(5, 0.2), *pair(6, 0.2)], x)
    alone = stacked(module, pair(6, 0.2), x)
    assert torch.equal(torch.cat(whole[2:]), torch.cat(alone))


@pytest.mark.parametrize("name", OTHERS)
def test_a_module_that_computes_something_else_is_left_alone(name):
    module = nn.Sequential(LlamaRMSNorm(WIDTH), OTHERS[name]())
    buffers = copy.deepcopy(dict(module.named_buffers()))
    assert list(find_row_norms(module)) == [module[0]]
    for key, buffer in module.named_buffers():
        assert torch.equal(buffer, buffers[key])


def test_several_rows_of_an_example_have_the_weights_of_its_stream():
    """As in a model that flattens the tokens of all rows."""
    module, x = made(ROW_NORMS["layer norm"]), rows_of((4, WIDTH))
    points = [*pair(5, 0.2), *pair(6, 0.2)]
    modules = perturbed_forward(module, observe=False)
    stack = StackRunner(modules)
    with torch.no_grad(), modules.observing():
        module(x)
    with torch.no_grad(), stack.recording(points[0], 2):
        module(x)
    with torch.no_grad(), stack.at(points, [range(2)] * 4):
        found = module(x.repeat(4, 1)).chunk(4)
    for point, output in zip(points, found, strict=True):
        torch.testing.assert_close(output, output_at(modules, module, x, point))


def test_a_frozen_weight_is_the_same_for_all_rows_and_centers_may_alternate():
    module, x = made(ROW_NORMS["layer norm"]), rows_of((3, WIDTH))
    module.weight.requires_grad = False
    elsewhere = drifted(module.bias.data.clone())
    points = [*pair(5, 0.2), *pair(6, 0.2, center=elsewhere), *pair(7, 0.2)]
    found = stacked(module, points, x)
    modules = perturbed_forward(module, observe=False)
    for point, output in zip(points, found, strict=True):
        torch.testing.assert_close(output, output_at(modules, module, x, point))


def test_a_norm_of_one_weight_for_all_features_runs_once_for_each_stream():
    module, x = made(lambda: OneWeightNorm(WIDTH)), rows_of((3, WIDTH))
    found = stacked(module, pair(5, 0.2), x)
    modules = perturbed_forward(module, observe=False)
    for point, output in zip(pair(5, 0.2), found, strict=True):
        assert torch.equal(output, output_at(modules, module, x, point))


@pytest.mark.parametrize("case", ["hook", "autocast", "another dtype", "derivatives"])
def test_other_calls_run_the_module_once_for_each_stream(case, monkeypatch):
    module, x = made(ROW_NORMS["LlamaRMSNorm"]), rows_of((3, WIDTH))
    calls = called(module, monkeypatch)
    if case == "hook":
        module.register_forward_hook(lambda m, args, output: 2 * output)
    if case == "another dtype":
        x = x.bfloat16()
    level = torch.autograd.forward_ad.dual_level() if case == "derivatives" else nullcontext()
    with torch.autocast("cpu", enabled=case == "autocast"), level:
        found = stacked(module, pair(5, 0.2), x)
        modules = perturbed_forward(module, observe=False)
        with torch.no_grad(), modules.observing():
            module(x)
        for point, output in zip(pair(5, 0.2), found, strict=True):
            assert torch.equal(output, output_at(modules, module, x, point))
    assert not calls


def test_finding_row_norms_does_not_touch_the_random_state_or_the_module():
    module = made(ROW_NORMS["LlamaRMSNorm"])
    state, weights = torch.get_rng_state(), module.weight.clone()
    assert isinstance(perturbed_forward(module), PerturbedModules)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module.weight, weights)
