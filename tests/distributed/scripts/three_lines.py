"""The three-line loop on ZeRO-3, with every collective of torch counted. For test_launcher.py.

Usage: three_lines.py OUTPUT_FOLDER

Each rank writes its counts to OUTPUT_FOLDER/rank<N>.json.
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed import distributed_c10d

SENT = {"zods": {}, "deepspeed": {}, "other": {}}  # (calls, bytes) by owner, then by collective
counting = False


def bytes_sent(name, args, kwargs):
    """The bytes that this rank sends in a collective.

    They are counted as zods counts: the rank's own input, once per other rank.
    """
    world_size = torch.distributed.get_world_size()
    values = [*args, *kwargs.values()]
    flat = [
        item
        for value in values
        for item in (value if isinstance(value, (list, tuple)) else [value])
    ]
    tensors = [item for item in flat if isinstance(item, torch.Tensor)]
    # The output comes before the input. The input is the smallest of the tensors.
    if name.startswith("all_gather"):
        tensors = [min(tensors, key=lambda t: t.numel())] if tensors else []
    return sum(t.nbytes for t in tensors) * (world_size - 1)


def owner():
    """The package whose code asked for a collective.

    It is that of the nearest frame of zods or DeepSpeed. All that zods/comm asks for belongs to
    zods, even if DeepSpeed's functions make the call.
    """
    frame, found = sys._getframe(2), None
    while frame is not None:
        path = frame.f_code.co_filename.replace(os.sep, "/")
        if "/zods/comm/" in path:
            return "zods"
        if found is None:
            found = "zods" if "/zods/" in path and "/site-packages/" not in path else found
            found = "deepspeed" if "/site-packages/deepspeed/" in path else found
        frame = frame.f_back
    return found or "other"


def count(module, name):
    function = getattr(module, name)

    @functools.wraps(function)
    def counted(*args, **kwargs):
        global counting
        # This call is a part of one that is counted already: some collectives call others.
        if counting or name.endswith(("_object", "_object_list")):
            return function(*args, **kwargs)
        entry = SENT[owner()].setdefault(name, [0, 0])
        entry[0] += 1
        entry[1] += bytes_sent(name, args, kwargs)
        counting = True
        try:
            return function(*args, **kwargs)
        finally:
            counting = False

    setattr(module, name, counted)


COLLECTIVES = [
    name
    for name in dir(distributed_c10d)
    if name.startswith(
        (
            "all_gather",
            "all_reduce",
            "all_to_all",
            "broadcast",
            "gather",
            "reduce",
            "scatter",
            "send",
        )
    )
    or name in ("isend", "recv", "irecv", "barrier", "_all_gather_base", "_reduce_scatter_base")
    if callable(getattr(distributed_c10d, name))
    and not isinstance(getattr(distributed_c10d, name), type)
]
for collective in COLLECTIVES:  # before another module imports their names
    count(distributed_c10d, collective)
    if hasattr(torch.distributed, collective):
        setattr(torch.distributed, collective, getattr(distributed_c10d, collective))

import zods
from tests.distributed.models import configuration, opt_data, tiny_opt
from zods.comm.process import end_process


def total(who):
    return sum(size for _, size in SENT[who].values())


def main(output):
    found = {}
    for name, anchor in (
        ("terms", {"point": "terms", "gradient": "nvme"}),
        ("stored", {"point": "cpu", "gradient": "cpu"}),
    ):
        config = configuration(
            8,
            nvme_path=output,
            top={"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
            method="mezo_svrg",
            lr=1e-3,
            eps=1e-2,
            anchor_interval=3,
            num_directions=2,
            anchor_directions=4,
            anchor_split=False,
            agreement_interval=2,
            anchor=anchor,
        )
        engine, _, loader, _ = zods.initialize(
            model=tiny_opt(), config=config, training_data=opt_data(32)
        )
        steps = []
        before = (
            total("zods"),
            total("deepspeed"),
            engine.comm.scalar_bytes,
            engine.comm.gather_bytes,
        )
        for batch in loader:
            loss = engine(batch)
            engine.backward(loss)
            engine.step()
            if engine.micro_steps % 2 == 0:
                now = (
                    total("zods"),
                    total("deepspeed"),
                    engine.comm.scalar_bytes,
                    engine.comm.gather_bytes,
                )
                steps.append(
                    [b - a for a, b in zip(before, now, strict=True)]
                    + [engine.last_step.scalar_bytes]
                )
                before = now
        found[name] = {
            "steps": steps,
            "global_steps": engine.global_steps,
            "loss": engine.last_step.loss,
        }
    found["sent"] = SENT
    # a tied parameter is gathered by each module that uses it
    held = {id(p.param): p.padded_numel for p in engine.sharded_parameters}
    uses = [
        held[id(p)] for module in engine.module.modules() for p in module.parameters(recurse=False)
    ]
    found["anchor_numel"] = sum(uses)
    (output / f"rank{engine.global_rank}.json").write_text(json.dumps(found))
    end_process(0)


if __name__ == "__main__":
    main(Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))))
