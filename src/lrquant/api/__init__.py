"""The package in Python: its functions, a finished run, and how both show themselves."""
