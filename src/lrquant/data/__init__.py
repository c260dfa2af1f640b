"""Texts, conversations and pictures, and the samples that they become."""
