"""Where a model's tensors come from, one at a time: safetensors, torch files, GGUF, or memory."""

from lrquant.sources.files import SafetensorsSource, TorchFileSource
from lrquant.sources.gguf_file import GGUFSource
from lrquant.sources.memory import ModuleSource
from lrquant.sources.protocol import WeightSource
from lrquant.sources.resolve import ModelFiles, resolve_model
from lrquant.sources.skeleton import SkeletonSource, open_source

__all__ = [
    "GGUFSource",
    "ModelFiles",
    "ModuleSource",
    "SafetensorsSource",
    "SkeletonSource",
    "TorchFileSource",
    "WeightSource",
    "open_source",
    "resolve_model",
]
