"""lrquant check: what can be known of a run before any hour is spent."""
