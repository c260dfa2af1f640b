"""Parts of `gpu_check.py`, and the shapes and steps that `roofline.py` counts."""
