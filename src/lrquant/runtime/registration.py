"""When transformers comes to know the native format: at once, or once its quantizers are there."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_QUANTIZERS = "transformers.quantizers.auto"  # holds the tables that a format is entered in
_NATIVE = "lrquant.runtime.loading"  # enters the native one


def register_native() -> None:
    """Register the native format, without importing transformers where nobody has done so yet."""
    if _QUANTIZERS in sys.modules:
        importlib.import_module(_NATIVE)
    else:
        sys.meta_path.insert(0, _QuantizersFinder())


class _QuantizersFinder(MetaPathFinder):
    """Finds transformers' quantizers, and only them, as the other finders do."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _QUANTIZERS:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _QuantizersLoader(spec.loader, self)
        return spec


class _QuantizersLoader(Loader):
    """Runs the module as its own loader does, and registers the format behind it."""

    def __init__(self, loader: Loader, finder: _QuantizersFinder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self._finder]
        importlib.import_module(_NATIVE)
