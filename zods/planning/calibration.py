"""The time of a step on this machine, measured with a few blocks of the model.

A transformer's step takes a part that does not depend on its depth (embedding, head, losses,
exchange) and the same time for each block. Real steps of the planned configuration, with random
weights and at two depths, give both. Called by `zods.plan --calibrate`, on each rank of a launcher,
or alone.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from deepspeed.accelerator import get_accelerator

from zods.comm.communicator import Communicator
from zods.planning.activations import forward_peak
from zods.planning.memory import step_forwards
from zods.planning.rates import Rates
from zods.planning.setup import Setup
from zods.training.initialize import initialize

DEPTHS = (1, 3)  # blocks
# Steps before the first one that is timed: step 0 chooses the form of evaluation, 1, 2 and 4 check it.
WARM_UP = 5


def measured_step_time(
    setup: Setup, config: Mapping[str, Any], comm: Communicator, *, num_steps: int = 5
) -> float:
    """Seconds of a step of the whole model, from measurements at `DEPTHS`.

    config: the DeepSpeed JSON of `setup`, unread. comm: of the ranks that run. num_steps: timed steps
    at each depth, of which the median counts; the slowest rank decides. Collective. Raises
    ValueError where the model's configuration has no number of blocks.
    """
    depth = getattr(setup.model.config, "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise ValueError(
            f"--model {setup.model.name}: its configuration has no num_hidden_layers, by which "
            "--calibrate makes smaller models. Plan without --calibrate."
        )
    few, more = (min(blocks, depth) for blocks in DEPTHS)
    of_few = step_time_at(setup, config, few, comm, num_steps)
    if few == more:
        return of_few
    per_block = max(0.0, step_time_at(setup, config, more, comm, num_steps) - of_few) / (more - few)
    return of_few + per_block * (depth - few)


def step_time_at(
    setup: Setup, config: Mapping[str, Any], blocks: int, comm: Communicator, num_steps: int
) -> float:
    """Seconds of a step of the model with so many blocks and random weights. Collective."""
    shape = copy.deepcopy(setup.model.config)
    shape.num_hidden_layers = blocks
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=setup.model.dtype).eval()
    ids = torch.randint(
        0, shape.vocab_size, (setup.config.deepspeed["train_batch_size"], setup.length)
    )
    data: Any = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids
    ]
    # a given step size, which "auto" would have to measure first
    section = {**config["zeroth_order"], "lr": 1e-9}
    given = {**copy.deepcopy(dict(config)), "zeroth_order": section}
    engine = initialize(model=model, config=given, training_data=data)[0]
    times = []
    for number in range(WARM_UP + num_steps):
        began = time.perf_counter()
        engine.train_batch()
        if number >= WARM_UP:
            times.append(time.perf_counter() - began)
    engine.close()
    return comm.max_over_ranks(statistics.median(times))


def rates_of_step(setup: Setup, seconds: float, **links: float) -> Rates:
    """Rates of this machine, with all of a step's time counted as its forwards'.

    seconds: of a step. links: rates of `Rates` that are given.
    """
    forwards = step_forwards(setup)
    of_one = forward_peak(setup.model, forwards.rows, setup.length, on_gpu=setup.on_gpu).flops
    accelerator = get_accelerator()
    source = torch.empty(1 << 26, dtype=torch.uint8, device=accelerator.current_device_name())
    target = source.clone()
    accelerator.synchronize()
    began = time.perf_counter()
    for _ in range(4):
        target.copy_(source)
    accelerator.synchronize()
    memory = 8 * source.nbytes / (time.perf_counter() - began)
    return Rates(
        flops=forwards.number * of_one / seconds,
        memory=memory,
        numbers=memory,
        overlaps=setup.on_gpu,
        **links,
    )
