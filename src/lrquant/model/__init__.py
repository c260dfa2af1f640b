"""Weights by name: out of a folder, the hub, a GGUF file or memory."""
