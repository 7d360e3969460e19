"""A module at a perturbed point has the output of its copy with perturbed parameters.

Afterwards the module is unchanged.
"""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from tests.helpers import bits
from tests.unit.perturbed import EPS, example, output_at, perturbed_forward
from zods import kernels
from zods.core.points import Center, Point
from zods.forward.perturbed_modules import PerturbedModules
from zods.kernels import combine_

DTYPES = [torch.float32, torch.bfloat16]


# --- modules ---


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Tied(nn.Module):
    """An embedding whose weight is the head's too, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = Block(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x.long().abs().sum(-1) % 11)))


class TiedOverLevels(nn.Module):
    """The root and its child own the same parameter; the child runs while the root does, and the
    root uses it after.
    """

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(8, 8)
        self.weight = self.child.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.child(self.child(x) @ self.weight) @ self.weight.t()


class Reader(nn.Module):
    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return torch.tanh(x @ table)


class RootOwns(nn.Module):
    """The root's parameter is used inside two children that own none."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8))
        self.first, self.second = Reader(), Reader()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x, self.table), self.table)


class NestedOwners(nn.Module):
    """Owners inside owners inside an owner."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))
        self.inner = NestedOwners(depth - 1) if depth else nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale) + self.scale


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(torch.sin(self.block(x)))


class NonLeafUse(nn.Module):
    """Views, slices and products of a parameter, not the parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight[:8] * 2).t() + (x @ self.weight.view(8, 16)).chunk(2, -1)[1]


class Recursive(nn.Module):
    """A module that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        return self.bias + (self(self.linear(x), depth - 1) if depth else x)


class ListOfParameters(nn.Module):
    """The ParameterList and the ParameterDict own the parameters, and their forwards never run."""

    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])
        self.dict = nn.ParameterDict({"bias": nn.Parameter(torch.randn(8))})

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.list[0] @ self.list[1] + self.dict["bias"]


class Attention(nn.Module):
    """torch's MultiheadAttention reads the weight of `out_proj`, whose forward never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class ReadByTheParentToo(nn.Module):
    """A model that runs a child and also reads its weight outside its forward: a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) @ self.child.weight.t()


def mlp(depth: int = 2) -> nn.Sequential:
    return nn.Sequential(*(Block(8) for _ in range(depth)))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


MODULES = {
    "mlp": mlp,
    "tied": Tied,
    "tied over levels": TiedOverLevels,
    "root owns": RootOwns,
    "nested owners": NestedOwners,
    "called twice": CalledTwice,
    "non-leaf use": NonLeafUse,
    "recursive": Recursive,
    "convolution": lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.GroupNorm(2, 4)),
    "weight norm": lambda: nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8)),
    "recurrent": Recurrent,
    "attention": Attention,
    "encoder layer": encoder,
    "list of parameters": ListOfParameters,
    "read by the parent too": ReadByTheParentToo,
}


def made(make, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A module in eval mode whose every parameter is random (norms and biases are ones and zeros by
    default).
    """
    torch.manual_seed(0)
    module = make().eval()
    for param in module.parameters():
        nn.init.normal_(param, std=0.5)
    return module.to(dtype)


@torch.no_grad()
def expected(
    module: nn.Module, x: Tensor, seed: int, coefficient: float, distribution: str = "gaussian"
) -> Tensor:
    """The module's output with copies of its parameters at the point, tied ones once, frozen ones
    as they are.
    """
    at = {}
    for ordinal, (name, param) in enumerate(module.named_parameters()):
        at[name] = param.detach().clone()
        if param.requires_grad:
            combine_(at[name], weight=param.detach(), seeds=[seed], coefficients=[coefficient],
                     distribution=distribution, parameter=ordinal, offset=0)  # fmt: skip
    return torch.func.functional_call(module, at, (x,))


def before_forward(module: nn.Module, look) -> None:
    """Call `look` at the start of the module's own forward, where its copies are in place."""
    original = module.forward

    def forward(*args, **kwargs):
        look()
        return original(*args, **kwargs)

    module.forward = forward


def stored(module: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """The address and the bits of each parameter."""
    return {
        name: (param.data_ptr(), bits(param))
        for name, param in module.named_parameters(remove_duplicate=False)
    }


def assert_as_stored(module: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    for name, (pointer, value) in stored(module).items():
        assert pointer == before[name][0], f"{name} is stored elsewhere"
        assert torch.equal(value, before[name][1]), f"{name} has changed"


# --- the output is that of the perturbed parameters ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_a_forward_at_a_point_equals_the_perturbed_copy_to_the_bit(name, dtype):
    module, x = made(MODULES[name], dtype), example(dtype)
    forward_at = perturbed_forward(module)
    before = stored(module)
    for seed, coefficient in ((1, EPS), (1, -EPS), (2**64 - 1, 3 * EPS)):
        got = output_at(forward_at, module, x, Point(seed, coefficient))
        assert torch.equal(bits(got), bits(expected(module, x, seed, coefficient)))
        assert not torch.equal(got, module(x))  # the point is another one
    assert_as_stored(module, before)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "weight norm"])
def test_every_parameter_is_perturbed(name):
    """With all others frozen, each parameter alone moves the output, as in its perturbed copy."""
    for index in range(len(list(made(MODULES[name]).parameters()))):
        module, x = made(MODULES[name]), example()
        for other, param in enumerate(module.parameters()):
            param.requires_grad_(other == index)
        got = output_at(perturbed_forward(module), module, x, Point(3, EPS))
        assert torch.equal(bits(got), bits(expected(module, x, 3, EPS)))


def test_rademacher_directions_are_used_where_asked():
    module, x = made(mlp), example()
    got = output_at(perturbed_forward(module, "rademacher"), module, x, Point(5, EPS))
    assert torch.equal(got, expected(module, x, 5, EPS, "rademacher"))


def test_no_point_means_the_parameters_as_they_are():
    module, x = made(mlp), example()
    plain = module(x)
    forward_at = perturbed_forward(module)
    assert torch.equal(output_at(forward_at, module, x, None), plain)
    output_at(forward_at, module, x, Point(1, EPS))
    assert torch.equal(module(x), plain)


def test_frozen_parameters_are_not_touched():
    module, x = made(mlp), example()
    frozen = [module[0].up.weight, module[1].norm.bias]
    for param in frozen:
        param.requires_grad_(False)
    seen = []
    for child in module.modules():
        child.register_forward_pre_hook(
            lambda *_: seen.append([param.data_ptr() for param in frozen])
        )
    forward_at = perturbed_forward(module)
    got = output_at(forward_at, module, x, Point(1, EPS))
    assert all(pointers == [param.data_ptr() for param in frozen] for pointers in seen)
    assert torch.equal(got, expected(module, x, 1, EPS))


def test_a_tied_parameter_is_made_once_per_use_and_the_same_in_both_places(monkeypatch):
    module, x = made(Tied), example()
    forward_at = perturbed_forward(module)
    made_at: list[tuple[int, Tensor]] = []

    def recording(out, **kwargs):
        made_at.append((kwargs["parameter"], combine_(out, **kwargs).clone()))
        return out

    monkeypatch.setattr(kernels, "combine_", recording)
    output_at(forward_at, module, x, Point(1, EPS))
    tied = [values for parameter, values in made_at if parameter == 0]
    assert len(tied) == 2  # in the embedding, in the head
    assert torch.equal(tied[0], tied[1])


def test_a_parameter_owned_by_a_running_module_is_not_perturbed_twice(monkeypatch):
    """The root holds the copy while the child, which owns the same parameter, runs twice."""
    module, x = made(TiedOverLevels), example()
    forward_at = perturbed_forward(module)
    made_at = []
    monkeypatch.setattr(
        kernels,
        "combine_",
        lambda out, **kw: made_at.append(kw["parameter"]) or combine_(out, **kw),
    )
    output_at(forward_at, module, x, Point(1, EPS))
    assert sorted(made_at) == [0, 1, 1]  # the weight once, the child's own bias per call


def test_a_point_at_another_source_starts_there_and_not_at_the_parameters():
    """The anchor is such a source: scale * other + sum of terms + eps z."""
    module, x = made(mlp), example()
    forward_at = perturbed_forward(module)
    others = {name: torch.randn_like(param) for name, param in module.named_parameters()}

    def source(parameter, live):
        assert live.data_ptr() == parameter.param.data_ptr()
        return Center(others[parameter.name], 0.5, (11, 12), (0.1, -0.2))

    at = {
        name: combine_(torch.empty_like(other), weight=other, scale=0.5, seeds=[11, 12, 7],
                       coefficients=[0.1, -0.2, EPS], parameter=ordinal, offset=0)
        for ordinal, (name, other) in enumerate(others.items())
    }  # fmt: skip
    before = stored(module)
    got = output_at(forward_at, module, x, Point(7, EPS, source))
    with torch.no_grad():
        assert torch.equal(got, torch.func.functional_call(module, at, (x,)))
    assert_as_stored(module, before)


def test_modules_whose_forward_never_runs_are_at_the_point_once_observed():
    """Without an observed forward their parameters would silently stay where they are: this is why
    there is one.
    """
    module, x = made(Attention), example()
    unobserved = output_at(perturbed_forward(module, observe=False), module, x, Point(1, EPS))
    module = made(Attention)
    observed = output_at(perturbed_forward(module), module, x, Point(1, EPS))
    assert not torch.equal(unobserved, observed)
    assert torch.equal(observed, expected(module, x, 1, EPS))


def test_observing_runs_at_the_parameters_as_they_are():
    module, x = made(encoder), example()
    plain, before = module(x), stored(module)
    forward_at = perturbed_forward(module, observe=False)
    with forward_at.observing():
        assert torch.equal(module(x), plain)
    assert_as_stored(module, before)


def test_observing_a_forward_that_fails_leaves_the_next_one_right():
    module, x = made(Attention), example()
    forward_at = perturbed_forward(module, observe=False)
    with pytest.raises(RuntimeError, match="shape"), forward_at.observing():
        module(x[..., :5] @ torch.zeros(3, 3))
    with forward_at.observing():
        module(x)
    assert torch.equal(output_at(forward_at, module, x, Point(1, EPS)), expected(module, x, 1, EPS))


# --- what is stored stays as it is ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mlp", "tied", "nested owners", "encoder layer"])
def test_200_evaluations_leave_every_stored_bit_where_it_was(name, dtype):
    module, x = made(MODULES[name], dtype), example(dtype)
    forward_at = perturbed_forward(module)
    before = stored(module)
    for seed in range(100):
        for sign in (1, -1):
            output_at(forward_at, module, x, Point(seed, sign * 1e-3))
    assert_as_stored(module, before)


class Fragile(nn.Linear):
    fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise ArithmeticError("in a forward")
        return super().forward(x)


class Cautious(nn.Module):
    """Goes on without its inner modules where these fail, if it may."""

    def __init__(self, handles: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))
        self.linear = nn.Linear(8, 8)
        self.inner = nn.Sequential(nn.Linear(8, 8), Fragile(8, 8), nn.Linear(8, 8))
        self.handles = handles

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.inner(self.linear(x * self.scale))
        except ArithmeticError:
            if not self.handles:
                raise
        return self.linear(x) + self.scale


def refuse(*_) -> None:
    raise ArithmeticError("in a hook")


def broken(handles: bool, where: str) -> tuple[nn.Module, PerturbedModules]:
    """A Cautious module whose innermost one fails: in its forward, or in a hook before or after
    ours.
    """
    module = made(lambda: Cautious(handles))
    fragile = module.inner[1]
    if where == "hook before":
        fragile.register_forward_pre_hook(lambda *_: refuse() if fragile.fails else None)
    forward_at = perturbed_forward(module)
    if where == "hook after":
        fragile.register_forward_pre_hook(lambda *_: refuse() if fragile.fails else None)
    return module, forward_at


LOCATIONS = ["forward", "hook before", "hook after"]


@pytest.mark.parametrize("where", LOCATIONS)
def test_an_exception_in_a_forward_leaves_every_stored_bit_and_the_next_forward_right(where):
    (module, forward_at), x = broken(False, where), example()
    before = stored(module)
    module.inner[1].fails = True
    with pytest.raises(ArithmeticError):
        output_at(forward_at, module, x, Point(1, EPS))
    assert_as_stored(module, before)
    module.inner[1].fails = False
    assert torch.equal(output_at(forward_at, module, x, Point(2, EPS)), expected(module, x, 2, EPS))
    assert_as_stored(module, before)


@pytest.mark.parametrize("where", LOCATIONS)
def test_an_exception_that_a_module_handles_itself_leaves_the_rest_of_its_forward_at_the_point(
    where,
):
    (module, forward_at), x = broken(True, where), example()
    before = stored(module)
    module.inner[1].fails = True
    assert torch.equal(output_at(forward_at, module, x, Point(1, EPS)), expected(module, x, 1, EPS))
    assert_as_stored(module, before)


def test_an_exception_that_a_module_handles_itself_leaves_no_copy_behind():
    """A module that runs after the failure finds its own copies and those of its parents alone.

    The copies of the modules that failed are gone.
    """
    (module, _), x = broken(True, "forward"), example()
    home = {}
    away = []

    def look():
        if home:  # not while observed, for this reads the parameters too
            away.append(
                {
                    name
                    for name, param in module.named_parameters()
                    if param.data_ptr() != home.get(name)
                }
            )

    before_forward(module.linear, look)
    forward_at = perturbed_forward(module)
    home |= {name: param.data_ptr() for name, param in module.named_parameters()}
    module.inner[1].fails = True
    output_at(forward_at, module, x, Point(1, EPS))
    assert away == [{"scale", "linear.weight", "linear.bias"}] * 2


def test_an_interrupt_in_a_forward_leaves_every_stored_bit():
    """always_call hooks see Exceptions only; KeyboardInterrupt is left to the end of `at`."""
    module, x = made(mlp), example()

    def interrupt(*_):
        raise KeyboardInterrupt

    forward_at = perturbed_forward(module)
    before = stored(module)
    handle = module[1].up.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        output_at(forward_at, module, x, Point(1, EPS))
    handle.remove()
    assert_as_stored(module, before)
    assert torch.equal(output_at(forward_at, module, x, Point(1, EPS)), expected(module, x, 1, EPS))


# --- memory ---


def test_one_module_has_a_perturbed_copy_at_a_time(monkeypatch):
    """Measure the bytes of live copies at each new copy: at most one module's, at any depth."""
    module, x = made(lambda: mlp(depth=12)), example()
    forward_at = perturbed_forward(module)
    memory: dict[int, tuple[StorageWeakRef, int]] = {}
    filled, peak = 0, 0

    def watched(out, **kwargs):
        nonlocal filled, peak
        storage = out.untyped_storage()
        memory[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        filled += out.nbytes
        peak = max(
            peak, sum(size for reference, size in memory.values() if not reference.expired())
        )
        return combine_(out, **kwargs)

    monkeypatch.setattr(kernels, "combine_", watched)
    output_at(forward_at, module, x, Point(1, EPS))
    largest = max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in module.modules())
    assert filled == sum(p.nbytes for p in module.parameters())
    assert largest <= peak < largest + 2 * 64, "whole cache lines"


def test_while_a_module_runs_no_other_has_a_copy():
    module, x = made(mlp), example()
    home = {}
    away = []

    def look(name: str) -> None:
        if home:  # not while observed, for this reads the parameters too
            away.append(
                (name, {n for n, p in module.named_parameters() if p.data_ptr() != home.get(n)})
            )

    for name, child in module.named_modules():
        before_forward(child, functools.partial(look, name))
    forward_at = perturbed_forward(module)
    home |= {name: param.data_ptr() for name, param in module.named_parameters()}
    output_at(forward_at, module, x, Point(1, EPS))
    for name, found in away:
        own = {n for n in home if n.rpartition(".")[0] == name}
        assert found == own, f"while {name or 'the root'} runs, copies of {found}"
