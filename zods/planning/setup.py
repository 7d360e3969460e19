"""What is to be planned: a model, a configuration, a number of ranks; and the points of its steps."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from zods.config.auto_values import hidden_size_of, resolve_model_auto, resolve_offload_buffers
from zods.config.deepspeed_json import RunConfig, read_config
from zods.planning.model_shape import ModelShape


@dataclass(frozen=True)
class Setup:
    """A zeroth-order run under ZeRO-3.

    length: tokens of an example. on_gpu: whether ranks have a GPU. gpu_memory: its bytes, for the
    number of points of one forward; None: all points of a step fit one forward.
    """

    model: ModelShape
    config: RunConfig
    zero: DeepSpeedZeroConfig
    world_size: int
    length: int
    on_gpu: bool
    gpu_memory: int | None

    @property
    def aio(self) -> dict[str, Any]:
        """DeepSpeed's section "aio", with its defaults."""
        return {**AIO_DEFAULT_DICT, **self.config.deepspeed.get("aio", {})}

    @property
    def offload(self) -> str:
        """Where the parameters are stored: "none" (on the device), "cpu" or "nvme"."""
        offload = self.zero.offload_param
        return "none" if offload is None else str(offload.device)

    @property
    def form(self) -> str:
        """The form of evaluation. "auto" counts as "stacked", which most models fit."""
        asked = self.config.zeroth_order.evaluation
        return "stacked" if asked == "auto" else asked

    @property
    def micro_batch(self) -> int:
        """Examples of a micro-batch of one rank."""
        return self.config.deepspeed["train_micro_batch_size_per_gpu"]

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return self.config.deepspeed["gradient_accumulation_steps"]

    @property
    def pairs(self) -> int:
        """Pairs of points of each group of examples; see `zods.training.step_points`."""
        zo = self.config.zeroth_order
        return zo.num_directions * (2 if zo.is_svrg else 1)

    @property
    def anchor_pairs(self) -> int:
        """The part of `pairs` whose center is the anchor."""
        zo = self.config.zeroth_order
        return zo.num_directions if zo.is_svrg else 0

    @property
    def examples_of_group(self) -> int:
        """Examples of a step that share directions."""
        asked = self.config.zeroth_order.examples_per_direction
        return self.config.deepspeed["train_batch_size"] if asked == "all" else int(asked)

    def groups_of(self, rank: int, micro: int) -> range:
        """The groups of examples with directions of their own in a rank's micro-batch.

        Each rank has a run of consecutive examples; see `zods.core.example_groups`.
        """
        first = (micro * self.world_size + rank) * self.micro_batch
        size = self.examples_of_group
        return range(first // size, (first + self.micro_batch - 1) // size + 1)

    @functools.cached_property
    def most_groups(self) -> int:
        """The largest number of groups in a micro-batch of any rank."""
        return max(
            len(self.groups_of(rank, micro))
            for rank in range(self.world_size)
            for micro in range(self.accumulation)
        )

    @property
    def num_groups(self) -> int:
        """The groups of examples with directions of their own in a step, over all ranks."""
        return -(-self.config.deepspeed["train_batch_size"] // self.examples_of_group)

    @property
    def rows_of_point(self) -> int:
        """The most rows of a micro-batch that are evaluated at one point."""
        return -(-self.micro_batch // self.most_groups)


def read_setup(
    model: ModelShape,
    source: str | Path | Mapping[str, Any],
    *,
    world_size: int,
    length: int,
    on_gpu: bool = True,
    gpu_memory: int | None = None,
) -> Setup:
    """Read a configuration as a run on `world_size` ranks does, with all "auto" resolved.

    source: a DeepSpeed JSON with a section "zeroth_order". Raises ValueError, with one line for each
    mistake, and where the stage of ZeRO is not 3 or the model has another dtype than the run.
    """
    config = read_config(source, world_size)
    if config.zero_stage != 3:
        raise ValueError(
            f"zero_optimization.stage: found {config.zero_stage}; memory is planned for stage 3."
        )
    dtype = torch.bfloat16 if config.deepspeed.get("bf16", {}).get("enabled") else torch.float32
    if model.dtype != dtype:
        raise ValueError(f"bf16.enabled: the run is in {dtype}, the model given in {model.dtype}.")
    resolve_model_auto(config.deepspeed, hidden_size_of(model.config), overlaps=on_gpu)
    resolve_offload_buffers(config.deepspeed, (p.numel for p in model.parameters), world_size)
    zero = DeepSpeedZeroConfig(**config.deepspeed["zero_optimization"])
    return Setup(model, config, zero, world_size, length, on_gpu, gpu_memory)
