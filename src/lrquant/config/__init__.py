"""Settings: all that a user may say, schemes, presets."""
