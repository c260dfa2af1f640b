"""Sources of a model's tensors, read one at a time: safetensors, torch files, GGUF, memory."""

from lrquant.model.sources.files import SafetensorsSource, TorchFileSource
from lrquant.model.sources.gguf_file import GGUFSource
from lrquant.model.sources.memory import ModuleSource
from lrquant.model.sources.protocol import WeightSource
from lrquant.model.sources.resolve import ModelFiles, resolve_model
from lrquant.model.sources.skeleton import SkeletonSource, open_source

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
