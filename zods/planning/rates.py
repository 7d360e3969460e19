"""How fast the parts of a step are: data sheets of GPUs, a measurement, or figures of the user."""

from __future__ import annotations

from dataclasses import dataclass

from zods.planning.setup import Setup

# Peak dense bf16 and float32 operations per second, bytes per second of memory, and bytes of memory.
# Source: NVIDIA's data sheets of the SXM forms (L4, L40S, A10: PCIe).
GPUS = {
    "A10": (125e12, 31e12, 600e9, 24_000_000_000),
    "L4": (121e12, 30e12, 300e9, 24_000_000_000),
    "L40S": (362e12, 91e12, 864e9, 48_000_000_000),
    "A100": (312e12, 19.5e12, 2039e9, 80_000_000_000),
    "H100": (989e12, 67e12, 3350e9, 80_000_000_000),
    "H200": (989e12, 67e12, 4800e9, 141_000_000_000),
}
# Share of the peak that a transformer's forward reaches. Assumed; published trainings report 0.35 to
# 0.55 (Chowdhery et al. 2022, arXiv:2204.02311, table 3). `--calibrate` measures it.
UTILISATION = 0.4
# Share of the peak bandwidth that a sweep over memory reaches. Assumed.
SWEEP_UTILISATION = 0.7
# Operations of a direction's number: ten rounds of Philox for four numbers, and their transform.
OPERATIONS_PER_NUMBER = 64


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of one rank, per second, and latencies in seconds.

    Attributes:
        flops: floating-point operations of a forward.
        memory: bytes of the device's memory, in a sweep over it.
        numbers: numbers of a Gaussian or Rademacher direction that are made.
        node_link: bytes that a rank receives from ranks of its node.
        link: bytes that a node receives from other nodes, shared by its ranks.
        latency: of one collective operation.
        host_link: bytes between a device and host memory, each way.
        nvme_read, nvme_write: bytes of a rank's drive.
        overlaps: whether loads and gathers go on during the forward. On a CPU they do not.
    """

    flops: float
    memory: float
    numbers: float
    node_link: float = 300e9
    link: float = 25e9
    latency: float = 20e-6
    host_link: float = 25e9
    nvme_read: float = 5e9
    nvme_write: float = 2e9
    overlaps: bool = True

    def gathering(self, setup: Setup, ranks_per_node: int) -> float:
        """Bytes per second at which a rank receives whole parameters.

        A ring over all ranks passes every byte of a gather once through each node's link. So the
        ranks of a node wait for the same bytes, and the slower of the two links bounds them.
        """
        return min(
            self.node_link, self.link if setup.world_size > ranks_per_node else self.node_link
        )


def rates_of_gpu(name: str, *, bf16: bool, **others: float) -> Rates:
    """Rates from a GPU's data sheet. name: a key of GPUS. others: fields of `Rates` that are given."""
    of_bf16, of_float, memory, _ = GPUS[name]
    of_sheet = {
        "flops": UTILISATION * (of_bf16 if bf16 else of_float),
        "memory": SWEEP_UTILISATION * memory,
        "numbers": of_float / OPERATIONS_PER_NUMBER,
    }
    return Rates(**{**of_sheet, **others})  # type: ignore[arg-type]
