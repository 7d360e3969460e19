"""Errors of estimates of the gradient on a logistic regression, whose gradient is known exactly.

For the tests of the estimators and for `benchmarks/variance.py`. An error is the mean of
|estimate - gradient|^2 / |gradient|^2 over draws of a batch and of directions. The gradient is that
of all examples.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from zods.config.schema import parse_section
from zods.core.anchor_weight import AnchorWeight, record_products
from zods.core.directions import derive_seed
from zods.core.estimators import Term, projected_grads, spsa, svrg
from zods.core.example_groups import part_starts
from zods.core.update_rule import StepRule
from zods.data.order import anchor_order
from zods.kernels import direction

NUM_PARAMETERS, NUM_EXAMPLES, BATCH = 2000, 512, 64
EPSILON = 1e-3
WALK = 20  # steps between a refresh and the measured estimates


def z(seed: int, numel: int = NUM_PARAMETERS, distribution: str = "gaussian") -> Tensor:
    """The direction of a seed for a model of one parameter of `numel` elements, in float64."""
    return direction(numel, seed=seed, distribution=distribution, parameter=0, offset=0).double()


class LogisticRegression:
    """Mean of log(1 + exp(-y x.theta)), at many points theta + eps z at once.

    Its gradient is known exactly.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(NUM_EXAMPLES, NUM_PARAMETERS, generator=generator, dtype=torch.float64)
        truth = (
            torch.randn(NUM_PARAMETERS, generator=generator, dtype=torch.float64)
            * 2
            / NUM_PARAMETERS**0.5
        )
        chance = torch.rand(NUM_EXAMPLES, generator=generator, dtype=torch.float64)
        # the labels' signs
        self.x *= torch.where(chance < torch.sigmoid(self.x @ truth), 1.0, -1.0)[:, None]

    def grad(self, theta: Tensor) -> Tensor:
        return -(torch.sigmoid(-(self.x @ theta)) @ self.x) / NUM_EXAMPLES

    @staticmethod
    def projected(x_dot_theta: Tensor, x_dot_z: Tensor, examples: Tensor | None) -> list[float]:
        """projected_grads at theta for each direction, over all examples or over `examples`.

        x_dot_theta: (examples,). x_dot_z: (directions, examples). examples: (1, batch), indices.
        """
        losses = []
        for sign in (1, -1):
            each = functional.softplus(-(x_dot_theta + sign * EPSILON * x_dot_z))
            losses.append((each if examples is None else each.gather(1, examples)).mean(1).tolist())
        return projected_grads([a - b for a, b in zip(*losses, strict=True)], EPSILON)


def squared_error(estimate: Tensor, grad: Tensor) -> float:
    return float((estimate - grad).square().sum() / grad.square().sum())


def errors_of_refresh(number: int, draws: int) -> dict[str, float]:
    """The errors of a full-batch estimate at 0 from `number` directions, and the noise scale.

    "one pass": each direction on its own part of the examples, as with `anchor_split`. "whole
    passes": each on all examples. "noise": N, the variance of the examples' gradients over the
    squared norm of their mean.
    """
    problem = LogisticRegression()
    theta = torch.zeros(NUM_PARAMETERS, dtype=torch.float64)
    gradients = -torch.sigmoid(-(problem.x @ theta))[:, None] * problem.x
    grad, at_theta = gradients.mean(0), problem.x @ theta
    noise = (gradients - grad).square().sum(1).mean() / grad.square().sum()
    section = {"method": "mezo_svrg", "direction": "gaussian", "examples_per_direction": "all"}
    rule = StepRule(parse_section({**section, "eps": EPSILON, "anchor_directions": number}))
    found = {"one pass": 0.0, "whole passes": 0.0, "noise": float(noise)}
    for draw in range(draws):
        seeds = rule.seeds("anchor", draw, number)
        directions = torch.stack([z(seed) for seed in seeds])
        x_dot_z = directions @ problem.x.T
        order = anchor_order(NUM_EXAMPLES, examples=None, shuffled=True, seed=draw)
        bounds = [*part_starts(NUM_EXAMPLES, number), NUM_EXAMPLES]
        parts = [order[start:stop] for start, stop in itertools.pairwise(bounds)]
        differences = []
        for of_part, part in zip(x_dot_z, parts, strict=True):
            plus, minus = (
                functional.softplus(-(at_theta + sign * EPSILON * of_part))[part]
                for sign in (1, -1)
            )
            differences.append(float((plus - minus).sum()) / NUM_EXAMPLES)
        terms = rule.estimate_at_anchor(seeds, differences)
        assert [term.seed for term in terms] == seeds
        whole = spsa(seeds, problem.projected(at_theta, x_dot_z, None))
        for name, of_name in (("one pass", terms), ("whole passes", whole)):
            weights = torch.tensor([term.coefficient for term in of_name], dtype=torch.float64)
            found[name] += squared_error(weights @ directions, grad) / draws
    return found


def errors_at_equal_forwards(descents: int, walk: int = WALK, draws: int = 60) -> dict[str, float]:
    """The errors of three estimates of 256 forwards, `walk` steps after a refresh.

    descents: the anchor is the point after that many steps of gradient descent from 0. "mezo": one
    direction for a batch of 128. "svrg, shared": one direction for a batch of 64, 16 anchor
    directions. "svrg, per example": a direction per example of a batch of 64, 64 anchor directions
    and the measured weight. The anchor directions are on all examples. The forwards of refreshes
    are not counted.
    """
    problem, lr = LogisticRegression(), 0.003
    anchor = torch.zeros(NUM_PARAMETERS, dtype=torch.float64)
    for _ in range(descents):
        anchor = anchor - problem.grad(anchor)
    section = {"method": "mezo_svrg", "direction": "gaussian", "examples_per_direction": 1}
    rule = StepRule(parse_section({**section, "eps": EPSILON}))
    generator = torch.Generator().manual_seed(1)

    def differences(at: Tensor, rows: Tensor, directions: Tensor) -> Tensor:
        """L_i(at + eps z_i) - L_i(at - eps z_i) of the examples `rows`, (rows,)."""
        x = problem.x[rows]
        moved = EPSILON * (x * directions).sum(1)
        return functional.softplus(-(x @ at + moved)) - functional.softplus(-(x @ at - moved))

    def along(at: Tensor, rows: Tensor, one: Tensor) -> float:
        """The projected gradient of the mean loss of `rows` along one direction."""
        mean = float(differences(at, rows, one.expand(len(rows), -1)).mean())
        return projected_grads([mean], EPSILON)[0]

    def dense_of(terms: tuple[Term, ...]) -> Tensor:
        coefficients = torch.tensor([term.coefficient for term in terms], dtype=torch.float64)
        return coefficients @ torch.stack([z(term.seed) for term in terms])

    def anchor_gradients(draw: int) -> tuple[Tensor, Tensor]:
        """The estimates from 64 directions, and from the first 16 of them."""
        seeds = [derive_seed(0, "anchor", draw, k) for k in range(64)]
        directions = torch.stack([z(seed) for seed in seeds])
        grads = problem.projected(problem.x @ anchor, directions @ problem.x.T, None)
        return dense_of(tuple(spsa(seeds, grads))), dense_of(tuple(spsa(seeds[:16], grads[:16])))

    theta, state = anchor, AnchorWeight()
    errors = {"mezo": 0.0, "svrg, shared": 0.0, "svrg, per example": 0.0}
    g, g_of_16 = anchor_gradients(0)
    for draw in range(walk + draws):
        rows = torch.randperm(NUM_EXAMPLES, generator=generator)[: 2 * BATCH]
        seeds = [rule.step_seeds(draw, group)[0][0] for group in range(BATCH)]
        directions = torch.stack([z(seed) for seed in seeds])
        pairs = [differences(at, rows[:BATCH], directions) for at in (theta, anchor)]
        found = rule.estimate(draw, torch.stack(pairs, 1).tolist(), state.value)
        estimate = dense_of(found.terms) + state.value * g
        state = record_products(state, found.products)
        if draw < walk:
            theta = theta - lr * estimate
            continue
        seed = derive_seed(0, "step", draw)
        one = z(seed)
        c, a = (along(at, rows[:BATCH], one) for at in (theta, anchor))
        estimates = {
            "mezo": along(theta, rows, one) * one,
            "svrg, shared": dense_of(tuple(svrg([seed], [c], [seed], [a]))) + g_of_16,
            "svrg, per example": estimate,
        }
        grad = problem.grad(theta)
        for name, of_name in estimates.items():
            errors[name] += squared_error(of_name, grad) / draws
        g, g_of_16 = anchor_gradients(draw)
    return errors
