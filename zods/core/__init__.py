"""The pure mathematics of zeroth-order steps: directions, estimates, updates, points.

It knows neither ranks nor configuration objects nor modules.
"""
