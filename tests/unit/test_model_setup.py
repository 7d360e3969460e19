"""Models and parameters as users pass them.

Models may be compiled, and parameters may come in groups or in unusual memory layouts.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from zods.training.model_setup import lay_out_parameters, parameters_to_train, without_compile


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 3)])
        self.named = nn.ModuleDict({"norm": nn.LayerNorm(3)})

    def forward(self, x: Any) -> Any:
        return self.named["norm"](self.layers[1](self.layers[0](x)))


def compiled_forward(net: Net) -> Net:
    net.layers[0].forward = torch.compile(net.layers[0].forward)
    return net


class CompiledInItsClass(Net):
    forward = torch.compile(Net.forward)


def compiled_inside(net: Net) -> Net:
    net.layers[0] = torch.compile(net.layers[0])
    net.named["norm"] = torch.compile(net.named["norm"])
    net.layers[1].compile()
    return net


WAYS = {
    "around": torch.compile,
    "in place": lambda net: (net.compile(), net)[1],
    "inside": compiled_inside,
    "a forward": compiled_forward,
    "in its class": lambda net: CompiledInItsClass(),
}


@pytest.mark.parametrize("way", WAYS)
def test_torch_compile_is_removed_wherever_it_was_applied(
    way: str, caplog: pytest.LogCaptureFixture
):
    names = [name for name, _ in Net().named_parameters()]
    with caplog.at_level(logging.INFO, "zods"):
        model = without_compile(WAYS[way](Net()))
    assert isinstance(model, Net)
    assert [name for name, _ in model.named_parameters()] == names
    assert len(caplog.records) == 1
    for module in model.modules():
        assert module._compiled_call_impl is None
        assert not hasattr(module.forward, "_torchdynamo_orig_callable")
    assert model(torch.ones(2, 3)).shape == (2, 3)
    caplog.clear()
    assert without_compile(model) is model
    assert not caplog.records


def test_a_model_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match=r"model: found function, expected a torch\.nn\.Module"):
        without_compile(lambda x: x)


# --- model_parameters -----------------------------------------------------------------------------


def chosen(net: nn.Module, given: Any, **zods: float) -> list[str]:
    wanted = parameters_to_train(net, given, **{"lr": 1e-3, "weight_decay": 0.0, **zods})
    assert wanted is not None
    ids = {id(p) for p in wanted}
    return [name for name, p in net.named_parameters() if id(p) in ids]


def test_parameters_pairs_and_groups_choose_what_is_trained_alone_or_mixed():
    net = Net()
    first, second = net.layers
    both = ["layers.0.weight", "layers.1.bias"]
    for given in (
        [first.weight, second.bias],
        iter([("a", first.weight), ("b", second.bias)]),
        [{"params": [first.weight, second.bias]}],
        [{"params": first.weight}, {"params": iter([second.bias])}],
        [{"params": [("a", first.weight)], "lr": 1e-3}, second.bias],
        [{"params": []}, {"params": [first.weight, second.bias], "weight_decay": 0.0}],
    ):
        assert chosen(net, given) == both
    assert parameters_to_train(net, None, lr=0.1, weight_decay=0.0) is None
    assert len(chosen(net, net.parameters())) == 6


def test_the_usual_two_groups_are_accepted_where_zods_has_their_weight_decay():
    net = Net()
    matrices, vectors = (
        [p for p in net.parameters() if (p.ndim > 1) is is_matrix] for is_matrix in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    assert len(chosen(net, groups, weight_decay=0.1)) == 6
    with pytest.raises(
        ValueError, match=r"different weight_decay \(0.1, 0.0\).*zeroth_order.weight_decay \(0.05\)"
    ):
        chosen(net, groups, weight_decay=0.05)


def test_options_that_differ_between_groups_are_refused_by_name():
    net = Net()
    first, second = net.layers
    for key, values in (("lr", (1e-3, 1e-2)), ("betas", ((0.9, 0.99), (0.8, 0.99)))):
        groups = [
            {"params": p, key: value}
            for p, value in zip((first.weight, second.weight), values, strict=True)
        ]
        with pytest.raises(ValueError, match=f"groups with different {key}"):
            chosen(net, groups)
    with pytest.raises(ValueError, match="groups with different lr"):
        chosen(net, [{"params": first.weight, "lr": 1.0}, second.weight])


def test_options_that_all_groups_share_are_ignored_with_a_warning_where_zods_has_another(
    caplog: pytest.LogCaptureFixture,
):
    net = Net()
    with caplog.at_level(logging.WARNING, "zods"):
        assert chosen(net, [{"params": net.parameters(), "weight_decay": 0.1, "eps": 1e-8}])
    assert [record.getMessage() for record in caplog.records] == [
        "model_parameters: the groups' weight_decay 0.1 is not used; zeroth_order.weight_decay is "
        "0.0"
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            lambda net: [{"params": list(Net().parameters())}],
            r"model_parameters\[0\]: a tensor of shape \(4, 3\) is not a",
        ),
        (
            lambda net: [*net.parameters(), nn.Parameter(torch.ones(7))],
            r"model_parameters\[6\]: a tensor of shape \(7,\)",
        ),
        (
            lambda net: [{"parameters": []}],
            r"model_parameters\[0\]: a group without 'params'; its keys are parameters",
        ),
        (lambda net: ["layers.0.weight"], r"model_parameters\[0\]: found str"),
        (lambda net: net.layers[0].weight, "found one tensor"),
        (lambda net: [], "empty"),
        (lambda net: [{"params": []}], "empty"),
    ],
)
def test_parameters_that_do_not_belong_to_the_model_are_refused(given: Any, message: str):
    net = Net()
    with pytest.raises(ValueError, match=message):
        chosen(net, given(net))


# --- memory ---------------------------------------------------------------------------------------


class ModelOf(nn.Module):
    def __init__(self, **params: torch.Tensor) -> None:
        super().__init__()
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value))


def test_parameters_become_contiguous_and_keep_their_values():
    big = torch.randn(4, 6)
    values = {
        "transposed": torch.randn(3, 2).t(),
        "expanded": torch.randn(1, 3).expand(2, 3),
        "scalar": torch.tensor(1.5),
        "left": big[:, :2],
        "right": big[:, 2:],
        "empty": torch.empty(0, 3),
    }
    model = ModelOf(**values)
    lay_out_parameters(model)
    for name, param in model.named_parameters():
        assert param.is_contiguous()
        assert torch.equal(param, values[name])
    model.left.data.zero_()
    assert torch.equal(model.right, big[:, 2:])


@pytest.mark.parametrize(
    "other",
    [
        lambda w: w.t(),
        lambda w: w[1:3],
        lambda w: w[:, 1],
        lambda w: w.view(torch.int32).view(torch.float32),
    ],
)
def test_two_parameters_that_share_memory_are_refused_by_name(other: Any):
    weight = torch.randn(4, 4)
    with pytest.raises(
        ValueError, match=r"the parameters (first and second|second and first) share memory"
    ):
        lay_out_parameters(ModelOf(first=weight, second=other(weight)))
    frozen = ModelOf(first=weight, second=other(weight)).requires_grad_(False)
    lay_out_parameters(frozen)


def test_a_tied_parameter_is_accepted():
    net = Net()
    net.layers[1].weight = net.layers[0].weight
    lay_out_parameters(net)
    assert net.layers[1].weight is net.layers[0].weight
