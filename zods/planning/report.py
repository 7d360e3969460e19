"""A plan as plain data and as a table. Called by `zods.plan` and launch/sizing.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zods.files import atomic_write
from zods.planning.first_order import FirstOrder
from zods.planning.memory import Bytes, memory, step_forwards, total
from zods.planning.setup import Setup
from zods.planning.step_time import MEASURED, StepTime
from zods.planning.traffic import traffic

GB = 10**9
ADVICE = {  # what shortens a step, by its longest phase
    "forwards": "more GPUs, or LoRA adapters in the last blocks only",
    "gathers": "a larger micro-batch (gathers do not grow with it), a faster --link, or replicas of "
    "fewer nodes each, between which only scalars travel",
    "host link": "parameters on the GPUs (more of them), or a larger micro-batch",
    "NVMe": "more host memory for offload_param cpu, a larger micro-batch, or faster drives",
    "update": "a larger examples_per_direction, or low-rank directions",
    "scalars": "a larger batch per step, or a faster network",
    "between replicas": "a larger batch per step of each replica: the delay does not grow with it",
    "refresh": "a larger anchor_interval, or anchor_examples",
    MEASURED: "see the phases of a plan without --calibrate",
}


def plan(setup: Setup, ranks_per_node: int) -> dict[str, Any]:
    """Memory and traffic of a setup, in bytes, of one rank.

    per_node: of the ranks of a node together.
    """
    kinds = memory(setup)
    whole = total(list(kinds.values()))
    return {
        "model": {
            "name": setup.model.name,
            "parameters": setup.model.numel,
            **{f"{kind}_parameters": n for kind, n in setup.model.numel_by_kind().items()},
            "bytes": setup.model.bytes,
        },
        "ranks": setup.world_size,
        "micro_batch": setup.micro_batch,
        "gradient_accumulation_steps": setup.accumulation,
        "evaluation": setup.form,
        "forwards": step_forwards(setup)._asdict(),
        "memory": {
            **{kind: amount._asdict() for kind, amount in kinds.items()},
            "total": whole._asdict(),
        },
        "per_node": Bytes(*(ranks_per_node * size for size in whole))._asdict(),
        "gpu_memory": setup.gpu_memory,
        "fits": setup.gpu_memory is None or whole.device <= setup.gpu_memory,
        "traffic_per_step": traffic(setup)._asdict(),
    }


def with_times(
    planned: dict[str, Any],
    time: StepTime,
    others: dict[str, FirstOrder],
    *,
    tokens_per_step: int,
    tokens: int | None,
) -> dict[str, Any]:
    """A plan with the time of a step, of a budget of tokens, and first-order training beside it."""
    steps = None if tokens is None else -(-tokens // tokens_per_step)
    return planned | {
        "step_seconds": {**time.phases, "total": time.total},
        "bound": time.bound,
        "change_first": ADVICE[time.bound],
        "tokens_per_step": tokens_per_step,
        "steps": steps,
        "seconds": None if steps is None else steps * time.total,
        "first_order": {
            name: {"device_bytes": of.device_bytes, "step_seconds": of.time.total}
            for name, of in others.items()
        },
    }


def table(planned: dict[str, Any]) -> str:
    """Format a plan for people, in GB of 10^9 bytes."""
    return "\n".join([*_memory_lines(planned), "", *_time_lines(planned)])


def _memory_lines(planned: dict[str, Any]) -> list[str]:
    model, forwards = planned["model"], planned["forwards"]
    lines = [
        f"{model['name']}: {model['parameters'] / GB:.2f} billion parameters, "
        f"{model['bytes'] / GB:.1f} GB, on {planned['ranks']} ranks",
        f"a step: {forwards['number']} forwards of {forwards['rows']} rows, "
        f"{planned['evaluation']}",
        "",
        f"{'GB per rank':<24}{'device':>10}{'host':>10}{'NVMe':>10}",
    ]
    for kind, amount in planned["memory"].items():
        sizes = (amount[place] / GB for place in ("device", "host", "nvme"))
        lines.append(f"{kind:<24}" + "".join(f"{size:>10.3f}" for size in sizes))
    node = planned["per_node"]
    lines += [
        "",
        f"per node: {node['host'] / GB:.1f} GB of host memory ({node['pinned'] / GB:.1f} GB pinned, "
        f"{node['locked'] / GB:.1f} GB locked by mlock), {node['nvme'] / GB:.1f} GB on NVMe",
    ]
    lines += ["", "bytes per step and rank"]
    lines += [
        f"{kind.replace('_', ' '):<24}{size:>20,}"
        for kind, size in planned["traffic_per_step"].items()
    ]
    return lines


def _time_lines(planned: dict[str, Any]) -> list[str]:
    times = planned["step_seconds"]
    lines = [f"{'seconds per step':<24}"]
    lines += [f"{name:<24}{seconds:>20.3g}" for name, seconds in times.items() if seconds]
    lines.append(f"{planned['bound']} bound a step; change first: {planned['change_first']}")
    if planned["steps"] is not None:
        lines.append(
            f"{planned['steps']:,} steps of {planned['tokens_per_step']:,} tokens: "
            f"{planned['seconds'] / 3600:.3g} hours"
        )
    lines += ["", f"{'first-order, same batch':<24}{'GB per rank':>12}{'s per step':>12}"]
    lines += [
        f"{name:<24}{of['device_bytes'] / GB:>12.3f}{of['step_seconds']:>12.3g}"
        for name, of in planned["first_order"].items()
    ]
    return lines


def plot_nodes(times: Mapping[int, StepTime], path: Path) -> None:
    """Plot the time of a step and its phases against the number of nodes, as PNG.

    times: by number of nodes. Needs matplotlib (the extra `report`).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    nodes = list(times)
    axes.plot(nodes, [of.total for of in times.values()], color="black", label="step")
    for name in dict.fromkeys(name for of in times.values() for name in of.phases):
        seconds = [of.phases.get(name, 0.0) for of in times.values()]
        if any(seconds):
            axes.plot(nodes, seconds, linestyle="--", label=name)
    axes.set(xscale="log", yscale="log", xlabel="nodes", ylabel="seconds per step")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
