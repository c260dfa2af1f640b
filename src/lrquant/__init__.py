"""Post-training quantization of large language models with LRQuant and LRQuant+."""

from lrquant.cli.starting import starting

with starting():
    import lrquant.runtime.loading  # noqa: F401  transformers finds the native format by it
    from lrquant.config.config import Config
    from lrquant.config.scheme import Scheme
    from lrquant.errors import LRQuantError
    from lrquant.pipeline import Run, collect_statistics, evaluate, quantize
    from lrquant.runtime.cache import QuantizedCache
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
