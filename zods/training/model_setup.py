"""Prepare the arguments of `zods.initialize`: remove torch.compile from the model, lay out its
parameters for DeepSpeed, and find the parameters to train in `model_parameters`.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from zods.params.zero3_adapter import is_sharded

logger = logging.getLogger(__name__)


# --- torch.compile --------------------------------------------------------------------------------


def without_compile(model: torch.nn.Module) -> torch.nn.Module:
    """Remove torch.compile from a model and from the modules inside it. Returns the model.

    A step changes the weights of each module while it runs, which Dynamo cannot trace. The names of
    parameters lose `_orig_mod.`. Raises ValueError where `model` is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: found {type(model).__name__}, expected a torch.nn.Module.")
    found = 0
    while _original(model) is not None:
        model = _original(model)  # type: ignore[assignment]
        found += 1
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            while child is not None and (inner := _original(child)) is not None:
                module._modules[name] = child = inner
                found += 1
    for module in model.modules():
        if module._compiled_call_impl is not None:  # by module.compile()
            module._compiled_call_impl = None
            found += 1
        forward = getattr(module.forward, "_torchdynamo_orig_callable", None)
        if forward is not None:  # by torch.compile(module.forward), or on the method of the class
            module.forward = (
                forward if "forward" in vars(module) else types.MethodType(forward, module)
            )
            found += 1
    if found:
        logger.info(
            "model: torch.compile is taken off (at %d modules): a step changes weights while "
            "modules run",
            found,
        )
    return model


def _original(module: torch.nn.Module) -> torch.nn.Module | None:
    """The module inside torch's OptimizedModule; None for any other module."""
    return module._modules.get("_orig_mod")


# --- how parameters lie in memory -----------------------------------------------------------------


def lay_out_parameters(model: torch.nn.Module) -> None:
    """Make every parameter contiguous that is not sharded yet.

    DeepSpeed 0.19.8 sends parameters as bytes, which fails for other layouts. Raises ValueError
    where a parameter to train shares memory with another one, because its update would change both.
    """
    named = [
        (name, p)
        for name, p in model.named_parameters()
        if not is_sharded(p) and p.numel() and not p.is_meta
    ]
    named.sort(key=lambda entry: entry[1].data_ptr())
    for k, (name, param) in enumerate(named):
        for other_name, other in named[k + 1 :]:
            if other.data_ptr() >= param.data_ptr() + _span(param) * param.element_size():
                break
            if (param.requires_grad or other.requires_grad) and _share_elements(param, other):
                raise ValueError(
                    f"model: the parameters {name} and {other_name} share memory, but are two "
                    "parameters: a step would change what they share twice. Tie them as one "
                    "Parameter (a.weight = b.weight), or clone the data of one."
                )
    for _, param in named:
        if not param.is_contiguous():
            param.data = param.data.contiguous()


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last one in memory."""
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _share_elements(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors have elements in common.

    Their memory ranges overlap, and `second` does not start before `first`.
    """
    distance, rest = divmod(second.data_ptr() - first.data_ptr(), first.element_size())
    if first.device != second.device:
        return False
    if rest or first.dtype != second.dtype:
        return True
    taken = torch.zeros(distance + _span(second) + _span(first), dtype=torch.bool)
    kept = [
        (size, stride)
        for size, stride in zip(first.shape, first.stride(), strict=True)
        if stride and size > 1
    ]
    taken.as_strided([size for size, _ in kept], [stride for _, stride in kept]).fill_(True)
    return bool(taken.as_strided(second.shape, second.stride(), distance).any())


@contextmanager
def scalars_as_vectors(model: torch.nn.Module) -> Iterator[None]:
    """Make 0-d parameters vectors of one element inside: DeepSpeed 0.19.8 views parameters as
    bytes, which torch refuses for 0-d tensors.
    """
    scalars: list[Any] = [p for p in model.parameters() if p.dim() == 0 and not is_sharded(p)]
    for param in scalars:
        param.data = param.data.view(1)
    try:
        yield
    finally:
        for param in scalars:
            if is_sharded(param):
                param.ds_shape = torch.Size(())
            if param.numel() == 1:
                param.data = param.data.view(())


# --- parameters to train --------------------------------------------------------------------------


def parameters_to_train(
    model: torch.nn.Module,
    model_parameters: Iterable[Any] | None,
    *,
    lr: float | str,
    weight_decay: float,
) -> list[torch.nn.Parameter] | None:
    """The parameters in `model_parameters`; None for None.

    model_parameters: parameters, (name, parameter) pairs, and groups of either, mixed. Raises
    ValueError where one is not a parameter of the model, and where groups have different options:
    zods has one lr for all parameters, and one weight decay for all but vectors, which have none.
    """
    if model_parameters is None:
        return None
    if isinstance(model_parameters, torch.Tensor):
        raise ValueError("model_parameters: found one tensor; give a list of parameters.")
    names = {id(p): name for name, p in model.named_parameters()}
    wanted: list[torch.nn.Parameter] = []
    groups: list[tuple[dict[str, Any], list[torch.nn.Parameter]]] = []
    for k, item in enumerate(model_parameters):
        where, options, members = f"model_parameters[{k}]", {}, [item]
        if isinstance(item, Mapping):
            if "params" not in item:
                raise ValueError(
                    f"{where}: a group without 'params'; its keys are "
                    f"{', '.join(map(str, item)) or 'none'}."
                )
            options = {
                key: value
                for key, value in item.items()
                if key not in ("params", "param_names", "name")
            }
            members = (
                [item["params"]]
                if isinstance(item["params"], torch.Tensor)
                else list(item["params"])
            )
        params = [_parameter(member, where, names) for member in members]
        groups.append((options, params))
        wanted += params
    if not wanted:
        raise ValueError(
            "model_parameters: empty. Give the parameters to train, or leave it out to train all."
        )
    _check_options(groups, lr, weight_decay)
    return wanted


def _parameter(member: Any, where: str, names: Mapping[int, str]) -> torch.nn.Parameter:
    if isinstance(member, tuple) and len(member) == 2 and isinstance(member[0], str):
        member = member[1]
    if not isinstance(member, torch.Tensor):
        raise ValueError(
            f"{where}: found {type(member).__name__}, expected a parameter, or a group with "
            "'params'."
        )
    if id(member) not in names:
        raise ValueError(
            f"{where}: a tensor of shape {tuple(getattr(member, 'ds_shape', member.shape))} is not "
            "a parameter of the model. Take the parameters of the model that is given to "
            "zods.initialize."
        )
    return member  # type: ignore[return-value]


def _check_options(
    groups: Sequence[tuple[dict[str, Any], list[torch.nn.Parameter]]],
    lr: float | str,
    weight_decay: float,
) -> None:
    """Raise ValueError where groups have different values of an option. Warn where all groups have
    one value, but zods has another.
    """
    ours = {"lr": lr, "weight_decay": weight_decay}
    filled = [(options, params) for options, params in groups if params]
    for key in sorted({key for options, _ in filled for key in options}):
        values = [options.get(key, ours.get(key)) for options, _ in filled]
        if all(value == values[0] for value in values):
            if key in ours and values[0] != ours[key]:
                logger.warning(
                    "model_parameters: the groups' %s %s is not used; zeroth_order.%s is %s",
                    key,
                    values[0],
                    key,
                    ours[key],
                )
            continue
        if key == "weight_decay" and all(
            map(_decays_as_ours, values, [p for _, p in filled], [weight_decay] * len(values))
        ):
            continue
        remedy = {
            "weight_decay": f"all matrices have zeroth_order.weight_decay ({weight_decay}); "
            "vectors have none",
            "lr": f"all parameters have zeroth_order.lr ({lr})",
        }.get(key, "a zeroth-order step has no such option")
        raise ValueError(
            f"model_parameters: groups with different {key} ({', '.join(map(str, values))}): "
            f"{remedy}. Give groups that do not differ, or the parameters alone."
        )


def _decays_as_ours(value: Any, params: Sequence[Any], weight_decay: float) -> bool:
    return all(
        value == (weight_decay if len(getattr(p, "ds_shape", p.shape)) >= 2 else 0.0)
        for p in params
    )
