"""The configuration: DeepSpeed's JSON with the section "zeroth_order", its checks, and the values
that follow from others.
"""
