"""Pure tensor functions: quantizers and losses."""
