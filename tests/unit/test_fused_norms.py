"""Fused norms: which modules are taken, what is left alone, and that apex is found where it is."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from tests.unit.perturbed import output_at
from zods.core.directions import Direction
from zods.core.points import Point
from zods.forward import fused_norms
from zods.forward.fused_norms import find_fused_norms, import_apex
from zods.forward.perturbed_modules import PerturbedModules
from zods.params.shards import ShardedParameters

CPU = torch.device("cpu")
WIDTH = 8
KINDS = [
    *(LlamaRMSNorm, MistralRMSNorm, Olmo2RMSNorm, Phi3RMSNorm, Qwen3RMSNorm),
    T5LayerNorm,
]


class EpsOutsideRMSNorm(LlamaRMSNorm):
    """The root of the mean square has eps added, not the mean square."""

    def forward(self, x: Tensor) -> Tensor:
        root = x.float().pow(2).mean(-1, keepdim=True).sqrt()
        return self.weight * (x / (root + self.variance_epsilon)).to(x.dtype)


class CenteredRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class WideRMSNorm(LlamaRMSNorm):
    """Its output is float32, whatever its input is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


def own_forward() -> nn.Module:
    module = LlamaRMSNorm(WIDTH)
    module.forward = lambda x: 2 * x
    return module


def pruned() -> nn.Module:
    return prune.l1_unstructured(LlamaRMSNorm(WIDTH), "weight", 0.5)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    **{
        kind.__name__: lambda kind=kind: kind(WIDTH)  # type: ignore[misc]
        for kind in (Gemma3RMSNorm, EpsOutsideRMSNorm, CenteredRMSNorm, WideRMSNorm, GatedRMSNorm)
    },
    "torch's RMSNorm": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
    "torch's LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "forward replaced": own_forward,
    "pruned": pruned,
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
}


def with_random_weights(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for param in module.parameters():
        param.data.normal_(1.0, 0.5, generator=generator)
    return module.to(dtype)


def fused_modules(module: nn.Module, asked: object = True) -> PerturbedModules:
    found = find_fused_norms(module, asked, CPU)  # type: ignore[arg-type]
    shards = ShardedParameters(module, rank=0).shards
    return PerturbedModules(module, shards, Direction("gaussian"), fused=found.functions)


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """The shapes that torch's rms_norm is called with."""
    made: list[tuple] = []
    rms_norm = torch.nn.functional.rms_norm

    def counted(x: Tensor, *args: object) -> Tensor:
        made.append(tuple(x.shape))
        return rms_norm(x, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(fused_norms.functional, "rms_norm", counted)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_norm_has_the_outputs_of_its_module_at_a_point_and_at_the_parameters(
    kind, dtype, calls
):
    module = with_random_weights(kind(WIDTH), dtype)
    plain = copy.deepcopy(module)
    modules = fused_modules(module)
    unfused = fused_modules(plain, asked=False)
    calls.clear()
    x = torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    for point in (None, Point(5, 0.1), Point(5, -0.1)):
        found, expected = output_at(modules, module, x, point), output_at(unfused, plain, x, point)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert calls == [tuple(x.shape)] * 3


@pytest.mark.parametrize("name", OTHERS)
def test_a_module_that_computes_something_else_is_left_alone(name):
    module = nn.Sequential(LlamaRMSNorm(WIDTH), OTHERS[name]())
    found = find_fused_norms(module, True, CPU)
    assert list(found.functions) == [module[0]]


def test_true_is_refused_where_no_module_can_be_fused():
    with pytest.raises(ValueError, match=r"zeroth_order.fused_norm: true, but no module"):
        find_fused_norms(nn.LayerNorm(WIDTH), True, CPU)


def test_a_cpu_is_left_alone_unless_fused_norms_are_asked_for():
    module = LlamaRMSNorm(WIDTH)
    assert not find_fused_norms(module, "auto", CPU).functions
    assert not find_fused_norms(module, False, CPU).functions
    assert find_fused_norms(module, False, CPU).code == {"fused_norm": "none"}
    assert find_fused_norms(module, True, CPU).code == {"fused_norm": "torch, 1"}


@pytest.mark.parametrize("case", ["gradients", "autocast", "another dtype"])
def test_a_call_that_was_not_compared_runs_the_own_forward(case, calls):
    module = with_random_weights(LlamaRMSNorm(WIDTH))
    plain = copy.deepcopy(module)
    fused_modules(module)
    calls.clear()
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    if case == "another dtype":
        x = x.bfloat16()
    with (
        torch.set_grad_enabled(case == "gradients"),
        torch.autocast("cpu", enabled=case == "autocast"),
    ):
        assert torch.equal(module(x), plain(x))
    assert not calls


def test_close_gives_a_module_its_own_forward_back(calls):
    module = LlamaRMSNorm(WIDTH)
    modules = fused_modules(module)
    wrapped = module.forward
    modules.remove()
    calls.clear()
    assert "forward" not in vars(module)
    with torch.no_grad():
        module(torch.ones(2, WIDTH))
        wrapped(torch.ones(2, WIDTH))
    assert not calls


def test_a_copy_of_a_fused_module_computes_with_its_own_parameters(calls):
    module = LlamaRMSNorm(WIDTH)
    fused_modules(module)
    copied = copy.deepcopy(module)
    calls.clear()
    copied.weight.data.zero_()
    with torch.no_grad():
        assert not copied(torch.ones(2, WIDTH)).any()
    assert not calls


def test_finding_fused_norms_does_not_touch_the_random_state_or_the_module():
    module = with_random_weights(LlamaRMSNorm(WIDTH))
    state, weights = torch.get_rng_state(), module.weight.clone()
    find_fused_norms(module, True, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module.weight, weights)


# --- apex ---

APEX = """
from torch.nn import functional

def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    return functional.layer_norm(input, normalized_shape, weight, bias, eps)

def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    return functional.rms_norm(input, normalized_shape, weight, eps)
"""


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Iterator[Callable[..., None]]:
    """Makes packages importable: packages(name=source, ...)."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(**sources: str) -> None:
        for name, source in sources.items():
            file = Path(tmp_path, *name.split("__")).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)

    yield make
    for name in [*sys.modules]:
        if name == "fused_layer_norm_cuda" or name.partition(".")[0] == "apex":
            del sys.modules[name]


def test_apex_is_found_only_with_its_cuda_extension(packages, caplog):
    assert import_apex() is None
    packages(apex__normalization__fused_layer_norm=APEX)
    assert import_apex() is None
    packages(fused_layer_norm_cuda="raise ImportError('undefined symbol')")
    assert import_apex() is None
    assert "undefined symbol" in caplog.text


def test_a_package_of_the_same_name_is_not_taken_for_apex(packages):
    packages(apex____init__="", fused_layer_norm_cuda="")
    assert import_apex() is None


def test_apex_computes_layer_norms_and_rms_norms_in_a_model(packages, monkeypatch):
    packages(apex__normalization__fused_layer_norm=APEX, fused_layer_norm_cuda="")
    apex = import_apex()
    assert apex is not None
    opt = hf.OPTModel(hf.OPTConfig(hidden_size=8, ffn_dim=8, num_hidden_layers=1,
        num_attention_heads=1, vocab_size=16, word_embed_proj_dim=8))  # fmt: skip
    model = nn.ModuleList(
        [opt, LlamaRMSNorm(WIDTH), nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH)]
    )
    functions = {m: fused_norms._function_for(m, apex) for m in model.modules()}
    taken = [m for m, function in functions.items() if function is not None]
    layer_norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert taken == [*layer_norms, model[1], model[2]]  # torch's RMSNorm without eps is left alone
    assert len(layer_norms) == 3
    for module in taken:
        assert fused_norms.is_same(module, functions[module], CPU)
