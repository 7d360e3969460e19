"""A configuration that fits a cluster, found by trying them from the fastest to the smallest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zods.planning.memory import Bytes, memory, total
from zods.planning.setup import Setup

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """gpus: of a node, one rank each. Memory in bytes: of a GPU, and of a node's host and drives.

    None: not bounded.
    """

    gpus: int
    nodes: int
    gpu_memory: int | None = None
    host_memory: int | None = None
    nvme: int | None = None

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes

    def shortages(self, setup: Setup) -> dict[str, tuple[int, int]]:
        """{what is too small: (bytes needed, bytes there are)}, of a GPU or of a node."""
        needed = total(list(memory(setup).values()))
        node = Bytes(*(self.gpus * size for size in needed))
        if not setup.on_gpu:  # a CPU's device memory is host memory
            node = node._replace(host=node.host + node.device)
        places = {
            "--gpu-memory": (needed.device, self.gpu_memory),
            "--host-memory": (node.host, self.host_memory),
            "--nvme": (node.nvme, self.nvme),
        }
        return {
            option: (size, limit)
            for option, (size, limit) in places.items()
            if limit is not None and size > limit
        }


def configuration(
    batch: int,
    *,
    dtype: str = "bf16",
    method: str = "mezo",
    offload: str = "none",
    anchor: str = "cpu",
    accumulation: int = 1,
    nvme_path: str = "/nvme{local_rank}",
) -> dict[str, Any]:
    """The DeepSpeed JSON of a plan, with defaults where a plan does not say otherwise.

    batch: examples of a micro-batch. nvme_path: by default that of a drive per GPU.
    """
    drive = {"nvme_path": nvme_path}
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    }
    if offload != "none":
        zero["offload_param"] = {"device": offload, **(drive if offload == "nvme" else {})}
    section: dict[str, Any] = {"method": method}
    if method == "mezo_svrg":
        stored = {"point": anchor, "gradient": anchor}
        section["anchor"] = stored | (drive if anchor == "nvme" else {})
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": zero,
        "zeroth_order": section,
    }


def propose(
    read: Callable[[dict[str, Any]], Setup],
    cluster: Cluster,
    batch: int,
    *,
    dtype: str,
    method: str,
    offloads: Sequence[str],
    anchors: Sequence[str],
    nvme_path: str,
) -> tuple[dict[str, Any], Setup]:
    """The first configuration that fits the cluster, and its setup.

    read: makes a setup of a configuration. batch: examples of a step and rank; smaller micro-batches
    accumulate to it. Raises ValueError with the smallest change that fits where none does.
    """
    nearest: tuple[float, dict[str, tuple[int, int]]] | None = None
    for offload, anchor, accumulation in _candidates(batch, method, offloads, anchors):
        config = configuration(
            batch // accumulation,
            dtype=dtype,
            method=method,
            offload=offload,
            anchor=anchor,
            accumulation=accumulation,
            nvme_path=nvme_path,
        )
        setup = read(config)
        shortages = cluster.shortages(setup)
        if not shortages:
            return config, setup
        # how many times what there is would be needed
        factor = max(needed / limit for needed, limit in shortages.values())
        if nearest is None or factor < nearest[0]:
            nearest = factor, shortages
    assert nearest is not None
    changes = " and ".join(
        f"{option} {-(-needed // GB)}GB instead of {limit / GB:g}GB"
        for option, (needed, limit) in nearest[1].items()
    )
    raise ValueError(
        f"no configuration of {cluster.nodes} nodes of {cluster.gpus} GPUs fits. The smallest change "
        f"that does: {changes}; or more --nodes."
    )


def _candidates(
    batch: int, method: str, offloads: Sequence[str], anchors: Sequence[str]
) -> Iterator[tuple[str, str, int]]:
    """(offload, anchor, micro-batches of a step), from the fastest to the smallest.

    Smaller micro-batches come before a slower place for the parameters: they cost gathers, which
    within a node are faster than the link to the host.
    """
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    for offload in offloads:
        for accumulation in divisors:
            for anchor in anchors if method == "mezo_svrg" else anchors[:1]:
                yield offload, anchor, accumulation
