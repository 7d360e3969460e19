"""The trajectory log: base weights and a list of terms determine the fine-tuned weights.

`python -m zods.trajectory` is the command line for logs.
"""
