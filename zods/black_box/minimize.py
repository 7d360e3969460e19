"""`zods.minimize`: MeZO and MeZO-SVRG for a function of tensors, with its values alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from zods.black_box.objective import Objective
from zods.black_box.steps import Minimization
from zods.black_box.variables import Variables
from zods.config.config_errors import Mistakes, read_model
from zods.config.schema import ZerothOrderConfig
from zods.trajectory.log import LogFile, Trajectory

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES: dict[str, Callable[[float], float]] = {
    # from the share of the run that is over to a factor of lr
    "constant": lambda over: 1.0,
    "linear": lambda over: 1.0 - over,
    "cosine": lambda over: (1.0 + math.cos(math.pi * over)) / 2.0,
}
MAX_STEPS = 1000  # where neither max_steps nor max_evaluations is given
ANCHOR_INTERVAL = 50
ANCHOR_DIRECTIONS = 16


@dataclass(frozen=True)
class Progress:
    """The state after a step, for a callback.

    x: a copy, in the form of x0. loss: mean of the losses around x in the step; NaN if the step was
    skipped. nit: number of steps so far. nfev: number of losses computed so far. lr: of the step.
    """

    x: Any
    loss: float
    nit: int
    nfev: int
    lr: float


@dataclass(frozen=True)
class MinimizeResult:
    """The result of `minimize`.

    x: after the last step, in the form of x0; not the best x on the way. fun: the function there,
    or the mean loss of all examples. nit: number of steps. nfev: number of losses computed; a call
    for m examples counts m. success: whether `fun` is finite; it does not tell a minimum.
    message: why the run ended. losses: of each step, the mean loss around x before its update; NaN
    for a step that was skipped. skipped: number of those.
    """

    x: Any
    fun: float
    nit: int
    nfev: int
    success: bool
    message: str
    losses: list[float]
    skipped: int


def minimize(
    function: Callable[..., Any],
    x0: Any,
    method: Literal["mezo", "mezo_svrg"] = "mezo",
    *,
    num_examples: int | None = None,
    batch_size: int | None = None,
    lr: float = 0.01,
    schedule: Schedule = "linear",
    normalize: bool = True,
    eps: float = 1e-3,
    direction: Literal["gaussian", "rademacher", "low_rank"] = "gaussian",
    num_directions: int = 1,
    examples_per_direction: int | Literal["all"] = "all",
    anchor_interval: int | None = None,
    anchor_directions: int | None = None,
    anchor_weight: float | Literal["auto"] | None = None,
    seed: int = 42,
    max_steps: int | None = None,
    max_evaluations: int | None = None,
    max_nonfinite_steps: int = 10,
    callback: Callable[[Progress], object] | None = None,
    log: str | Path | None = None,
) -> MinimizeResult:
    """Minimise a function of tensors by its values, without gradients.

    The estimators, the step rule and the trajectory log are those of `zods.initialize`
    (Malladi et al. 2023, arXiv:2305.17333; Gautam et al. 2024, arXiv:2404.08080). The result is a
    function of the arguments: the same seed gives the same bits.

    >>> import torch, zods
    >>> result = zods.minimize(lambda x: ((x - 1) ** 2).sum(), torch.zeros(10))
    >>> bool((result.x - 1).abs().max() < 0.02)
    True

    Args:
        function: `function(x)` returns a number. With `num_examples`, `function(x, indices)`
            returns the losses of some examples, (len(indices),), and their mean is minimised.
            x has the form of x0; indices is an int64 tensor, or an array where x0 has arrays. A
            refresh and the end of the run call it with up to `num_examples` indices. It need not
            be differentiable or continuous. It must give the same value each time it is called.
        x0: a tensor or a numpy array, or a dict of either; float32, float64 or bfloat16. It is not
            changed. x is kept in float32 where it is float64, and in bfloat16, with stochastic
            rounding, where it is bfloat16.
        method: "mezo" evaluates two points per direction. "mezo_svrg" evaluates two more, at an
            anchor, whose gradient is estimated anew every `anchor_interval` steps. At an equal
            number of evaluations "mezo" is often the better one, without examples in particular.
        num_examples, batch_size: number of examples, and of those that a step takes. Every epoch
            takes each at most once, in random order. Give both or neither.
        lr: step size. With `normalize` a step changes an element of x by about lr (root mean
            square), whatever the scale of the function.
        schedule: whether lr stays, or falls to 0 over the run ("linear", "cosine").
        normalize: divide a step by the running size of the estimates.
        eps: distance of the points from x, per element. A function with steps, such as an error
            rate, is smoothed over it, and needs a larger one than the default. So does bfloat16,
            in which eps has to exceed the spacing of numbers, 0.4% to 0.8% of their size.
        direction: distribution of the directions. With "low_rank" those of matrices have rank 1.
        num_directions: directions per step.
        examples_per_direction: examples of a batch that share directions, "all" or a number. Fewer
            give a better estimate from the same evaluations, in more calls.
        anchor_interval, anchor_directions, anchor_weight: of "mezo_svrg" alone: steps between two
            refreshes (None: 50), directions of a refresh (None: 16), and the factor of the
            anchor's part of an estimate, 0 to 1 or measured (None: "auto"). With examples, each
            direction of a refresh takes its own part of them.
        seed: of directions, batches and stochastic rounding; 0 to 2^63 - 1.
        max_steps, max_evaluations: the run ends at the first of them that is given: number of
            steps, and largest number of losses computed, `fun` included. None for both: 1000 steps.
        max_nonfinite_steps: number of steps in a row that may be skipped because a loss is not
            finite.
        callback: called after each step; the run ends where it returns a true value.
        log: path of a new trajectory log. x0, in the dtype in which it is kept, and the log give
            `x` again, to the bit (`python -m zods.trajectory replay`). The tensors are named by
            their keys; a single one is named "x".

    Raises:
        ValueError: an argument is not as described, or the function returns something else.
        RuntimeError: the function is not finite near x0 at the first refresh, or in more than
            `max_nonfinite_steps` steps in a row.
        OSError: the log cannot be written.
    """
    given = {
        "anchor_interval": anchor_interval,
        "anchor_directions": anchor_directions,
        "anchor_weight": anchor_weight,
    }
    _check_kinds(function, schedule, callback)
    _check_counts(
        num_examples=num_examples,
        batch_size=batch_size,
        max_steps=max_steps,
        max_evaluations=max_evaluations,
    )
    config = _config(
        num_examples,
        {key: value for key, value in given.items() if value is not None},
        method=method,
        lr=lr,
        normalize=normalize,
        eps=eps,
        direction=direction,
        num_directions=num_directions,
        examples_per_direction=examples_per_direction,
        seed=seed,
        max_nonfinite_steps=max_nonfinite_steps,
    )
    _check_sizes(config, num_examples, batch_size)
    variables = Variables(x0)
    objective = Objective(function, variables, num_examples)
    if max_steps is None and max_evaluations is None:
        max_steps = MAX_STEPS
    trajectory = Trajectory()
    run = Minimization(config, batch_size or 1, objective, variables, trajectory)
    budget = _Budget(max_steps, max_evaluations, objective.num_examples)
    budget.check_first_step(run)
    with (
        nullcontext() if log is None else closing(_new_log(log)) as trajectory.file,
        torch.no_grad(),
    ):
        run.begin({"schedule": schedule})
        losses, message = _make_steps(run, budget, lr, SCHEDULES[schedule], variables, callback)
        fun = objective.mean(run.values)
    return MinimizeResult(
        x=variables.as_given(run.values),
        fun=fun,
        nit=run.num_steps,
        nfev=objective.evaluations,
        success=math.isfinite(fun),
        message=message,
        losses=losses,
        skipped=run.skipped,
    )


@dataclass(frozen=True)
class _Budget:
    """The ends of a run. at_end: number of losses that are computed after the last step."""

    max_steps: int | None
    max_evaluations: int | None
    at_end: int

    def check_first_step(self, run: Minimization) -> None:
        """Raise ValueError where not even one step can be made."""
        needed = run.next_evaluations + self.at_end
        if self.max_evaluations is not None and needed > self.max_evaluations:
            raise ValueError(
                f"max_evaluations: found {self.max_evaluations}, but one step and the function at "
                f"its end take {needed}. Give as many or more."
            )

    def spent(self, run: Minimization) -> str | None:
        """Why no further step can be made; None where one can."""
        if self.max_steps is not None and run.num_steps >= self.max_steps:
            return f"made max_steps = {self.max_steps} steps"
        needed = run.objective.evaluations + run.next_evaluations + self.at_end
        if self.max_evaluations is not None and needed > self.max_evaluations:
            return f"another step would exceed max_evaluations = {self.max_evaluations}"
        return None

    def share_over(self, run: Minimization) -> float:
        """The share of the budget that is spent, from 0 to 1."""
        steps = 0.0 if self.max_steps is None else run.num_steps / self.max_steps
        if self.max_evaluations is None:
            return steps
        return max(steps, run.objective.evaluations / self.max_evaluations)


def _make_steps(
    run: Minimization,
    budget: _Budget,
    lr: float,
    factor: Callable[[float], float],
    variables: Variables,
    callback: Callable[[Progress], object] | None,
) -> tuple[list[float], str]:
    """Make steps until the budget is spent or the callback ends the run.

    Returns the loss of each step, and why the run ended.
    """
    losses: list[float] = []
    while (message := budget.spent(run)) is None:
        lr_of_step = lr * factor(budget.share_over(run))
        if run.refresh_is_due:
            run.refresh(lr_of_step)
        loss = run.step(lr_of_step).loss
        losses.append(math.nan if loss is None else loss)
        if callback is not None:
            x, nfev = variables.as_given(run.values), run.objective.evaluations
            if callback(Progress(x, losses[-1], run.num_steps, nfev, lr_of_step)):
                return losses, "the callback returned True"
    return losses, message


def _new_log(path: str | Path) -> LogFile:
    """Open the file of a new log. Raises ValueError where the file holds something."""
    file = LogFile(path)
    if file.length():
        file.close()
        raise ValueError(f"log: {path} is not empty. Give the path of a new file.")
    return file


# --- arguments ------------------------------------------------------------------------------------


def _config(
    num_examples: int | None, of_anchor: dict[str, Any], **settings: Any
) -> ZerothOrderConfig:
    """The arguments as a section "zeroth_order", by which they are checked and logged.

    of_anchor: those of the arguments for "mezo_svrg" alone that are given.
    """
    found: list[str] = []
    if settings["method"] == "mezo" and of_anchor:
        found.append(
            f'minimize: {", ".join(of_anchor)} belong to method "mezo_svrg", but method is "mezo". '
            "Remove them, or change the method."
        )
    most = ANCHOR_DIRECTIONS if num_examples is None else min(ANCHOR_DIRECTIONS, num_examples)
    values = {
        "anchor_interval": ANCHOR_INTERVAL,
        "anchor_directions": most,
        "anchor_weight": "auto",
        **settings,
        **of_anchor,
        "anchor_split": num_examples is not None,
        "anchor": {"point": "device", "gradient": "device"},
    }
    config = read_model(ZerothOrderConfig, values, "minimize", found)
    if config is not None and config.lr == "auto":
        found.append('minimize.lr: found "auto", expected a number of at least 0.')
    if found or config is None:
        raise Mistakes(found)
    return config


def _check_kinds(function: Any, schedule: Any, callback: Any) -> None:
    if not callable(function):
        raise ValueError(f"function: found {type(function).__name__}, expected a function of x.")
    if callback is not None and not callable(callback):
        raise ValueError(f"callback: found {type(callback).__name__}, expected a function or None.")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: found {schedule!r}, expected one of {', '.join(SCHEDULES)}.")


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}: found {value!r}, expected a whole number of at least 1.")


def _check_sizes(
    config: ZerothOrderConfig, num_examples: int | None, batch_size: int | None
) -> None:
    """Raise ValueError where the sizes of examples, batches and groups do not fit each other."""
    if (num_examples is None) != (batch_size is None):
        raise ValueError(
            f"num_examples, batch_size: found {num_examples} and {batch_size}. Give both, for a "
            "function of x and indices, or neither."
        )
    if num_examples is None or batch_size is None:
        if config.examples_per_direction != "all":
            raise ValueError("examples_per_direction: given without num_examples. Remove it.")
        return
    of_anchor = config.anchor_directions if config.is_svrg else 1
    for name, size, limit, most in (
        ("batch_size", batch_size, "num_examples", num_examples),
        ("examples_per_direction", config.examples_per_direction, "batch_size", batch_size),
        ("anchor_directions", of_anchor, "num_examples", num_examples),
    ):
        if size != "all" and int(size) > most:
            raise ValueError(f"{name}: found {size}, but {limit} is {most}. Give as many or fewer.")
