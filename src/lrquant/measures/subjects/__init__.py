"""What is measured: a run, a checkpoint, a model."""
