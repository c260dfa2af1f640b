"""Every model type of transformers that writes text: a working declaration, or one clear line."""

from __future__ import annotations

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from lrquant.architectures import architecture_of, architectures
from lrquant.errors import LRQuantError
from lrquant.model.declared import require_declared
from lrquant.model.skeleton import build_skeleton

TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
NO_DEFAULT = {"gemma4_assistant"}  # transformers makes no configuration of it
NO_MODEL_OF_DEFAULTS = {  # nor a model of its default configuration, or none without timm
    *("gemma3n", "hunyuan_v1_dense", "hunyuan_v1_moe", "nemotron", "dots1", "lfm2_moe"),
}


def said_of(model_type: str) -> str:
    """The one line that refuses a model type in its default configuration, or nothing."""
    config = AutoConfig.for_model(model_type)
    try:
        family = architecture_of(config)
        skeleton = build_skeleton(config, family)
        require_declared(skeleton, family)
        assert all(parameter.is_meta for parameter in skeleton.parameters()), model_type
    except LRQuantError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("start", range(8))
def test_each_is_declared_or_refused_in_one_line(start):
    for model_type in TYPES[start::8]:
        if model_type in NO_DEFAULT:
            continue
        said = said_of(model_type)
        assert "\n" not in said and len(said) < 500, model_type
        if model_type not in architectures():
            assert " is not declared; " in said, model_type
        elif model_type not in NO_MODEL_OF_DEFAULTS:
            assert not said or architectures()[model_type].refusal(
                AutoConfig.for_model(model_type)
            ), (model_type, said)
