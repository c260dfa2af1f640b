"""Shared fixtures: tiny random models of every family, a byte-level tokenizer, a workbench.

``tiny_configs``    name -> configuration; every family in architectures/ needs at least one here
``variant``         each of those names in turn whose family is declared, here or by an installed
                    package ("outside-"): a test that asks for it runs once a name
``first_variant``   the first of these of each model type, without experts and with
``make_model``      make_model(name, dtype, **changes) -> a random model, equal at every call
``make_bench``      make_bench(model, dtype, plan) -> a Workbench on the CPU that reads that model
``token_ids``       token_ids(samples, tokens) -> random ids, equal at every call
``tiny_tokenizer``  one token a byte, ids 3 to 258 (0 <unk>, 1 <s> and padding, 2 </s>)
``model_folder``    model_folder(name, **changes) -> a checkpoint with tokenizer on disk
``saved``           saved(name, scheme, **settings) -> a checkpoint of a run of zero epochs
``randomize_``      randomize_(module) -> fills parameters, biases and norms included, in place
``set_sites_``      set_sites_(view, seed) -> gives a view's sites random scales and shifts
``takes_shift``     takes_shift(block, matrices, site) -> whether all that a site reaches has a bias
``assert_alike``    assert_alike(found, expected) -> logits equal to rounding, codes on a tie aside
``change_of_logits``  how far folding random scales and shifts into blocks moves a model's logits
``make_set``        make_set(line, count) -> a folder with both splits of wikitext2, made of lines

Everything is offline, on the CPU and seeded.  Helpers come as fixtures, never as imports.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping, Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    Cohere2MoeConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    ExaoneMoeConfig,
    FalconConfig,
    FalconH1Config,
    FlexOlmoConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Gemma4UnifiedTextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GlmConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    GraniteMoeSharedConfig,
    HunYuanDenseV1Config,
    HunYuanMoEV1Config,
    HYV3Config,
    KimiLinearConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MiniMaxM2Config,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    NemotronHConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    OlmoHybridConfig,
    OPTConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SeedOssConfig,
    SmolLM3Config,
    SolarOpenConfig,
    Starcoder2Config,
)

from lrquant import quantize
from lrquant.architectures import architectures
from lrquant.architectures.matrix import Matrix, linear
from lrquant.architectures.sites import UNTOUCHED, Fold, Site
from lrquant.blocks.plan import FULL_PRECISION, Plan
from lrquant.blocks.workbench import Workbench
from lrquant.ingredients.equivalent import Equivalent
from lrquant.model.loading import from_module


def pytest_addoption(parser):
    parser.addoption("--pin", action="store_true", help="pin what tests/golden holds runs against")


VOCABULARY = 264
_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "max_position_embeddings": 64}
_SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 4}
_KV = {"num_key_value_heads": 2}
_GATED = {**_SHAPE, **_KV, "intermediate_size": 48}
_OPT = {**_SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "layerdrop": 0.0}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_TOP = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
_SHARED_WIDTH = {"shared_expert_intermediate_size": 32}
_EXPERTS = {**_FEW, "head_dim": 8}
_MLPS = ["dense", "sparse"]  # of the MLPs, by block
_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
_ROUTED |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
_YARN_ROPE |= {"original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}  # where the default has others
_LATENT = {**_SHAPE, **_ENDS, "intermediate_size": 48, "num_key_value_heads": 4}
_LATENT |= {"kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
_PART = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_PART = {"rope_parameters": _PART}  # RoPE turns a half of each head
_MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_DELTA = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
_DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 16}
_DELTA |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
_SCAN = {"head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8}
_SCAN |= {"n_groups": 2, "chunk_size": 8}
_SQUARED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SQUARED |= {"moe_shared_expert_intermediate_size": 32}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8}
_KINDS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_SHARED = {"num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 16, "sliding_window": 4}
_SHARED |= {"layer_types": ["sliding_attention", "full_attention"] * 2}

TINY = {
    "llama": LlamaConfig(**_GATED),
    "llama-biases": LlamaConfig(**_GATED, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**_GATED, tie_word_embeddings=True),
    "llama-no-gqa": LlamaConfig(**{**_GATED, "num_key_value_heads": 4}),
    "llama-rope-llama3": LlamaConfig(**_GATED, rope_parameters=_LLAMA3_ROPE),
    "llama-rope-linear": LlamaConfig(**_GATED, rope_parameters=_LINEAR_ROPE),
    "mistral": MistralConfig(**_GATED, sliding_window=None, head_dim=16),
    "mistral-sliding": MistralConfig(**_GATED, sliding_window=4),
    "qwen2": Qwen2Config(**_GATED),
    "qwen2-alternating": Qwen2Config(
        **_GATED, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**_GATED, head_dim=16),
    "gemma": GemmaConfig(**_GATED, head_dim=8),
    "gemma2": Gemma2Config(
        **_GATED, **_MIXED, head_dim=8, query_pre_attn_scalar=16, attn_logit_softcapping=2.0
    ),
    "gemma3": Gemma3TextConfig(
        **_GATED,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma3n": Gemma3nTextConfig(
        **{**_GATED, **_ENDS, "num_hidden_layers": 4, "intermediate_size": [48, 64] * 2},
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        laurel_rank=8,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.5],
        final_logit_softcapping=5.0,
    ),
    "opt": OPTConfig(**_OPT),
    "opt-post-norm": OPTConfig(**{**_OPT, "word_embed_proj_dim": 16}, do_layer_norm_before=False),
    "opt-bare": OPTConfig(**_OPT, enable_bias=False, layer_norm_elementwise_affine=False),
    "opt-no-biases": OPTConfig(**_OPT, enable_bias=False),
    "opt-gelu": OPTConfig(**_OPT, activation_function="gelu"),
    "granite": GraniteConfig(
        **_GATED,
        embedding_multiplier=1.5,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    ),
    "smollm3": SmolLM3Config(**_GATED, **_ENDS, no_rope_layers=[1, 0]),
    "seed_oss": SeedOssConfig(**_GATED, head_dim=16),
    "seed_oss-biases": SeedOssConfig(**_GATED, head_dim=16, attention_out_bias=True, mlp_bias=True),
    "ministral3": Ministral3Config(
        **_GATED, head_dim=16, pad_token_id=1, rope_parameters=_YARN_ROPE
    ),
    "olmo2": Olmo2Config(**_GATED, eos_token_id=2),
    "olmo3": Olmo3Config(**_GATED, **_MIXED, eos_token_id=2),
    "exaone4": Exaone4Config(**_GATED, **_MIXED),
    "hunyuan_v1_dense": HunYuanDenseV1Config(**_GATED, head_dim=16),
    "ernie4_5": Ernie4_5Config(**_GATED, head_dim=16),
    "ernie4_5-biases": Ernie4_5Config(**_GATED, head_dim=8, use_bias=True),
    "cohere2": Cohere2Config(**_GATED, **_MIXED, **_ENDS, logit_scale=0.5),
    "starcoder2": Starcoder2Config(**_GATED, **_ENDS),
    "starcoder2-no-biases": Starcoder2Config(**_GATED, **_ENDS, use_bias=False, sliding_window=4),
    "apertus": ApertusConfig(**_GATED),
    "glm": GlmConfig(**_GATED, **_ENDS, **_PART, head_dim=16),
    "glm-no-biases": GlmConfig(**_GATED, **_ENDS, head_dim=8, attention_bias=False),
    "glm4": Glm4Config(**_GATED, **_ENDS, **_PART, head_dim=16),
    "phi3": Phi3Config(**_GATED, **_ENDS),
    "phi3-part": Phi3Config(
        **_GATED,
        **_ENDS,
        sliding_window=4,
        tie_word_embeddings=True,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2],
            "long_factor": [1.0, 2.0, 3.0],
        },
    ),
    "gpt_neox": GPTNeoXConfig(**_SHAPE, **_PART, intermediate_size=48),
    "gpt_neox-in-turn": GPTNeoXConfig(
        **_SHAPE, intermediate_size=48, use_parallel_residual=False, hidden_act="relu"
    ),
    "nemotron": NemotronConfig(**_GATED, **_PART, eos_token_id=2),
    "nemotron-biases": NemotronConfig(
        **_GATED, head_dim=16, attention_bias=True, mlp_bias=True, eos_token_id=2
    ),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "falcon": FalconConfig(**_SHAPE, **_ENDS, ffn_hidden_size=48),
    "falcon-groups": FalconConfig(
        **_SHAPE, **_ENDS, ffn_hidden_size=48, new_decoder_architecture=True, num_kv_heads=2
    ),
    "falcon-one-norm": FalconConfig(
        **_SHAPE,
        **_ENDS,
        ffn_hidden_size=48,
        new_decoder_architecture=True,
        num_kv_heads=2,
        num_ln_in_parallel_attn=1,
    ),
    "falcon-alibi": FalconConfig(
        **_SHAPE,
        **_ENDS,
        ffn_hidden_size=48,
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        activation="relu",
    ),
    "qwen3_5": Qwen3_5TextConfig(**_GATED, **_DELTA),
    "qwen3_5-biases": Qwen3_5TextConfig(
        **{**_GATED, **_DELTA, "linear_num_value_heads": 2},
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "qwen3_5_moe": Qwen3_5MoeTextConfig(**_SHAPE, **_KV, **_DELTA, **_FEW, **_SHARED_WIDTH),
    "qwen3_next": Qwen3NextConfig(**_GATED, **_DELTA, num_experts=0),
    "qwen3_next-experts": Qwen3NextConfig(
        **_GATED, **_DELTA, **_FEW, **_SHARED_WIDTH, mlp_only_layers=[0]
    ),
    "granitemoehybrid": GraniteMoeHybridConfig(
        **{**_GATED, **_MAMBA, **_KINDS},
        num_local_experts=0,
        shared_intermediate_size=32,
        residual_multiplier=0.5,
    ),
    "granitemoehybrid-rope": GraniteMoeHybridConfig(
        **{**_GATED, **_MAMBA, **_KINDS},
        num_local_experts=0,
        shared_intermediate_size=32,
        mamba_n_groups=2,
        mamba_proj_bias=True,
        position_embedding_type="rope",
    ),
    "granitemoehybrid-experts": GraniteMoeHybridConfig(
        **{**_GATED, **_MAMBA, **_KINDS, "intermediate_size": 16},
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
    ),
    "falcon_h1": FalconH1Config(
        **_GATED,
        **_MAMBA,
        mamba_d_ssm=32,
        mamba_d_head=8,
        attention_in_multiplier=0.5,
        ssm_multipliers=[0.5, 1.0, 2.0, 1.0, 0.5],
    ),
    "falcon_h1-norm": FalconH1Config(
        **_GATED,
        **_MAMBA,
        mamba_d_ssm=64,
        mamba_d_head=16,
        mamba_n_groups=2,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
    ),
    "lfm2": Lfm2Config(
        **_GATED, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
    "lfm2-biases": Lfm2Config(
        **_GATED, layer_types=["conv", "full_attention"], conv_bias=True, block_multiple_of=16
    ),
    "lfm2_moe": Lfm2MoeConfig(
        **_GATED, **_FEW, layer_types=["full_attention", "conv"], num_dense_layers=1
    ),
    "nemotron_h": NemotronHConfig(
        **_GATED, **_SCAN, layer_types=["linear_attention", "full_attention", "mlp"]
    ),
    "nemotron_h-experts": NemotronHConfig(
        **_GATED, **_SCAN, **_SQUARED, layer_types=["full_attention", "moe"]
    ),
    "nemotron_h-latent": NemotronHConfig(
        **_GATED, **_SCAN, **_SQUARED, layer_types=["full_attention", "moe"], moe_latent_size=16
    ),
    "olmo_hybrid": OlmoHybridConfig(
        **_GATED,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=16,
        pad_token_id=1,
        eos_token_id=2,
    ),
    "gemma4": Gemma4TextConfig(
        **{**_GATED, **_ENDS, **_SHARED},
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        final_logit_softcapping=5.0,
        **_TOP,
    ),
    "gemma4-plain": Gemma4TextConfig(
        **{**_GATED, **_ENDS, **_SHARED},
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
    ),
    "gemma4-experts": Gemma4TextConfig(
        **{**_GATED, **_ENDS, **_SHARED, **_MIXED, "num_hidden_layers": 2},
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        **_TOP,
    ),
    "gemma4_unified": Gemma4UnifiedTextConfig(
        **{**_GATED, **_ENDS, **_SHARED},
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
    ),
    "qwen3_moe": Qwen3MoeConfig(**_GATED, **_EXPERTS),
    "qwen3_moe-unlike": Qwen3MoeConfig(
        **{**_GATED, "num_hidden_layers": 3}, **_EXPERTS, mlp_only_layers=[0], pad_token_id=1
    ),
    "qwen2_moe": Qwen2MoeConfig(**_GATED, **_EXPERTS, **_SHARED_WIDTH),
    "olmoe": OlmoeConfig(**_GATED, **_ENDS, num_experts=4, num_experts_per_tok=2),
    "mixtral": MixtralConfig(**_GATED, num_local_experts=4, num_experts_per_tok=2),
    "phimoe": PhimoeConfig(
        **_GATED, **_ENDS, num_local_experts=4, num_experts_per_tok=2, attention_bias=True
    ),
    "minimax_m2": MiniMaxM2Config(
        **_GATED, **_ENDS, head_dim=8, num_local_experts=4, num_experts_per_tok=2, rotary_dim=4
    ),
    "glm4_moe": Glm4MoeConfig(**_GATED, **_ENDS, **_ROUTED, **_PART, head_dim=16),
    "glm4_moe-norms": Glm4MoeConfig(**_GATED, **_ENDS, **_ROUTED, head_dim=16, use_qk_norm=True),
    "dots1": Dots1Config(**_GATED, **_ENDS, **_ROUTED, head_dim=16),
    "solar_open": SolarOpenConfig(**_GATED, **_ENDS, **_ROUTED, head_dim=16),
    "ernie4_5_moe": Ernie4_5_MoeConfig(
        **_GATED, **_ENDS, moe_num_experts=4, moe_k=2, moe_intermediate_size=16
    ),
    "hunyuan_v1_moe": HunYuanMoEV1Config(**_GATED, **_ENDS, num_experts=4, moe_topk=2, head_dim=16),
    "hy_v3": HYV3Config(**_GATED, **_ENDS, **_EXPERTS, num_shared_experts=1, mlp_layer_types=_MLPS),
    "exaone_moe": ExaoneMoeConfig(
        **_GATED, **_MIXED, **_EXPERTS, n_group=1, topk_group=1, mlp_layer_types=_MLPS
    ),
    "granitemoe": GraniteMoeConfig(
        **_GATED, **_ENDS, num_local_experts=4, num_experts_per_tok=2, residual_multiplier=0.5
    ),
    "gpt_oss": GptOssConfig(
        **{**_GATED, **_MIXED, "intermediate_size": 16},
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "llama4": Llama4TextConfig(
        **{**_GATED, **_ENDS, "num_hidden_layers": 3, "intermediate_size": 16},
        head_dim=16,
        intermediate_size_mlp=48,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=3,
        attention_chunk_size=4,
        floor_scale=4,
    ),
    "llama4-two": Llama4TextConfig(
        **{**_GATED, **_ENDS, "num_hidden_layers": 2, "intermediate_size": 16},
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        use_qk_norm=False,
        attention_bias=True,
        no_rope_layer_interval=2,
    ),
    "granitemoeshared": GraniteMoeSharedConfig(
        **{**_GATED, **_ENDS, "intermediate_size": 16},
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
    ),
    "flex_olmo": FlexOlmoConfig(**_GATED, **_ENDS, num_experts=4, num_experts_per_tok=2),
    "cohere2_moe": Cohere2MoeConfig(
        **{**_GATED, **_MIXED, **_ENDS, "intermediate_size": 16},
        head_dim=8,
        num_experts=4,
        num_shared_experts=1,
        mlp_layer_types=["sparse", "dense"],
        prefix_dense_intermediate_size=48,
    ),
    "kimi_linear": KimiLinearConfig(
        **{**_LATENT, **_FEW, **_KINDS},
        mlp_layer_types=["sparse", "dense"],
        linear_head_dim=16,
        linear_num_heads=2,
    ),
    "deepseek_v2": DeepseekV2Config(
        **_LATENT, **_ROUTED, q_lora_rank=16, head_dim=4, topk_method="group_limited_greedy"
    ),
    "deepseek_v3": DeepseekV3Config(**_LATENT, **_ROUTED, q_lora_rank=16),
    "deepseek_v3-whole": DeepseekV3Config(
        **_LATENT, **_ROUTED, q_lora_rank=None, rope_interleave=False, attention_bias=True
    ),
    "glm4_moe_lite": Glm4MoeLiteConfig(**_LATENT, **_ROUTED, q_lora_rank=16, mlp_layer_types=_MLPS),
    "outside-fused": Phi3Config(**_GATED, pad_token_id=0, eos_token_id=2),
    "outside-experts": Qwen3MoeConfig(**_GATED, **_EXPERTS),
    "outside-unlike": Qwen3MoeConfig(
        **{**_GATED, "num_hidden_layers": 3}, **_EXPERTS, mlp_only_layers=[0], pad_token_id=1
    ),
}


@pytest.fixture(autouse=True)
def own_logging():
    """What a command does to the package's logger ends with the test that gave the command."""
    logger = logging.getLogger("lrquant")
    handlers, level = logger.handlers[:], logger.level
    yield
    logger.handlers = handlers
    logger.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def short_examples():
    """What models write for a report is two tokens here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrquant.blocks.examples.NEW_TOKENS", 2)
        yield


@pytest.fixture(scope="session")
def tiny_configs():
    return TINY


_WITH_EXPERTS = ("-experts", "-latent")  # of a model type that has none in another variant


def _is_declared(name: str) -> bool:
    """Whether a family declares a name's model type: "outside-" ones by an installed package."""
    family = architectures().get(TINY[name].model_type)
    outside = family is not None and not family.sites.__module__.startswith("lrquant.")
    return family is not None and outside == name.startswith("outside-")


@pytest.fixture(params=sorted(filter(_is_declared, TINY)))
def variant(request):
    return request.param


def _first(name: str) -> str:
    """What a name is the first of: its model type, or the same with experts beside it."""
    return TINY[name].model_type + ("-experts" if name.endswith(_WITH_EXPERTS) else "")


@pytest.fixture(params=sorted({_first(n): n for n in reversed(TINY) if _is_declared(n)}.values()))
def first_variant(request):
    return request.param


def _randomize_(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Norms around 1, biases around 0, linears that keep the size of what they read."""
    for name, parameter in module.named_parameters():
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("correction_bias"):  # of a router, whose experts all get tokens
            values = 0.02 * values
        elif name.endswith("bias"):
            values = 0.3 * values
        elif parameter.dim() == 1:
            values = 1 + 0.3 * values.clamp(-2, 2)
        elif "embed_" not in name:
            values = values / parameter.shape[1] ** 0.5
        parameter.data.copy_(values)
    return module


@pytest.fixture(scope="session")
def randomize_():
    return _randomize_


def _make_model(name: str, dtype: torch.dtype = torch.float32, **changes):
    config = copy.deepcopy(TINY[name])
    for key, value in changes.items():
        setattr(config, key, value)
    if dtype == torch.float64:  # which grouped products of experts do not take
        config._experts_implementation = "eager"
    attention = (
        "sdpa" if AutoModelForCausalLM._model_mapping[type(config)]._supports_sdpa else "eager"
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return _randomize_(model).to(dtype).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def make_model():
    return _make_model


@pytest.fixture
def make_bench():
    def make(module, dtype: torch.dtype = torch.float32, plan: Plan = FULL_PRECISION) -> Workbench:
        return Workbench(from_module(module), torch.device("cpu"), dtype, "host", plan=plan)

    return make


@pytest.fixture(scope="session")
def token_ids():
    def make(samples: int, tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        return torch.randint(3, 259, (samples, tokens), generator=generator)

    return make


def _make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<s>",
        model_max_length=64,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return _make_tokenizer()


@pytest.fixture
def model_folder(tmp_path, tiny_tokenizer):
    def make(name: str, **changes):
        folder = tmp_path / f"model-{name}"
        _make_model(name, **changes).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def saved(tmp_path, token_ids):
    def make(name: str, scheme: str, **settings):
        quantize(
            _make_model(name),
            scheme,
            calibration=token_ids(3, 16),
            output_dir=str(tmp_path / "run"),
            save_dir=str(tmp_path / "saved"),
            **{"precision": "float32", "epochs": 0, "report": False, **settings},
        )
        return tmp_path / "saved"

    return make


def _stored(block, matrices: Mapping[str, Matrix], name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, to be changed in place, of a matrix, or of a module that holds none."""
    matrix, parameters = matrices.get(name, linear(name)), dict(block.named_parameters())
    bias = parameters.get(matrix.bias)
    weight = matrix.of(parameters[matrix.parameter])
    return weight, None if bias is None else matrix.of_bias(bias)


def _takes_shift(block: torch.nn.Module, matrices: Sequence[Matrix], site: Site) -> bool:
    by_name = {matrix.name: matrix for matrix in matrices}
    biases = [_stored(block, by_name, fold.module)[1] for fold in site.folds]
    return site.shiftable and all(bias is not None for bias in biases)


@pytest.fixture(scope="session")
def takes_shift():
    return _takes_shift


def _apply_(
    weight: Tensor, bias: Tensor | None, fold: Fold, s: Tensor, shift: Tensor | None, out: bool
) -> None:
    """Carry one fold of a site out on the weights themselves, in their own dtype."""
    index = torch.tensor(fold.index)
    reached, index = index != UNTOUCHED, index.clamp(min=0)
    factor = torch.where(reached, s[index] ** fold.power, 1.0)
    if shift is not None:
        moved = torch.where(reached, shift[index], 0.0)
        bias += -moved if out else weight @ moved
    if fold.axis == "columns":
        weight *= factor
        return
    if fold.axis == "norm":
        weight.copy_((weight + fold.offset) * factor - fold.offset)
    else:
        weight *= factor[:, None]
    if bias is not None:
        bias *= factor


def _fold_(
    block: torch.nn.Module,
    matrices: Sequence[Matrix],
    sites: Sequence[Site],
    seed: int,
    left_out: Fold | None,
) -> None:
    """Random scales, and shifts where biases exist, into the sites of a block."""
    by_name = {matrix.name: matrix for matrix in matrices}
    generator = torch.Generator().manual_seed(seed)
    for site in sites:
        s = 0.5 + 1.5 * torch.rand(site.size, generator=generator, dtype=torch.float64)
        shift = torch.randn(site.size, generator=generator, dtype=torch.float64)
        shift = shift if _takes_shift(block, matrices, site) else None
        for fold in site.folds:
            if fold != left_out:
                stored = _stored(block, by_name, fold.module)
                _apply_(*stored, fold, s, shift, fold is site.producer)


@pytest.fixture(scope="session")
def change_of_logits():
    """change_of_logits(model, folded, inputs, left_out) -> largest change of the logits, relative
    to the largest, when sites are folded: all of `folded`, which has (block, its matrices, the
    sites) of each block, but the folds that equal the one left out."""

    @torch.no_grad()
    def change(model, folded, inputs, left_out: Fold | None = None) -> float:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        logits = model(**inputs).logits
        for seed, (block, matrices, sites) in enumerate(folded):
            _fold_(block, matrices, sites, seed, left_out)
        after = model(**inputs).logits
        model.load_state_dict(before)
        return float((after - logits).abs().max() / logits.abs().max())

    return change


@pytest.fixture(scope="session")
def set_sites_():
    def set_(view, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for ingredient in view.ingredients:
            for site in ingredient.sites(view.shapes) if isinstance(ingredient, Equivalent) else ():
                scale = 0.5 + 1.5 * torch.rand(site.size, generator=generator)
                view.parameters[f"let.{site.name}.scale"] = scale
                if ingredient.shifts(site, view.shapes):
                    shift = torch.randn(site.size, generator=generator)
                    view.parameters[f"let.{site.name}.shift"] = shift

    return set_


def _assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Where activations are quantised, sums that are rounded another way can move a value across
    the edge of its code: at most one token in ten may be off by more than rounding, and by 0.5.
    """
    close = torch.isclose(found, expected, rtol=1e-4, atol=1e-4).all(-1)
    assert close.double().mean() >= 0.9, f"{int((~close).sum())} of {close.numel()} tokens differ"
    torch.testing.assert_close(found, expected, rtol=0, atol=0.5)


@pytest.fixture(scope="session")
def assert_alike():
    return _assert_alike


@pytest.fixture(scope="session")
def text():
    return " ".join(f"{number * number} is the square of {number}." for number in range(40))


@pytest.fixture(scope="session")
def make_set(tmp_path_factory):
    """make_set(line, count) -> a folder with both splits of wikitext2: `line(split, number)`s."""

    def make(line, count):
        folder = tmp_path_factory.mktemp("texts")
        for split in ("validation", "test"):
            path = folder / "wikitext2" / f"{split}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(" ".join(line(split, number) for number in range(count)))
        return folder

    return make


@pytest.fixture
def data_dir(tmp_path, text):
    folder = tmp_path / "data"
    (folder / "wikitext2").mkdir(parents=True)
    for split in ("validation", "test"):
        (folder / "wikitext2" / f"{split}.txt").write_text(text)
    return str(folder)
