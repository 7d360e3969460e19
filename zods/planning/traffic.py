"""Bytes that one rank moves in a step, by kind.

Between refreshes of the anchor, in steps without a check of the form of evaluation or of the ranks'
agreement.
"""

from __future__ import annotations

from typing import NamedTuple

from zods.comm.rank_groups import receivers
from zods.planning.memory import anchor_bytes, step_forwards, stored_on
from zods.planning.setup import Setup


class Traffic(NamedTuple):
    """Bytes of one rank in a step.

    gathered: received in ZeRO-3's all-gathers of parameters. anchor_gathered: received in all-gathers
    of a stored anchor point. scalars: sent, of losses. host_to_device, device_to_host: offloaded
    parameters and anchor. nvme_read, nvme_written: the same on the drive.
    """

    gathered: int
    anchor_gathered: int
    scalars: int
    host_to_device: int
    device_to_host: int
    nvme_read: int
    nvme_written: int


def traffic(setup: Setup) -> Traffic:
    """The bytes that rank 0 moves in a step."""
    passes = step_forwards(setup).number
    zo = setup.config.zeroth_order
    host, nvme = _shards_on(setup, "host"), _shards_on(setup, "nvme")
    # A stored gradient is added in a pass of its own, as `TrainingRun.apply` does. Otherwise the
    # update waits until the next forward has loaded a parameter, and takes a write alone.
    own_pass = zo.is_svrg and zo.anchor.gradient != "terms" and zo.anchor_weight != 0.0
    point, gradient = anchor_bytes(setup, "point"), anchor_bytes(setup, "gradient")
    at_anchor = _anchor_passes(setup)
    loads = passes + own_pass
    return Traffic(
        gathered=gathered_per_step(setup),
        anchor_gathered=anchor_gathered_per_step(setup),
        scalars=scalar_bytes_per_step(setup),
        host_to_device=loads * (host + nvme)
        + at_anchor * (point.host + point.nvme)
        + own_pass * (gradient.host + gradient.nvme),
        device_to_host=host + nvme,
        nvme_read=loads * nvme + at_anchor * point.nvme + own_pass * gradient.nvme,
        nvme_written=nvme,
    )


def gathered_per_step(setup: Setup) -> int:
    """(ranks - 1) / ranks of all parameters, padded, in the stored dtype, once per forward.

    Sequential forwards gather the parameters that stay gathered (see `memory.gathered_bytes`) once
    per step. Sources: ZeRO-3's all-gathers, docs/measurements.md; tests/distributed/test_planning.py
    compares with DeepSpeed's calls.
    """
    world_size, threshold = setup.world_size, setup.zero.param_persistence_threshold
    passes = step_forwards(setup).number
    return (world_size - 1) * sum(
        p.padded_numel(world_size) * p.dtype.itemsize * (1 if p.numel <= threshold else passes)
        for p in setup.model.parameters
    )


def anchor_gathered_per_step(setup: Setup) -> int:
    """(ranks - 1) shards of every module's parameters, once per forward with points at the anchor.

    Nothing where the point is kept as terms. A shared parameter counts for each module that owns it.
    Source: `Anchor.center`, which a module calls once for all points of a forward.
    """
    zo, world_size = setup.config.zeroth_order, setup.world_size
    if not zo.is_svrg or zo.anchor.point == "terms":
        return 0
    shards = sum(
        p.padded_numel(world_size) * p.dtype.itemsize for _, own in setup.model.modules for p in own
    )
    return (world_size - 1) * shards * _anchor_passes(setup)


def _anchor_passes(setup: Setup) -> int:
    """Forwards of a step that have points at the anchor. The points at the parameters come first."""
    forwards = step_forwards(setup)
    if not setup.anchor_pairs:
        return 0
    if setup.form == "sequential":
        return forwards.number // 2
    points, of_anchor = 2 * setup.pairs, 2 * setup.anchor_pairs
    starts = range(0, points, forwards.streams)
    with_anchor = sum(
        min(start + forwards.streams, points) > points - of_anchor for start in starts
    )
    return with_anchor * setup.accumulation


def scalar_bytes_per_step(setup: Setup) -> int:
    """8 (pairs * groups of a rank + 6) bytes to each other rank, or to `receivers` ranks where the
    batch is one group.

    Every agreement_interval steps 16 bytes more to the latter. With groups of examples and a form that
    is not stacked, 8 bytes more to these for each micro-batch. Source:
    `zods.training.loss_exchange`, `Evaluator._losses_together`.
    """
    zo, combining = setup.config.zeroth_order, receivers(setup.world_size)
    of_ranks = [
        {g for micro in range(setup.accumulation) for g in setup.groups_of(rank, micro)}
        for rank in range(setup.world_size)
    ]
    numbers = setup.pairs * max(map(len, of_ranks)) + 6
    sent = numbers * (setup.world_size - 1 if len(set().union(*of_ranks)) > 1 else combining)
    if zo.has_groups and setup.form != "stacked":
        sent += setup.accumulation * combining
    return 8 * sent


def _shards_on(setup: Setup, place: str) -> int:
    return sum(
        p.padded_numel(setup.world_size) * p.dtype.itemsize
        for p in setup.model.parameters
        if stored_on(setup, p) == place
    )
