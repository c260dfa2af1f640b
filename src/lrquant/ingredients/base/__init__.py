"""The block as ingredients see it, and the folds that they leave in it."""
