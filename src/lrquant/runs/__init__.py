"""A run's folder, and all that it keeps and says: what it is of, blocks, results, progress."""
