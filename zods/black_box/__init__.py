"""Black-box minimisation of a function, without a model, DeepSpeed or gradients."""
