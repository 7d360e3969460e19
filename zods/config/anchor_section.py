"""The section "anchor" of the configuration: where the anchor of MeZO-SVRG is stored."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import model_validator

from zods.config.section import Count, Section, Text

Storage = Literal["device", "cpu", "nvme", "terms"]
STORAGES: tuple[str, ...] = get_args(Storage)


class AnchorConfig(Section):
    """The storage of the anchor of MeZO-SVRG.

    point: the parameters at the last refresh. gradient: the full-batch estimate at that point.
    Each is a copy on the `device`, a copy on the `cpu`, or a copy in `nvme` files. With `terms` it
    is recomputed from its terms when it is needed, and takes no memory.
    """

    point: Storage = "cpu"
    gradient: Storage = "cpu"
    nvme_path: Text | None = None  # a folder on the drive; needed for nvme
    buffer_count: Count = 3  # nvme: buffers for the point and the gradient; 2 or more overlap I/O
    buffer_size: Count = 1 << 22  # nvme: elements per buffer
    pin_memory: bool = True  # cpu: use page-locked memory where there is a GPU

    def storages(self) -> tuple[str, str]:
        return (self.point, self.gradient)

    @model_validator(mode="after")
    def _check_nvme_path(self) -> Self:
        if "nvme" in self.storages() and not self.nvme_path:
            raise ValueError(
                "nvme_path: missing; point or gradient is nvme. Give a folder on the drive."
            )
        if self.nvme_path is not None and "nvme" not in self.storages():
            raise ValueError(
                f"nvme_path: given, but neither point ({self.point}) nor gradient "
                f"({self.gradient}) is nvme. Set one of them to nvme, or remove the path."
            )
        return self
