"""The trajectory log: base weights and a list of terms are the fine-tuned weights.

`python -m zods.trajectory` works on logs.
"""
