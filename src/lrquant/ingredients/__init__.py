"""Ingredients: all that can be learned of a block, one file each."""
