"""Examples: which rank sees which when, what a batch is, and the losses of a model on it."""
