"""Settings of every family, changed one at a time: its sites hold, or it is refused in one line."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
from transformers import AutoModelForCausalLM, PretrainedConfig

from lrquant.architectures import architecture_of
from lrquant.errors import LRQuantError
from lrquant.model.loading import from_module

EQUAL = 1e-5  # relative change of the logits in float64; some families compute in float32 inside
NOT_OF_BLOCKS = {"use_cache", "return_dict", "output_hidden_states", "output_attentions"}
NOT_OF_BLOCKS |= {"tie_word_embeddings", "is_encoder_decoder", "add_cross_attention", "is_decoder"}
NOT_OF_BLOCKS |= {"output_router_logits"}
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


def changes(config: PretrainedConfig) -> Iterator[tuple[str, object]]:
    """Each switch turned, another activation, soft caps, a half of each head without RoPE."""
    for name, value in config.to_dict().items():
        if isinstance(value, bool) and name not in NOT_OF_BLOCKS:
            yield name, not value
        elif name in ACTIVATIONS:
            yield from ((name, "relu"), (name, "gelu"))
        elif "softcap" in name:
            yield name, 5.0
    rotary = getattr(config, "rope_parameters", None)
    if rotary:
        by_type = {kind: part for kind, part in rotary.items() if isinstance(part, dict)}
        part = {"partial_rotary_factor": 0.5}
        turned = {kind: each | part for kind, each in by_type.items()} or {**rotary, **part}
        yield "rope_parameters", turned


def changed(config: PretrainedConfig, name: str, value: object) -> PretrainedConfig:
    return type(config)(**{**copy.deepcopy(config.to_dict()), name: value})


@pytest.fixture
def moved(randomize_, change_of_logits, token_ids):
    """moved(config) -> change of a random model's logits when all its sites are folded."""

    def of(config: PretrainedConfig) -> float:
        config._experts_implementation = "eager"  # grouped products do not take float64
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = randomize_(model).double().eval().requires_grad_(False)
        family = from_module(model).architecture
        blocks = enumerate(model.get_submodule(family.blocks))
        folded = [(b, family.matrices(config, i), family.sites(config, i)) for i, b in blocks]
        return change_of_logits(model, folded, {"input_ids": token_ids(2, 12)})

    return of


def test_each_setting_keeps_the_sites_or_is_refused(first_variant, tiny_configs, moved):
    config = tiny_configs[first_variant]
    for name, value in changes(config):
        other = changed(config, name, value)
        try:
            architecture_of(other)
        except LRQuantError as error:
            assert "\n" not in str(error)
            continue
        assert moved(other) < EQUAL, (name, value)


def test_a_setting_that_would_break_a_site_is_seen(tiny_configs, moved, monkeypatch):
    """What is asserted of OPT's activation, by a declaration that does not ask for it."""
    config = tiny_configs["opt"]
    family = architecture_of(config)
    monkeypatch.setattr(
        "lrquant.model.loading.architecture_of",
        lambda _: type(family)(**{**vars(family), "sites": lambda c, i: family.sites(config, i)}),
    )
    assert moved(config) < EQUAL
    assert moved(changed(config, "activation_function", "gelu")) > 1e-3
