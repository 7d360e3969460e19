"""Zeroth-order fine-tuning of large language models on DeepSpeed ZeRO-3."""

from zods.initialization import initialize
from zods.selection import select, weighted_loss

__version__ = "0.1.0"
__all__ = ["__version__", "initialize", "select", "weighted_loss"]
