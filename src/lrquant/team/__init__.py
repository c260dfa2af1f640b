"""Processes that do one command together: what they say to each other, and how they are started."""
