"""Find the matrix of a model whose gradients the selector compares.

Callers: `zods.selection.features`, and `zods.training.initialize` for a check before anything is
spent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

# Names of the value projection in models. The last names are of layers that also make queries and
# keys.
VALUE_PROJECTIONS = (
    "v_proj",
    "value",
    "v_lin",
    "qkv_proj",
    "query_key_value",
    "Wqkv",
    "c_attn",
)


@dataclass(frozen=True)
class Target:
    """The matrix whose gradients are compared.

    name, ordinal: the parameter's name and index in `named_parameters()`. module: the linear layer
    that owns it. shape: shape of the whole parameter. input_first: the matrix is (inputs, outputs),
    as in transformers' Conv1D. blocks: the model's blocks, in order; empty where the matrix is in
    no block. block: index of the block that holds the matrix.
    """

    name: str
    module: nn.Module
    ordinal: int
    shape: tuple[int, ...]
    input_first: bool
    blocks: tuple[nn.Module, ...]
    block: int


def find_target(model: nn.Module, pattern: str | None = None) -> Target:
    """Find the last matrix of a linear layer whose parameter's name matches `pattern`.

    pattern: a regular expression, found anywhere in the name. None: the value projection of the
    last block. Where a LoRA adapter is trained on it, the adapter's second matrix is taken, because
    the gradient of the first matrix is 0 at the start.

    Raises ValueError where no matrix matches. The message names some matrices of the model.
    """
    modules = dict(model.named_modules())
    found: dict[str, Target] = {}
    for ordinal, (name, parameter) in enumerate(model.named_parameters()):
        owner = modules[name.rpartition(".")[0]]
        input_first = type(owner).__name__ == "Conv1D"
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if len(shape) == 2 and (input_first or isinstance(owner, nn.Linear)):
            found[name] = Target(name, owner, ordinal, shape, input_first, *_blocks(model, name))
    if pattern is not None:
        try:
            matching = [target for name, target in found.items() if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(
                f"selector.pattern: {pattern!r} is not a regular expression: {error}"
            ) from None
    else:
        in_blocks = {name: target for name, target in found.items() if target.blocks}
        matching = next(
            filter(None, (_value_projections(in_blocks, kind) for kind in VALUE_PROJECTIONS)), []
        )
    if not matching:
        what = (
            "no value projection is known"
            if pattern is None
            else f"no linear layer's parameter matches {pattern!r}"
        )
        raise ValueError(
            f"selector.pattern: {what}. Give a regular expression that is found in one of: "
            f"{', '.join(list(found)[-8:])}."
        )
    return matching[-1]


def _value_projections(targets: dict[str, Target], kind: str) -> list[Target]:
    """The value projections of this name, or the adapter of the last one if it has an adapter."""
    named = re.compile(rf"\.{kind}\.(base_layer\.)?weight$")
    plain = [target for name, target in targets.items() if named.search(name)]
    if not plain:
        return []
    layer = re.sub(r"(base_layer\.)?weight$", "", plain[-1].name)
    adapters = [t for name, t in targets.items() if name.startswith(f"{layer}lora_B.")]
    return [
        target for target in adapters if next(target.module.parameters()).requires_grad
    ] or plain


def _blocks(model: nn.Module, name: str) -> tuple[tuple[nn.Module, ...], int]:
    """The outermost list of modules around a parameter, and the index of the parameter's module."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        around = model.get_submodule(".".join(parts[:depth]))
        if isinstance(around, nn.ModuleList):
            return tuple(around), int(parts[depth])
    return (), 0
