"""Small sub-batches that stand for large ones: facility location over features of the examples' gradients, by source."""

from zods.selection.loaders import select, weighted_loss

__all__ = ["select", "weighted_loss"]
