"""This rank's shards of the parameters and of the anchor: access, updates, offload."""
