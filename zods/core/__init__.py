"""The pure mathematics of zeroth-order steps: directions, estimates, updates, points.

No ranks, no configuration, no modules.
"""
