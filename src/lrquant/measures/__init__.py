"""Measures of a model's quality."""
