"""The time of a step, by phase, from rates.

Between refreshes of the anchor; `refresh_time` has their share. With rates of a data sheet it is an
estimate. docs/planning.md has the formulae.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from zods.comm.rank_groups import rank_groups
from zods.forward.low_rank import product_of
from zods.planning.activations import forward_peak
from zods.planning.memory import step_forwards
from zods.planning.rates import Rates
from zods.planning.setup import Setup
from zods.planning.traffic import scalar_bytes_per_step, traffic

# Of these the slowest bounds a step where they overlap.
MEASURED = "step on one node, measured"
OVERLAPPING = ("forwards", MEASURED, "gathers", "host link", "NVMe")


class StepTime(NamedTuple):
    """Seconds of a step.

    phases: by name. total: their sum, or, where loads and gathers overlap with the forwards, the
    longest of these with the sum of the others. bound: name of the longest phase.
    """

    phases: dict[str, float]
    total: float
    bound: str


class Replicas(NamedTuple):
    """Launches of the setup that divide its batch between them, joined by slow links.

    number: of them, on average. delay: seconds one way. link: bytes per second of the leader.
    """

    number: float
    delay: float
    link: float


def step_time(
    setup: Setup,
    rates: Rates,
    ranks_per_node: int,
    *,
    replicas: Replicas | None = None,
    examples: int | None = None,
    measured: float | None = None,
) -> StepTime:
    """The time of a step of rank 0.

    examples: of the training set, for the refreshes of the anchor, spread over its interval; None
    leaves them out. measured: seconds of a step on one node, which take the place of all phases but
    those between nodes.
    """
    phases = _phases(setup, rates, ranks_per_node)
    zo, number = setup.config.zeroth_order, 1.0 if replicas is None else replicas.number
    if examples is not None and zo.is_svrg:
        phases["refresh"] = refresh_time(setup, rates, phases, examples) / number
    phases["forwards"] /= number
    if measured is not None:
        of_nodes = ("gathers", "scalars") if setup.world_size > ranks_per_node else ()
        kept = {name: phases[name] for name in (*of_nodes, "refresh") if name in phases}
        phases = {MEASURED: measured / number, **kept}
    if replicas is not None:
        phases["between replicas"] = replica_time(setup, replicas)
    return in_total(phases, rates.overlaps)


def _phases(setup: Setup, rates: Rates, ranks_per_node: int) -> dict[str, float]:
    moved, dtype_bytes = traffic(setup), setup.model.dtype.itemsize
    gathered = moved.gathered + moved.anchor_gathered
    link = rates.gathering(setup, ranks_per_node)
    passes = step_forwards(setup).number
    num_gathers = passes * len(setup.model.modules) if setup.world_size > 1 else 0
    owned = -(-setup.model.numel // setup.world_size)
    return {
        "forwards": _forward_time(setup, rates) + _perturbation_time(setup, rates),
        "gathers": gathered / link + num_gathers * rates.latency,
        "host link": (moved.host_to_device + moved.device_to_host) / rates.host_link,
        "NVMe": moved.nvme_read / rates.nvme_read + moved.nvme_written / rates.nvme_write,
        "update": 2 * owned * dtype_bytes / rates.memory + _terms_time(setup, rates, owned),
        "scalars": _exchange_time(setup, rates),
    }


def in_total(phases: Mapping[str, float], overlaps: bool) -> StepTime:
    """The time of a step whose phases are known."""
    together = [phases[name] for name in OVERLAPPING if name in phases]
    others = sum(time for name, time in phases.items() if name not in OVERLAPPING)
    total = others + (max(together) if overlaps else sum(together))
    return StepTime(dict(phases), total, max(phases, key=lambda name: phases[name]))


def replica_time(setup: Setup, replicas: Replicas) -> float:
    """Seconds that a step waits for the other replicas: two delays, and the leader's messages.

    The leader sends two messages to each of the others: 8 bytes for each sum, and about 60 beside
    them. Source: `zods.training.replica_messages`; benchmarks/replica_exchange.py counts the bytes.
    """
    if replicas.number <= 1:
        return 0.0
    sums = setup.pairs * setup.num_groups + 2
    return 2 * replicas.delay + (replicas.number - 1) * (8 * sums + 60) / replicas.link


def refresh_time(setup: Setup, rates: Rates, phases: Mapping[str, float], examples: int) -> float:
    """Seconds of a refresh over a training set, per step of its interval.

    Each forward has two points of a micro-batch; the set is passed once, or once for each direction
    where each takes the whole set. phases: of a step, whose forwards gather and load as much.
    """
    zo, forwards = setup.config.zeroth_order, step_forwards(setup)
    size = min(examples, zo.anchor_examples or examples)
    passes = 1 if zo.anchor_split else zo.anchor_directions
    number = passes * -(-size // (setup.micro_batch * setup.world_size))
    pair = forward_peak(setup.model, 2 * setup.micro_batch, setup.length, on_gpu=setup.on_gpu)
    of_one = {name: phases[name] / forwards.number for name in OVERLAPPING if name in phases}
    of_one["forwards"] = max(pair.flops / rates.flops, setup.model.bytes / rates.memory)
    return number * in_total(of_one, rates.overlaps).total / zo.anchor_interval


def _forward_time(setup: Setup, rates: Rates) -> float:
    """The operations of a step's forwards, at least one sweep over the model for each."""
    forwards = step_forwards(setup)
    of_one = forward_peak(setup.model, forwards.rows, setup.length, on_gpu=setup.on_gpu).flops
    return forwards.number * max(of_one / rates.flops, setup.model.bytes / rates.memory)


def _perturbation_time(setup: Setup, rates: Rates) -> float:
    """Perturbed copies of parameters, or the products of activations with low-rank factors.

    A copy is read from a parameter and written. A product with factors reads a matrix's input and
    adds to its output. An anchor's point kept as terms has factors, or numbers, for each term.
    """
    forwards, itemsize = step_forwards(setup), setup.model.dtype.itemsize
    zo = setup.config.zeroth_order
    is_low_rank = zo.direction.distribution == "low_rank" and setup.form == "stacked"
    copied, sides = 0, 0
    for module, own in setup.model.modules:
        if is_low_rank and product_of(module) is not None:
            sides += sum(sum(p.shape) for p in own if len(p.shape) == 2)
        else:
            copied += sum(p.numel for p in own)
    points = forwards.number * forwards.streams
    if not is_low_rank and setup.form != "sequential":  # whose forwards are of one group
        points *= setup.most_groups
    tokens = forwards.number * forwards.rows * setup.length
    copies = points * copied * (2 * itemsize / rates.memory + 1 / rates.numbers)
    products = tokens * sides * 2 * itemsize / rates.memory
    terms = _terms_since_refresh(setup)
    of_anchor = tokens / 2 * sides * 2 * terms * zo.direction.rank / rates.flops
    return copies + products + of_anchor + forwards.number * copied * terms / rates.numbers


def _terms_since_refresh(setup: Setup) -> float:
    """The terms that the anchor's point takes back in a forward, on average over its interval."""
    zo = setup.config.zeroth_order
    if not zo.is_svrg or zo.anchor.point != "terms":
        return 0.0
    return setup.num_groups * zo.num_directions * zo.anchor_interval / 2 + zo.anchor_directions


def _terms_time(setup: Setup, rates: Rates, owned: int) -> float:
    """The directions of all examples of a step, over a rank's own elements."""
    zo = setup.config.zeroth_order
    terms = setup.num_groups * zo.num_directions
    if zo.is_svrg and zo.anchor.gradient == "terms":
        terms += zo.anchor_directions
    if zo.direction.distribution == "low_rank":
        return 2 * terms * zo.direction.rank * owned / rates.flops
    return terms * owned / rates.numbers


def _exchange_time(setup: Setup, rates: Rates) -> float:
    """The all-gathers of the losses: one, or one for each level of `rank_groups` on the way up and
    down.
    """
    if setup.world_size == 1:
        return 0.0
    levels = 1 if setup.num_groups > 1 else len(rank_groups(setup.world_size))
    return (2 * levels - 1) * rates.latency + scalar_bytes_per_step(setup) / rates.link
