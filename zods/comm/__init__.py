"""Communication between ranks, and how ranks start and stop.

Nothing else calls torch.distributed.
"""
