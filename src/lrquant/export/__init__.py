"""Formats on disk: one file each."""
