"""Zeroth-order fine-tuning of large language models on DeepSpeed ZeRO-3."""

from zods.initialization import initialize

__version__ = "0.1.0"
__all__ = ["__version__", "initialize"]
