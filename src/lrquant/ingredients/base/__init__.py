"""What ingredients are told of a block, and where they leave what they fold."""
