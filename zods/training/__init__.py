"""The engine and what it is made of: state, records, checkpoints, resume, replicas."""
