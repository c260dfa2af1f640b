"""lm-evaluation-harness: its tasks, their sets, their scores side by side."""
