"""Other libraries' training loops with an engine of zods. Each library has one module."""
