"""The configuration: DeepSpeed's JSON with the section "zeroth_order".

This package reads the JSON, checks it, and fills in the values that follow from other values.
"""
