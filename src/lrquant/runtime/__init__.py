"""What a checkpoint in the native format runs on: its linears, its attention, its cache."""
