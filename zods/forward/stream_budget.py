"""The number of points that one forward evaluates within a budget of memory.

`zods.forward.choose_form` and `zods.forward.generated_scores` measure how much one more point takes.
The evaluator owns the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepspeed.accelerator import get_accelerator

from zods.comm.communicator import Communicator


@dataclass(frozen=True)
class StreamBudget:
    """The memory for the points of one forward.

    micro_batch: examples per forward and rank. most_points: the largest number of points that are
    evaluated together. stream_memory_gb: the budget in GiB; None: half of the free memory.
    """

    comm: Communicator
    micro_batch: int
    most_points: int
    stream_memory_gb: float | None

    def fitting(self, needed: float, rows: int) -> int:
        """Return how many points fit one forward: an even number, the same on all ranks.

        needed: bytes for one more point of `rows` examples. Collective. Raises ValueError if not
        even a pair fits the configured budget.
        """
        needed *= self.micro_batch / rows
        given = self.stream_memory_gb
        shared_by = self.comm.world_size if self.comm.device.type == "cpu" else 1
        free = get_accelerator().available_memory() / 2 / shared_by
        found = self.comm.gather_scalars([needed, free if given is None else given * 2**30])
        needed, budget = max(row[0] for row in found), min(row[1] for row in found)
        if given is not None and budget < 2 * needed:
            raise ValueError(
                f"zeroth_order.stream_memory_gb: found {given}, but a pair of points takes "
                f"{2 * needed / 2**30:.3g} GiB with micro-batches of {self.micro_batch}. Give "
                "that much, a smaller micro-batch, or evaluation: sequential."
            )
        return 2 * min(max(1, int(budget / max(2 * needed, 1.0))), self.most_points // 2)
