"""Post-training quantization of large language models with LRQuant and LRQuant+."""

from importlib import import_module
from typing import TYPE_CHECKING

from lrquant.runtime.registration import register_native
from lrquant.version import __version__

__all__ = [
    "Config",
    "LRQuantError",
    "QuantizedCache",
    "Run",
    "Scheme",
    "__version__",
    "check",
    "collect_statistics",
    "compare",
    "evaluate",
    "export",
    "inspect",
    "load",
    "quantize",
    "report",
]

if TYPE_CHECKING:
    from lrquant.api.functions import (
        check,
        compare,
        evaluate,
        export,
        inspect,
        load,
        quantize,
        report,
    )
    from lrquant.api.run import Run
    from lrquant.config.config import Config
    from lrquant.config.scheme import Scheme
    from lrquant.errors import LRQuantError
    from lrquant.pipeline import collect_statistics
    from lrquant.runtime.cache import QuantizedCache
else:
    _MODULES = {
        "Config": "lrquant.config.config",
        "LRQuantError": "lrquant.errors",
        "QuantizedCache": "lrquant.runtime.cache",
        "Run": "lrquant.api.run",
        "Scheme": "lrquant.config.scheme",
        "check": "lrquant.api.functions",
        "collect_statistics": "lrquant.pipeline",
        "compare": "lrquant.api.functions",
        "evaluate": "lrquant.api.functions",
        "export": "lrquant.api.functions",
        "inspect": "lrquant.api.functions",
        "load": "lrquant.api.functions",
        "quantize": "lrquant.api.functions",
        "report": "lrquant.api.functions",
    }

    def __getattr__(name: str) -> object:
        """A public name, imported when it is first asked for: torch takes seconds."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


register_native()
