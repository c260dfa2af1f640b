"""Post-training quantization of large language models with LRQuant and LRQuant+."""

from lrquant.starting import starting

with starting():
    import lrquant.runtime.loading  # noqa: F401  transformers finds the native format by it
    from lrquant.config import Config
    from lrquant.errors import LRQuantError
    from lrquant.pipeline import Run, collect_statistics, evaluate, quantize
    from lrquant.runtime.cache import QuantizedCache
    from lrquant.scheme import Scheme
    from lrquant.version import __version__

__all__ = [
    "Config",
    "LRQuantError",
    "QuantizedCache",
    "Run",
    "Scheme",
    "__version__",
    "collect_statistics",
    "evaluate",
    "quantize",
]
