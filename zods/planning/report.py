"""A plan as plain data and as a table. Called by `python -m zods.planning` and launch/sizing.py."""

from __future__ import annotations

from typing import Any

from zods.planning.memory import Bytes, memory, step_forwards, total
from zods.planning.setup import Setup
from zods.planning.traffic import traffic

GB = 10**9


def plan(setup: Setup, ranks_per_node: int) -> dict[str, Any]:
    """All figures of a setup, in bytes. Those of memory and traffic are of one rank.

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


def table(planned: dict[str, Any]) -> str:
    """Format a plan for people, in GB of 10^9 bytes."""
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
    if planned["gpu_memory"] is not None:
        verb = "fits" if planned["fits"] else "does not fit"
        lines.append(f"{verb} {planned['gpu_memory'] / GB:g} GB of device memory")
    lines += ["", "bytes per step and rank"]
    lines += [
        f"{kind.replace('_', ' '):<24}{size:>20,}"
        for kind, size in planned["traffic_per_step"].items()
    ]
    return "\n".join(lines)
