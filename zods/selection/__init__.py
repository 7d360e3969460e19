"""Small sub-batches that represent large candidate batches.

Examples are chosen source by source, by facility location over features of their gradients.
"""
