"""Training data: loaders, batches, digests of examples, and the loss of a model on a batch."""
