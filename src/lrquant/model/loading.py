"""A model by its path or hub name, out of a GGUF file, or from memory."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lrquant.architectures import Architecture, architecture_of
from lrquant.errors import LRQuantError
from lrquant.model.declared import require_declared
from lrquant.model.model import Model
from lrquant.model.reading import (
    Processor,
    read_config,
    read_generation,
    read_processor,
    read_tokenizer,
)
from lrquant.model.skeleton import build_skeleton
from lrquant.model.sources import ModuleSource, open_source, resolve_model
from lrquant.model.sources.kinds import (
    quantized_by,
    require_floating_point,
    require_tokenizer_files,
)
from lrquant.model.sources.skeleton import require_floating_weights

logger = logging.getLogger("lrquant")


def load_model(name: str, cache_dir: Path | None = None) -> Model:
    """A local folder, hub name or GGUF file as a `Model`; everything is checked, little is read."""
    if not name:
        raise LRQuantError("no model given: use --model with a local path, hub name or GGUF file")
    files = resolve_model(name, cache_dir)
    if files.gguf_file is None:
        require_floating_point(name, files.folder)
    config = read_config(files.folder, files.gguf_file)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # of weights that are unpacked: they are so no more
    architecture = architecture_of(config)
    tokenizer = None
    if not architecture.reads_pixels:
        if files.gguf_file is None:
            require_tokenizer_files(name, files.folder)
        tokenizer = read_tokenizer(files.folder, files.gguf_file)
    skeleton = build_skeleton(config, architecture)
    source = open_source(files, skeleton)
    if source.unpacked_from():
        logger.warning(
            "model %s: its weights are unpacked from %s; full precision is that of these here",
            *(name, source.unpacked_from()),
        )
    require_declared(skeleton, architecture)
    return Model(
        name,
        skeleton,
        tokenizer,
        source,
        architecture,
        None if files.gguf_file else files.folder,
        load_processor(files.folder, architecture),
        None if files.gguf_file else read_generation(files.folder),
    )


def from_module(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    processor: Processor | None = None,
) -> Model:
    """An in-memory transformers model; its weights are read and never changed."""
    architecture = architecture_of(module.config)
    _require_plain(module)
    skeleton = build_skeleton(module.config, architecture)
    name = module.config.name_or_path or type(module).__name__
    require_declared(skeleton, architecture)
    if tokenizer is None:
        tokenizer = getattr(processor, "tokenizer", None)
    generation = getattr(module, "generation_config", None)
    source = ModuleSource(module)
    _require_own_weights(source, skeleton)
    return Model(name, skeleton, tokenizer, source, architecture, None, processor, generation)


def _require_plain(module: PreTrainedModel) -> None:
    """Refuse a module that is quantised."""
    where = quantized_by(module.config.to_dict())
    if where is not None:
        raise LRQuantError(
            f"{type(module).__name__} in memory: already quantised ({where}); start from the "
            "floating-point model"
        )


def _require_own_weights(source: ModuleSource, skeleton: PreTrainedModel) -> None:
    """Refuse a module whose linears are wrapped or replaced, or that has more than its config says.

    Adapters, for example, or a bias that would be lost.
    """
    wanted = skeleton.state_dict()
    missing = sorted(wanted.keys() - source.names())
    adapters = [name for name in sorted(source.names()) if ".lora_" in name]
    if missing or adapters:
        raise LRQuantError(
            f"{source.origin}: {(adapters or ['lacks ' + missing[0]])[0]}: its linears were "
            "replaced or have adapters; merge them first (peft: merge_and_unload)"
        )
    left_over = sorted(source.names() - wanted.keys())
    if left_over:
        raise LRQuantError(
            f"{source.origin}: {left_over[0]}: a model of its config has no such tensor; remove "
            "it, or change the config to one that has it"
        )
    require_floating_weights(source, wanted)


def load_processor(folder: Path, architecture: Architecture) -> Processor | None:
    """What makes pictures into a model's inputs, or None where there is none to be had."""
    if architecture.tower is None and not architecture.reads_pixels:
        return None
    loader = AutoImageProcessor if architecture.reads_pixels else AutoProcessor
    try:
        return read_processor(folder, loader)
    except LRQuantError as error:
        logger.warning("no processor for pictures can be read: %s", error)
        return None
