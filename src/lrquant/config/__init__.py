"""What a user may say: every setting, schemes, presets."""
