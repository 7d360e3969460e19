"""Wrapped forwards: copies and pickles are free of them, hooks run inside them, and they come off
again.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.unit.perturbed import EPS, output_at, perturbed_forward
from zods.core.directions import Direction
from zods.core.points import Point
from zods.forward.module_runners import StackRunner
from zods.params.shards import ShardedParameters


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def at_changed_weights(module: nn.Module, point: Point, x: Tensor = X) -> Tensor:
    """The output of the module when its parameters are changed in place."""
    for shard in ShardedParameters(module, rank=0):
        data = shard.param.data
        Direction().combine_(
            data, shard, weight=data, seeds=[point.seed], coefficients=[point.coefficient]
        )
    with torch.no_grad():
        return module(x)


def pickled(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_wrapped_module_computes_with_its_own_weights(copied):
    module = net()
    perturbed_forward(module)
    other = copied(module)
    with torch.no_grad():
        for param in module.parameters():
            param.fill_(7.0)
        assert torch.equal(other(X), net()(X))
        assert not torch.equal(module(X), net()(X))


def test_a_module_has_its_own_forward_and_hooks_back_when_the_wrappers_are_removed():
    module, calls = net(), []
    handle = module.first.register_forward_hook(lambda *_: calls.append("hook"))
    forward_at = perturbed_forward(module)
    forward_at.remove()
    assert all("forward" not in vars(m) for m in module.modules())
    assert not any(m._forward_pre_hooks for m in module.modules())
    calls.clear()
    assert torch.equal(module(X), net()(X))
    assert calls == ["hook"]
    handle.remove()
    assert not module.first._forward_hooks


def test_a_forward_that_was_replaced_before_is_put_back():
    module = net()
    original = module.first.forward
    module.first.forward = lambda x: 2 * original(x)
    forward_at = perturbed_forward(module)
    doubled = output_at(forward_at, module, X, Point(1, EPS))
    forward_at.remove()
    again = net()
    plain = again.first.forward
    again.first.forward = lambda x: 2 * plain(x)
    assert torch.equal(module(X), again(X))
    assert torch.equal(doubled, at_changed_weights(again, Point(1, EPS)))


def test_the_handle_of_a_hook_removes_it_while_it_runs_inside_the_wrapped_forward():
    module, calls = net(), []
    handle = module.second.register_forward_pre_hook(lambda *_: calls.append("hook"))
    forward_at = perturbed_forward(module)
    calls.clear()
    output_at(forward_at, module, X, Point(1, EPS))
    assert calls == ["hook"]
    handle.remove()
    output_at(forward_at, module, X, Point(1, EPS))
    assert calls == ["hook"]


def with_hooks(kind: str) -> nn.Module:
    """Hooks of every signature that torch knows, each using a parameter of its module."""
    module = net()
    linear = module.first
    linear.extra = nn.Parameter(torch.full((8,), 0.5))
    if kind == "before":
        linear.register_forward_pre_hook(lambda m, args: args[0] * m.extra)
    elif kind == "before, a tuple":
        linear.register_forward_pre_hook(lambda m, args: (args[0] + m.extra,))
    elif kind == "before, with keywords":
        linear.register_forward_pre_hook(
            lambda m, args, kw: ((args[0] - m.extra,), kw), with_kwargs=True
        )
    elif kind == "after":
        linear.register_forward_hook(lambda m, args, output: output * m.extra)
    elif kind == "after, with keywords":
        linear.register_forward_hook(
            lambda m, args, kw, output: output + args[0] * m.extra, with_kwargs=True
        )
    elif kind == "another module's parameter":
        module.register_forward_hook(lambda m, args, output: output + m.first.extra)
    elif kind == "pruned":
        prune.random_unstructured(linear, "weight", amount=0.3)
    return module


KINDS = ["before", "before, a tuple", "before, with keywords", "after", "after, with keywords"]
KINDS += ["another module's parameter", "pruned"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_sees_the_parameters_of_its_module_at_the_point(kind):
    torch.manual_seed(0)
    expected = at_changed_weights(with_hooks(kind), Point(3, 0.1))
    torch.manual_seed(0)
    module = with_hooks(kind)
    found = output_at(perturbed_forward(module), module, X, Point(3, 0.1))
    assert torch.equal(found, expected)
    assert not torch.allclose(found, with_hooks(kind)(X))


class Energy(nn.Module):
    """Returns the derivative of an energy by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.second(torch.tanh(self.first(x))).sum()
            return torch.autograd.grad(energy, x)[0]


@pytest.mark.parametrize("distribution", ["gaussian", "low_rank"])
@torch.no_grad()
def test_a_gradient_taken_inside_a_forward_is_that_of_the_point(distribution):
    """In one forward and in a stack.

    The copies lie in memory that the next module's copies overwrite.
    """
    torch.manual_seed(0)
    module = Energy()
    points = [Point(5, 0.1), Point(5, -0.1)]
    expected = []
    for point in points:
        changed = copy.deepcopy(module)
        for shard in ShardedParameters(changed, rank=0):
            data = shard.param.data
            direction = Direction(distribution)
            direction.combine_(
                data, shard, weight=data, seeds=[point.seed], coefficients=[point.coefficient]
            )
        expected.append(changed(X))
    forward_at = perturbed_forward(module, distribution, observe=False)
    with forward_at.observing():
        module(X)
    for point, right in zip(points, expected, strict=True):
        torch.testing.assert_close(output_at(forward_at, module, X, point), right)
    stack = StackRunner(forward_at)
    with stack.recording(points[0], len(X)):
        module(X)
    with stack.at(points, [range(len(X))] * len(points)):
        stacked = module(X.repeat(2, 1))
    torch.testing.assert_close(stacked, torch.cat(expected))


class ReadsData(Net):
    """Reads a child's weight by its attribute `data`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.first.weight.data


def test_a_parameter_that_is_read_by_its_data_is_perturbed_there_too():
    torch.manual_seed(0)
    module = ReadsData()
    expected = at_changed_weights(copy.deepcopy(module), Point(3, 0.1))
    assert torch.equal(output_at(perturbed_forward(module), module, X, Point(3, 0.1)), expected)
