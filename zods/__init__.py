"""Zeroth-order fine-tuning of large language models on DeepSpeed ZeRO-3.

The names in `__all__` are imported when they are first used, so that `zods.minimize` and
`zods.trajectory` work without importing DeepSpeed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zods.black_box.minimize import minimize
    from zods.selection.loaders import select, weighted_loss
    from zods.training.initialize import initialize

__version__ = "0.2.0"
__all__ = ["__version__", "initialize", "minimize", "select", "weighted_loss"]

_MODULES = {
    "initialize": "zods.training.initialize",
    "minimize": "zods.black_box.minimize",
    "select": "zods.selection.loaders",
    "weighted_loss": "zods.selection.loaders",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
