"""The section "scheduler": which classes are allowed, and the values that follow from `lr`.

There is one rule for step sizes: a schedule follows `lr`. Some classes take the step size as a
parameter of their own (WarmupLR's `warmup_max_lr`, OneCycleLR's `max_lr`, ...). Such a parameter
takes the value of `lr` where it is missing or "auto". It is refused where it is another number,
because one of the two numbers would be ignored silently.

`zods.config.deepspeed_json` resolves the section; the engine builds the scheduler from it.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime import lr_schedules

from zods.config.deepspeed_checks import quiet

# Parameters that must equal lr. A range test starts from it.
PEAKS = ("warmup_max_lr", "cycle_max_lr", "max_lr", "lr_range_test_min_lr")
# Parameters that must not be above lr
FLOORS = ("warmup_min_lr", "cycle_min_lr", "base_lr", "eta_min")
LENGTHS = ("total_num_steps", "total_steps")  # "auto": the number of steps of the run
PROVISIONAL = 10**9  # steps; more than any warm-up
_BASES = ("LRScheduler", "_LRScheduler")  # base classes, which make no schedule


def scheduler_class(name: Any) -> type | None:
    """DeepSpeed's or torch's scheduler class with this name; None where there is no such class."""
    if name in lr_schedules.VALID_LR_SCHEDULES:
        return getattr(lr_schedules, name)
    kind = getattr(torch.optim.lr_scheduler, name, None) if isinstance(name, str) else None
    base = torch.optim.lr_scheduler.LRScheduler
    return (
        kind
        if isinstance(kind, type) and issubclass(kind, base) and kind.__name__ not in _BASES
        else None
    )


def arguments_of_step(scheduler: Any) -> list[str]:
    """List the arguments that `scheduler.step` requires.

    scheduler: a class or an instance.
    """
    step = scheduler.step
    try:
        parameters = list(inspect.signature(step).parameters.values())[
            int(isinstance(scheduler, type)) :
        ]
    except (TypeError, ValueError):  # some callables in C have no signature
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        p.name
        for p in parameters
        if p.default is inspect.Parameter.empty and p.kind not in variadic
    ]


def step_mistake(scheduler: Any, where: str) -> str | None:
    """A message where `scheduler.step()` cannot be called without arguments; None where it can.

    The engine calls it without arguments after each step.
    """
    needed = arguments_of_step(scheduler)
    name = scheduler.__name__ if isinstance(scheduler, type) else type(scheduler).__name__
    if not needed:
        return None
    return (
        f"{where}: {name}.step() needs an argument ({', '.join(needed)}), but it is called without "
        "one after every step. Use another scheduler."
    )


def resolve_scheduler(
    scheduler: Any,
    lr: float,
    lr_key: str,
    optimizer: torch.optim.Optimizer,
    total_steps: int | None,
) -> tuple[dict[str, Any], list[str]]:
    """Resolve the parameters of the section "scheduler" that follow from other values.

    lr: the step size. lr_key: the key that the step size comes from. optimizer: an optimizer like
    that of the run, on which the scheduler is tried. total_steps: number of steps of the run, or
    None where it is not known.
    Returns the resolved section, and the messages of its mistakes.
    """
    if not isinstance(scheduler, dict) or not isinstance(scheduler.get("type"), str):
        return {}, [
            f'scheduler: found {scheduler!r}, expected {{"type": NAME, "params": {{...}}}}.'
        ]
    params = scheduler.get("params", {})
    unknown = sorted({*scheduler} - {"type", "params"})
    found = [f"scheduler.{key}: unknown key. Allowed are type and params." for key in unknown]
    kind = scheduler_class(scheduler["type"])
    if kind is None:
        allowed = ", ".join(lr_schedules.VALID_LR_SCHEDULES)
        found.append(
            f"scheduler.type: found {scheduler['type']!r}, allowed are {allowed} and the classes "
            "of torch.optim.lr_scheduler."
        )
    elif message := step_mistake(kind, "scheduler.type"):
        found.append(message)
    if not isinstance(params, Mapping):
        found.append(f"scheduler.params: found {params!r}, expected a section {{...}}.")
    if found or kind is None:
        return {}, found
    params = _resolved(kind, params, lr, optimizer, total_steps)
    found += _unresolved_autos(params)
    found += _conflicting_step_sizes(params, lr, lr_key)
    if not found:
        found += _refused_by_scheduler(kind, params, optimizer, total_steps)
    return {**scheduler, "params": params}, found


def _resolved(
    kind: type,
    params: Mapping[str, Any],
    lr: float,
    optimizer: torch.optim.Optimizer,
    total_steps: int | None,
) -> dict[str, Any]:
    resolved = dict(params)
    taken = inspect.signature(kind).parameters
    resolved |= {
        key: lr for key in PEAKS if key in taken and params.get(key, "auto") in ("auto", None)
    }
    resolved |= {key: 0.0 for key in FLOORS if params.get(key) == "auto"}
    if "cycle_momentum" in taken and not {"momentum", "betas"} & set(optimizer.defaults):
        # The default, True, is an error for an optimizer without a momentum.
        resolved.setdefault("cycle_momentum", False)
    if total_steps is not None:
        resolved |= {key: total_steps for key in LENGTHS if params.get(key) == "auto"}
    return resolved


def _unresolved_autos(params: Mapping[str, Any]) -> Iterator[str]:
    ways = {
        "total_num_steps": "give a number, or use zods.finetune, "
        "whose --max_steps or --num_epochs settle it.",
        "total_steps": "give a number, or use zods.finetune, "
        "whose --max_steps or --num_epochs settle it.",
        "warmup_num_steps": "give a number.",
    }
    for key in [key for key, value in params.items() if value == "auto"]:
        way = ways.get(key, "give a value, or leave the key out.")
        yield f'scheduler.params.{key}: "auto" cannot be resolved here; {way}'


def _conflicting_step_sizes(params: Mapping[str, Any], lr: float, lr_key: str) -> Iterator[str]:
    """Yield a message for each step size among the parameters that contradicts `lr`."""
    for key in (*PEAKS, *FLOORS):
        values = params.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if type(value) not in (int, float) or not abs(value) < math.inf or abs(value) > 1e300:
                continue  # the scheduler itself refuses it
            if key in PEAKS and not math.isclose(value, lr, rel_tol=1e-9):
                yield (
                    f"scheduler.params.{key}: found {value!r}, but {lr_key} is {lr!r}, and the "
                    f"schedule sets every step "
                    f'size. Leave {key} out (or "auto") to follow lr, or set lr to {value!r}.'
                )
            elif key in FLOORS and value > lr:
                yield (
                    f"scheduler.params.{key}: found {value!r}, above {lr_key}, which is {lr!r}. "
                    "Lower it, or raise lr."
                )


def _refused_by_scheduler(
    kind: type, params: Mapping[str, Any], optimizer: Any, total_steps: int | None
) -> Iterator[str]:
    """Yield a message where the scheduler itself refuses its parameters, or ends before the run.

    The scheduler is built on `optimizer`, which no run uses.
    """
    named = f"scheduler.params: {kind.__name__} refused {dict(params)}"
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the optimizer made no step
            scheduler: Any = kind(optimizer, **params)
            for _ in range(2):
                scheduler.step()
    # Values that the class does not check raise TypeError, ZeroDivisionError and others.
    except Exception as error:
        yield f"{named}: {str(error) or type(error).__name__}"
        return
    key, lasts = _length(scheduler)
    if total_steps is not None and lasts is not None and lasts < total_steps:
        longer = (
            f'set {key} to {total_steps} or "auto"'
            if key != "cycle_first_step_size"
            else "make the cycle longer"
        )
        yield (
            f"scheduler.params.{key}: {kind.__name__} ends after {lasts:g} steps, but the run has "
            f"{total_steps}. {longer[0].upper()}{longer[1:]}, or train fewer steps."
        )


def _length(scheduler: Any) -> tuple[str, float | None]:
    """A scheduler's length in steps, and the name of the parameter that sets it.

    The length is None where the scheduler has no end. After its end OneCycleLR raises, the step
    size of WarmupDecayLR is 0, and the step size of WarmupCosineLR rises again. OneCycle may decay
    further, but it stays at 0 where its lowest step size is 0.

    Returns (parameter, length).
    """
    for key in ("total_steps", "total_num_steps"):
        if type(getattr(scheduler, key, None)) in (int, float):
            return key, getattr(scheduler, key)
    if isinstance(scheduler, lr_schedules.OneCycle) and not any(scheduler.min_lrs):
        return "cycle_first_step_size", scheduler.total_size
    return "", None


def with_provisional_length(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a configuration, with a provisional number where the schedule's length is "auto".

    The rest of the configuration can then be checked before the data are read. The number of steps
    is known only after that.
    """
    scheduler = config.get("scheduler")
    params = scheduler.get("params") if isinstance(scheduler, Mapping) else None
    if not isinstance(scheduler, Mapping) or not isinstance(params, Mapping):
        return dict(config)
    known = {
        key: PROVISIONAL if key in LENGTHS and value == "auto" else value
        for key, value in params.items()
    }
    return {**config, "scheduler": {**scheduler, "params": known}}


def build_scheduler(section: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """Build the scheduler of a resolved section on the optimizer."""
    kind = scheduler_class(section["type"])
    assert kind is not None
    return kind(optimizer, **section["params"])


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """A holder of the step size, where schedulers look for it.

    `engine.step()` updates the parameters.
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})
        # else torch's schedulers (torch 2.13) warn that step() was not called before theirs
        self._opt_called = True

    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("ZerothOrderOptimizer holds the step size only; call engine.step().")
