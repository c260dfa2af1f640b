"""What is learned of a block: one file each."""
