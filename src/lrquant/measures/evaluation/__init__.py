"""Measuring: every measure that is asked for, on every variant of a subject."""
