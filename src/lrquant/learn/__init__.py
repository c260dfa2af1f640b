"""Learning: the steps of a block, the blocks of a model, what came of it."""
