"""Support code that knows tensors but no network: loading, operators, checkpoints, random numbers."""
