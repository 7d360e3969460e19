"""A count of the bytes that ZeRO-3 gathers, where DeepSpeed calls torch."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.comm import comm as deepspeed_comm


class GatherCounter:
    """Counts the bytes of DeepSpeed's all-gathers: whole parameters with their padding."""

    def __init__(self) -> None:
        self.total = 0
        # DeepSpeed has kept a reference to torch's function since its start
        backend = deepspeed_comm.cdb
        into_tensor = backend.all_gather_function

        def counted(output_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.total += output_tensor.nbytes
            return into_tensor(output_tensor, *args, **kwargs)

        def uncounted(*_: Any, **__: Any) -> Any:
            raise AssertionError("DeepSpeed gathers by another way than the one counted")

        backend.all_gather_function = counted
        backend.all_gather = backend.all_gather_base = backend.all_gather_coalesced = uncounted
