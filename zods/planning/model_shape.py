"""The shape of a model: its parameters and the modules that own them, from a configuration alone.

The model is made of fake tensors (`torch._subclasses.FakeTensorMode`), which have a shape, a dtype
and a device, but no memory. Nothing is downloaded and no weights are read. Used by the other modules
of `zods.planning`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

# Shapes of Llama 2 (Touvron et al. 2023, arXiv:2307.09288; the models' config.json).
_LLAMA_2 = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
BUILT_IN: dict[str, dict[str, Any]] = {
    "7b": _LLAMA_2
    | {"hidden_size": 4096, "intermediate_size": 11_008}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    "13b": _LLAMA_2
    | {"hidden_size": 5120, "intermediate_size": 13_824}
    | {"num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40},
    "70b": _LLAMA_2
    | {"hidden_size": 8192, "intermediate_size": 28_672}
    | {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
}

Kind = Literal["embedding", "matrix", "vector"]


@dataclass(frozen=True)
class ParameterShape:
    """One parameter. A parameter that several modules share is one `ParameterShape`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def padded_numel(self, world_size: int) -> int:
        """Elements of a rank's shard under ZeRO-3, with padding: ceil(numel / world_size).

        The same on all ranks. Source: `Init._aligned_size` of DeepSpeed 0.19.8.
        """
        return -(-self.numel // world_size)

    def owned_numel(self, rank: int, world_size: int) -> int:
        """Elements of a rank's shard without padding; may be 0 on the last ranks.

        Source: `zods.params.zero3_adapter.partition_of`.
        """
        padded = self.padded_numel(world_size)
        return min(max(self.numel - rank * padded, 0), padded)


@dataclass(frozen=True, eq=False)
class ModelShape:
    """A model without weights.

    module: of fake tensors. mode: the mode in which `module` can run. parameters: in the order of
    `named_parameters()`, shared ones once. modules: the modules that own parameters, in the order of
    `modules()`, which is that of the forward in models of transformers; a shared parameter is in
    each module that owns it.
    """

    name: str
    module: torch.nn.Module
    mode: FakeTensorMode
    parameters: tuple[ParameterShape, ...]
    modules: tuple[tuple[torch.nn.Module, tuple[ParameterShape, ...]], ...]

    @property
    def config(self) -> Any:
        """The model's configuration of transformers."""
        return self.module.config

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters[0].dtype

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def bytes(self) -> int:
        return sum(p.bytes for p in self.parameters)

    def numel_by_kind(self) -> dict[str, int]:
        """Elements of embeddings, of other matrices, and of all other parameters."""
        kinds: Iterable[Kind] = ("embedding", "matrix", "vector")
        return {kind: sum(p.numel for p in self.parameters if p.kind == kind) for kind in kinds}

    @property
    def shared(self) -> tuple[ParameterShape, ...]:
        """The parameters that more than one module owns."""
        owners = Counter(p for _, of_module in self.modules for p in of_module)
        return tuple(p for p, number in owners.items() if number > 1)


def read_model_config(source: str) -> transformers.PretrainedConfig:
    """Read the configuration of a model.

    source: a name in `BUILT_IN`, a JSON file, a folder with a config.json, or a name on the hub
    (which is looked up there, unless HF_HUB_OFFLINE is set).
    Raises ValueError where there is no such configuration, or transformers does not know its type.
    """
    hint = (
        f"Give {', '.join(BUILT_IN)}, a config.json, a folder that has one, or a name on the hub."
    )
    path = Path(source)
    try:
        if source in BUILT_IN:
            return _of_dict(BUILT_IN[source])
        if path.is_file():
            return _of_dict(json.loads(path.read_text(encoding="utf-8")))
        return transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"--model {source}: {first} {hint}") from error


def _of_dict(values: Mapping[str, Any]) -> transformers.PretrainedConfig:
    if not isinstance(values, Mapping) or not isinstance(values.get("model_type"), str):
        raise ValueError('no "model_type", which names the architecture.')
    others = {key: value for key, value in values.items() if key != "model_type"}
    return transformers.AutoConfig.for_model(values["model_type"], **others)


def model_shape(name: str, config: Any, dtype: torch.dtype) -> ModelShape:
    """Make a causal language model of fake tensors from its configuration.

    name: for messages. dtype: of all parameters, as ZeRO-3 stores them. Raises ValueError where
    transformers has no causal language model for the configuration.
    """
    mode = FakeTensorMode()
    with mode:
        try:
            module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        except ValueError as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"--model {name}: not a causal language model: {first}") from error
    embeddings = {
        id(p)
        for m in module.modules()
        if isinstance(m, torch.nn.Embedding)
        for p in m.parameters(recurse=False)
    }
    by_id = {
        id(p): ParameterShape(parameter, tuple(p.shape), dtype, _kind(p, id(p) in embeddings))
        for parameter, p in module.named_parameters()
    }
    owned = (
        (m, tuple(by_id[id(p)] for p in m.parameters(recurse=False))) for m in module.modules()
    )
    return ModelShape(
        name, module, mode, tuple(by_id.values()), tuple((m, of) for m, of in owned if of)
    )


def _kind(parameter: torch.Tensor, embeds: bool) -> Kind:
    if embeds:
        return "embedding"
    return "matrix" if parameter.ndim >= 2 else "vector"
