"""Check for packages that only some features need, before anything is loaded.

The extras in pyproject.toml install these packages.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

PLOTS = ("matplotlib", "zods[report]")  # (package, what to install)
LORA = ("peft", "zods[lora]")
MONITORS = {  # by section of the DeepSpeed JSON
    "tensorboard": ("tensorboard", "zods[monitor]"),
    "wandb": ("wandb", "wandb"),
    "comet": ("comet_ml", "comet_ml"),
}


def check_packages(
    config: Mapping[str, Any], *, plot: bool = False, new_adapter: str | None = None
) -> None:
    """Raise ValueError that lists the requested features whose package is not installed.

    config: the DeepSpeed JSON. plot: whether the run draws curves. new_adapter: the option that
    asks for adapters. DeepSpeed imports a monitor's package on rank 0 only. Without this check, a missing
    package would leave the other ranks waiting.
    """
    asked = {
        f"{name}.enabled": needed
        for name, needed in MONITORS.items()
        if _is_enabled(config.get(name))
    }
    if plot:
        asked["--plot"] = PLOTS
    if new_adapter is not None:
        asked[new_adapter] = LORA
    missing = filter(None, (missing_package(what, *needed) for what, needed in asked.items()))
    if text := " ".join(missing):
        raise ValueError(text)


def missing_package(what: str, package: str, install: str) -> str:
    """The message where a package that `what` needs is not installed; empty where it is.

    install: what pip installs it by.
    """
    if importlib.util.find_spec(package) is not None:
        return ""
    return (
        f"{what}: needs the package {package}, which is not installed. Install it (pip install "
        f"'{install}') or leave {what} out."
    )


def _is_enabled(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get("enabled") is True
