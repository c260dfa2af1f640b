"""A model without its weights: parameters on the meta device, computed buffers real."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from lrquant.architectures import Architecture
from lrquant.architectures.depth import require_depth
from lrquant.errors import LRQuantError
from lrquant.model.reading import reading


def build_skeleton(config: PretrainedConfig, architecture: Architecture) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, computed buffers real."""
    require_depth(config)
    with reading(f"a {config.model_type!r}", Path("config.json")), torch.device("meta"):
        skeleton = _laid_out(config, architecture)
    _require_blocks(skeleton, architecture)
    with reading(f"a {config.model_type!r}", Path("config.json")):
        _compute_buffers(skeleton, skeleton)
    if architecture.tower is not None:
        # Now: in a first forward with stand-ins for blocks, the blocks would never get them.
        maybe_install_capturing_hooks(skeleton)
    skeleton.eval().requires_grad_(False)
    return skeleton


def _laid_out(config: PretrainedConfig, architecture: Architecture) -> PreTrainedModel:
    """With torch's attention, or where a family's soft caps, sinks or biases rule it out its own.

    Blocks run with the attention of this package in either case; masks are made for the one here.
    """
    make = partial(architecture.auto_class.from_config, config, trust_remote_code=False)
    try:
        model: PreTrainedModel = make(attn_implementation="sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        model = make(attn_implementation="eager")
    return model


_LARGEST_BUFFERS = 2**28  # values; those of a rotary embedding are some hundred


def _require_blocks(skeleton: PreTrainedModel, architecture: Architecture) -> None:
    """Refuse a model without blocks, or with computed buffers that no memory would hold."""
    try:
        blocks = len(getattr(skeleton.get_submodule(architecture.blocks), "_modules", ()))
    except AttributeError:
        blocks = 0
    saved = skeleton.state_dict().keys()
    sizes = [b.numel() for name, b in skeleton.named_buffers() if name not in saved]
    if not blocks or sum(sizes) > _LARGEST_BUFFERS:
        what = f"computed buffers of {sum(sizes)} values" if blocks else "no blocks"
        raise LRQuantError(
            f"config.json: a {skeleton.config.model_type!r} with {what}; get the file again"
        )


def _compute_buffers(module: nn.Module, owner: PreTrainedModel) -> None:
    """Buffers that no checkpoint holds, by the model of which the module is part."""
    if module._non_persistent_buffers_set:
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None:  # parameters beside it, an embedding's for one, stay on meta
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        owner._init_weights(module)
    for child in module.children():
        _compute_buffers(child, child if isinstance(child, PreTrainedModel) else owner)
    if isinstance(module, PreTrainedModel):
        module._init_weights(module)  # some models fill buffers of their blocks
