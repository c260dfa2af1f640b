"""Post-training quantization of large language models with LRQuant and LRQuant+."""

from lrquant.config import Config
from lrquant.errors import LRQuantError
from lrquant.pipeline import Run, collect_statistics, evaluate, quantize
from lrquant.scheme import Scheme
from lrquant.version import __version__

__all__ = [
    "Config",
    "LRQuantError",
    "Run",
    "Scheme",
    "__version__",
    "collect_statistics",
    "evaluate",
    "quantize",
]
