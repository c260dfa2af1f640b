"""Subjects of measures: a run, a checkpoint, a model."""
