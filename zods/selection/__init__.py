"""Small sub-batches that stand for large ones: facility location over features of the examples'
gradients, by source.
"""
