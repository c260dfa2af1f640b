"""The command line."""

from lrquant.cli.entry import main, quantize_main, statistics_main

__all__ = ["main", "quantize_main", "statistics_main"]
