"""Checkpoints on disk: one file a format."""
