"""What a run keeps and says: its folder, what it is of, blocks, results, progress."""
