"""One block: what enters it, its weights under what is learned, its run."""
