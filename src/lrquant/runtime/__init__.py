"""The runtime of checkpoints in the native format: their linears, their attention, their cache."""
