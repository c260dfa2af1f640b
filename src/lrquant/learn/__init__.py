"""Everything with trainable parameters, and the block view that composes it."""
