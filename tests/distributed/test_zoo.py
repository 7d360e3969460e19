"""Steps of the models of the zoo against the dense reference.

They run on one rank without sharding, and on two ranks under ZeRO-3. A sample runs by default;
`pytest -m zoo` runs all.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import zods
from tests.distributed.models import configuration, numpy_of, whole
from tests.distributed.ranks import run_ranks
from tests.distributed.zoo_models import SUBJECTS
from tests.distributed.zoo_models.subject import EXAMPLES, Subject, fresh, joined, loss_of, part_of
from tests.reference.dense import DenseReference, named_parameters_of
from tests.reference.in_place import loss_in_place

STEPS = 3
# the number of examples of the training set, over which SVRG's anchor gradient is taken
DATASET = 2 * EXAMPLES
GROUP = 8  # the number of models that one set of processes runs
LOW_RANK = {"distribution": "low_rank", "rank": 2}
SVRG = {
    "anchor_interval": 2,
    "anchor_lr": 1e-3,
    "anchor_directions": 2,
    "anchor_split": False,
    "seed": 3,
}
TERMS = {"point": "terms", "gradient": "terms"}
# Parameters are released after each module, as large ones are. By default ZeRO-3 keeps such small
# parameters gathered.
RELEASED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
# (arguments of `configuration`, arguments of `DenseReference`) by kind of run
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gaussian": ({"method": "mezo"}, {"method": "mezo"}),
    "low rank": (
        {"method": "mezo", "direction": LOW_RANK},
        {"method": "mezo", "direction": "low_rank", "rank": 2},
    ),
    # The parts of the training set may differ in length, because the reference's mean is over
    # examples and not over parts.
    "svrg": (
        {"method": "mezo_svrg", "loss_mean": "examples", "anchor": TERMS, **SVRG},
        {"method": "mezo_svrg", **SVRG},
    ),
    "bf16": ({"method": "mezo", "bf16": True, "stochastic_rounding": False}, {"method": "mezo"}),
}


def runs_of(subject: Subject) -> list[str]:
    return ["gaussian", "low rank", *["svrg"] * subject.svrg, *["bf16"] * subject.bf16]


class Trained(NamedTuple):
    """The results of a run.

    Weights before and after the run, the loss and the projected gradient of each step, and the form
    of evaluation.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    losses: list[float]
    projected_grads: list[float]
    form: str | None = None


def steps_of(subject: Subject, kind: str) -> dict[str, float]:
    """The sizes of a run's steps.

    Steps in bf16 are large, because its roundings are.
    """
    return (
        {"eps": 0.1, "lr": 10 * subject.lr}
        if kind == "bf16"
        else {"eps": subject.eps, "lr": subject.lr}
    )


def trained(subject: Subject, kind: str) -> Trained:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    size = EXAMPLES // world_size
    arguments = {"stage": 0, **steps_of(subject, kind), **RUNS[kind][0]}
    if world_size > 1:
        arguments |= {"stage": 3, "top": {} if kind == "low rank" else RELEASED}
    data = None
    if kind == "svrg":
        data = [
            part_of(subject.batch(k), i, i + 1)
            for k in range(DATASET // EXAMPLES)
            for i in range(EXAMPLES)
        ]
    config = configuration(EXAMPLES, **arguments)
    engine = zods.initialize(
        model=fresh(subject), config=config, training_data=data, collate_fn=joined
    )[0]
    before = numpy_of(whole(engine))
    losses, projected_grads = [], []
    for step in range(STEPS):
        loss = engine(part_of(subject.batch(step), rank * size, (rank + 1) * size))
        engine.backward(loss)
        engine.step()
        losses.append(engine.last_step.loss)
        projected_grads.append(engine.last_step.projected_grad)
    after = numpy_of(whole(engine))
    engine.close()
    return Trained(before, after, losses, projected_grads, engine.evaluation)


def rank_of_runs(names: Sequence[str]) -> dict[tuple[str, str], Trained | str]:
    """Run each model. A run that fails on all ranks gives the error's text."""
    found: dict[tuple[str, str], Trained | str] = {}
    for name in names:
        for kind in runs_of(SUBJECTS[name]):
            print(f"{name}, {kind}", flush=True)
            try:
                found[name, kind] = trained(SUBJECTS[name], kind)
            except Exception:
                found[name, kind] = traceback.format_exc()
    return found


def dense_run(subject: Subject, kind: str, num_parts: int) -> Trained:
    """Make the same steps in one process.

    Every batch is evaluated in as many parts as there are ranks.
    """
    model, size = fresh(subject), EXAMPLES // num_parts
    if kind == "bf16":
        model = model.bfloat16().float()
    params = named_parameters_of(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}

    def parts(seed: int) -> list[Any]:
        batch = subject.batch(seed)
        return [part_of(batch, k * size, (k + 1) * size) for k in range(num_parts)]

    whole_set = [part for k in range(DATASET // EXAMPLES) for part in parts(k)]
    dense = DenseReference(
        params=params,
        loss=loss_in_place(model, loss_of),
        whole_set=whole_set,
        trainable=trainable,
        **steps_of(subject, kind),
        **RUNS[kind][1],
    )
    losses, projected_grads = [], []
    for step in range(STEPS):
        losses.append(dense.step(parts(step)))
        plus, minus, *_ = dense.losses
        projected_grads.append((plus - minus) / (2 * dense.eps))
    return Trained(numpy_of(params), numpy_of(dense.params), losses, projected_grads)


Outcomes = Callable[[int, str], dict[str, list[Trained | str]]]


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    """A function of (world size, name) that gives each rank's outcome by kind of run.

    The models of the selected tests are run in groups.
    """
    asked: dict[int, list[str]] = {1: [], 2: []}
    for item in request.session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if "outcomes" in item.fixturenames and params["name"] not in asked[params["world_size"]]:
            asked[params["world_size"]].append(params["name"])
    groups = {
        (world_size, name): names[k // GROUP * GROUP :][:GROUP]
        for world_size, names in asked.items()
        for k, name in enumerate(names)
    }
    known: dict[tuple[int, str], list[dict[tuple[str, str], Trained | str]]] = {}

    def outcome(world_size: int, name: str) -> dict[str, list[Trained | str]]:
        group = groups[world_size, name]
        if (world_size, name) not in known:
            try:
                ranks = run_ranks(world_size, rank_of_runs, group)
            except pytest.fail.Exception:
                if len(group) == 1:
                    raise
                # A model that fails must not make the others fail.
                groups.update({(world_size, of): [of] for of in group})
                return outcome(world_size, name)
            known.update({(world_size, of): ranks for of in group})
        ranks = known[world_size, name]
        return {kind: [rank[name, kind] for rank in ranks] for kind in runs_of(SUBJECTS[name])}

    return outcome


def check(outcomes: Outcomes, name: str, world_size: int) -> None:
    subject = SUBJECTS[name]
    for kind, ranks in outcomes(world_size, name).items():
        expected = dense_run(subject, kind, world_size)
        for found in ranks:
            assert isinstance(found, Trained), f"{kind}: {found}"
            compare(found, expected, kind, **steps_of(subject, kind))


def compare(found: Trained, expected: Trained, kind: str, eps: float, lr: float) -> None:
    """Compare within a tolerance that rounding explains.

    Both run the same float32 forward, with its sums in another order. A loss of size L has an error
    of a few roundings of 2^-24 L (16 are allowed, 3 were seen). A projected gradient has the error
    of two losses over 2 eps. Nothing amplifies these errors in so few steps. In bf16 activations
    are rounded by up to 2^-9 of their size. A loss is the mean over many of them, and two such
    roundings are enough. The largest projected gradient must be far above its tolerance, and none
    is exactly 0.
    """
    loss_tolerance = max(expected.losses) * (2.0**-8 if kind == "bf16" else 16 * 2.0**-24)
    grad_tolerance = loss_tolerance / eps
    says = (
        f"{kind}, {found.form}: projected gradients {found.projected_grads}, "
        f"dense {expected.projected_grads}"
    )
    assert all(found.projected_grads), says
    assert (
        max(map(abs, expected.projected_grads)) > (4 if kind == "bf16" else 20) * grad_tolerance
    ), says
    np.testing.assert_allclose(
        found.projected_grads, expected.projected_grads, 0, grad_tolerance, err_msg=says
    )
    np.testing.assert_allclose(found.losses, expected.losses, 0, loss_tolerance, err_msg=says)
    number = 4 if kind == "svrg" else 1  # the number of projected gradients in an update
    # The directions of different steps are independent.
    of_grads = math.sqrt(STEPS) * number * lr * grad_tolerance
    compare_weights(found, expected, of_grads, 2.0**-9 if kind == "bf16" else 2.0**-24)


def compare_weights(found: Trained, expected: Trained, of_grads: float, rounding: float) -> None:
    """Compare within a tolerance that rounding explains.

    A step moves an element by lr * projected_grad * z and rounds it. z^2 is 1 in the mean over all
    elements. of_grads is lr times the errors that the projected gradients of all steps may have.
    Roundings are independent of each other. The root mean square over all elements is compared,
    because in bf16 many elements are rounded by as much as they move. No element may have an error
    of 12 times that plus its own roundings (with rank 2 the tail of z is longer than a Gaussian's).
    A parameter that is not trained keeps its bits.
    """
    assert list(found.after) == list(expected.after)
    assert all(
        np.array_equal(found.before[name], start) for name, start in expected.before.items()
    ), "the weights differ before the first step"
    moved = {name: after - expected.before[name] for name, after in expected.after.items()}
    trained = [name for name, movement in moved.items() if movement.any()]
    for name in moved.keys() - set(trained):
        assert np.array_equal(found.after[name], expected.before[name]), f"{name} is not trained"
    errors = {name: np.abs(found.after[name] - expected.after[name]) for name in trained}
    for name, error in errors.items():
        allowed = 12 * of_grads + 2 * STEPS * rounding * np.abs(expected.after[name])
        assert (error <= allowed).all(), (
            f"{name} is off by {error.max():.1e} of {np.abs(moved[name]).max():.1e}"
        )
    of_roundings = math.sqrt(STEPS) * rounding * rms([expected.after[name] for name in trained])
    assert rms([moved[name] for name in trained]) > 3 * (of_grads + of_roundings)
    assert rms(list(errors.values())) <= of_grads + of_roundings


def rms(arrays: Sequence[Any]) -> float:
    return math.sqrt(sum(float(np.square(a).sum()) for a in arrays) / sum(a.size for a in arrays))


CASES = [
    (name, size)
    for size in (1, 2)
    for name, subject in SUBJECTS.items()
    if size == 1 or subject.sharded
]
SAMPLE = [(name, size) for name, size in CASES if SUBJECTS[name].sample]


def named(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else ("stage 0 on one rank", "ZeRO-3 on two ranks")[value - 1]
    )


@pytest.mark.parametrize(("name", "world_size"), SAMPLE, ids=named)
def test_steps_of_a_sample_agree_with_the_dense_reference(outcomes, name, world_size):
    check(outcomes, name, world_size)


@pytest.mark.zoo
@pytest.mark.parametrize(("name", "world_size"), CASES, ids=named)
def test_steps_of_the_zoo_agree_with_the_dense_reference(outcomes, name, world_size):
    check(outcomes, name, world_size)
