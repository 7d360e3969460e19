"""What ranks send each other and wait for, how they start and how they stop.

Nothing else calls torch.distributed.
"""
