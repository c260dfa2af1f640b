"""Grids: the values that a number may take, one file a kind."""
