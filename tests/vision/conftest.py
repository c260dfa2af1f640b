"""Tiny random multimodal models and image classifiers, and inputs with pictures for each.

``vision_configs``  name -> configuration
``family``          each of those names in turn
``make_vision``     make_vision(name, dtype) -> a random model, equal at every call
``make_feed``       make_feed(name, samples) -> a Feed with a picture in each sample
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    DeiTConfig,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    Kimi_K25Config,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    LlavaProcessor,
    Mistral3Config,
    PaliGemmaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SmolVLMConfig,
    ViTConfig,
)

from lrquant.data.feeds import Feed

IMAGE = 260  # the token that stands for pictures
TEXT = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
TEXT |= {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "image_size": 16}
TOWER |= {"num_attention_heads": 2, "patch_size": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
QWEN |= {"temporal_patch_size": 2, "in_channels": 3}
QWEN3 = {**QWEN, "hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 32}
QWEN3 |= {"num_position_embeddings": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERTS |= {"shared_expert_intermediate_size": 32}
DELTA = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
DELTA |= {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}
DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
DELTA |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
SPECIAL = {"image_token_id": IMAGE, "video_token_id": 261}
SPECIAL |= {"vision_start_token_id": 262, "vision_end_token_id": 263}
LLAMA, QWEN2 = {**TEXT, "model_type": "llama"}, {**TEXT, "model_type": "qwen2"}
CLIP = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 24}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model"}


MISTRAL = {**TEXT, "model_type": "mistral", "head_dim": 8}
MINISTRAL = {**TEXT, "model_type": "ministral3", "head_dim": 16}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.1}
DEEPSEEK = {**TEXT, "n_routed_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
DEEPSEEK |= {"moe_intermediate_size": 24, "n_group": 2, "topk_group": 1, "v_head_dim": 12}
DEEPSEEK |= {"q_lora_rank": 16, "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
DEEPSEEK |= {"first_k_dense_replace": 1}
MISTRAL4 = {**DEEPSEEK, "model_type": "mistral4", "rope_parameters": YARN}
PIXTRAL = {**TOWER, "model_type": "pixtral", "head_dim": 12}


def _mistral3(text: dict[str, object]) -> PreTrainedConfig:
    return Mistral3Config(
        text_config=text,
        vision_config=PIXTRAL,
        image_token_id=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def _configs() -> dict[str, PreTrainedConfig]:
    return {
        "llava": LlavaConfig(
            text_config=LLAMA,
            vision_config=CLIP,
            image_token_id=IMAGE,
            vision_feature_layer=-2,
        ),
        "llava_next": LlavaNextConfig(
            text_config=LLAMA,
            vision_config=CLIP,
            image_token_id=IMAGE,
            image_grid_pinpoints=[[16, 32], [32, 16]],
        ),
        "llava_onevision": LlavaOnevisionConfig(
            text_config=QWEN2,
            vision_config={**SIGLIP, "vision_use_head": False},
            image_token_id=IMAGE,
            video_token_id=261,
            image_grid_pinpoints=[[16, 32], [32, 16]],
        ),
        "internvl": InternVLConfig(
            text_config=QWEN2,
            vision_config={
                **TOWER,
                "model_type": "internvl_vision",
                "image_size": [16, 16],
                "patch_size": [4, 4],
                "layer_scale_init_value": 0.1,
                "attention_bias": True,
            },
            image_token_id=IMAGE,
        ),
        "internvl-qk-norm": InternVLConfig(
            text_config=QWEN2,
            vision_config={
                **TOWER,
                "model_type": "internvl_vision",
                "image_size": [16, 16],
                "patch_size": [4, 4],
                "norm_type": "rms_norm",
                "use_qk_norm": True,
            },
            image_token_id=IMAGE,
        ),
        "paligemma": PaliGemmaConfig(
            text_config={**TEXT, "model_type": "gemma", "head_dim": 8},
            vision_config={**SIGLIP, "projection_dim": 32, "vision_use_head": False},
            image_token_id=IMAGE,
            projection_dim=32,
            hidden_size=32,
        ),
        "paligemma-2": PaliGemmaConfig(
            text_config={
                **TEXT,
                "model_type": "gemma2",
                "head_dim": 8,
                "query_pre_attn_scalar": 16,
                "attn_logit_softcapping": 2.0,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 8,
            },
            vision_config={**SIGLIP, "projection_dim": 32, "vision_use_head": False},
            image_token_id=IMAGE,
            projection_dim=32,
            hidden_size=32,
        ),
        "gemma3": Gemma3Config(
            text_config={
                **TEXT,
                "model_type": "gemma3_text",
                "head_dim": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 8,
            },
            vision_config={**SIGLIP, "vision_use_head": False},
            image_token_id=IMAGE,
            mm_tokens_per_image=4,
        ),
        **{
            f"mistral3{end}": _mistral3(text)
            for end, text in (("", MINISTRAL), ("-small", MISTRAL), ("-experts", MISTRAL4))
        },
        "smolvlm": SmolVLMConfig(
            text_config=LLAMA,
            vision_config={**TOWER, "model_type": "smolvlm_vision"},
            image_token_id=IMAGE,
            scale_factor=2,
        ),
        "idefics3": Idefics3Config(
            text_config=LLAMA,
            vision_config={**TOWER, "model_type": "idefics3_vision"},
            image_token_id=IMAGE,
            scale_factor=2,
        ),
        "qwen2_vl": Qwen2VLConfig(
            text_config={**TEXT, "rope_parameters": ROPE},
            vision_config={**QWEN, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
            **SPECIAL,
        ),
        "qwen2_5_vl": Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": ROPE},
            vision_config={
                **QWEN,
                "hidden_size": 32,
                "intermediate_size": 40,
                "out_hidden_size": 32,
                "window_size": 8,
                "fullatt_block_indexes": [1],
            },
            **SPECIAL,
        ),
        "qwen3_vl": Qwen3VLConfig(
            text_config={**TEXT, "head_dim": 8, "rope_parameters": ROPE},
            vision_config={**QWEN3, "deepstack_visual_indexes": [0]},
            **SPECIAL,
        ),
        "qwen3_vl_moe": Qwen3VLMoeConfig(
            text_config={**TEXT, **EXPERTS, "head_dim": 8, "rope_parameters": ROPE},
            vision_config={**QWEN3, "deepstack_visual_indexes": [0]},
            **SPECIAL,
        ),
        "qwen3_5": Qwen3_5Config(
            text_config={**TEXT, **DELTA, "model_type": "qwen3_5_text"},
            vision_config=QWEN3,
            **SPECIAL,
        ),
        "qwen3_5_moe": Qwen3_5MoeConfig(
            text_config={**TEXT, **DELTA, **EXPERTS, "model_type": "qwen3_5_moe_text"},
            vision_config=QWEN3,
            **SPECIAL,
        ),
        "kimi_k25": Kimi_K25Config(
            text_config={**DEEPSEEK, "model_type": "deepseek_v3"},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": 4,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
            },
            projection_hidden_size=32,
            image_token_id=IMAGE,
            video_token_id=261,
            tie_word_embeddings=False,
        ),
        "vit": ViTConfig(**TOWER, num_labels=3, architectures=["ViTForImageClassification"]),
        "deit": DeiTConfig(**TOWER, num_labels=3, architectures=["DeiTForImageClassification"]),
    }


CONFIGS = _configs()
CLASSIFIERS = ("vit", "deit")


@pytest.fixture(scope="session")
def vision_configs():
    return CONFIGS


@pytest.fixture(params=sorted(CONFIGS))
def family(request):
    return request.param


@pytest.fixture(params=sorted(set(CONFIGS) - set(CLASSIFIERS)))
def language_family(request):
    return request.param


@pytest.fixture(scope="session")
def make_vision(randomize_):
    def make(name: str, dtype: torch.dtype = torch.float32):
        config = copy.deepcopy(CONFIGS[name])
        classifier = name in CLASSIFIERS
        auto = AutoModelForImageClassification if classifier else AutoModelForImageTextToText
        if dtype == torch.float64:  # which grouped products of experts do not take
            config.get_text_config()._experts_implementation = "eager"
        attention = "eager" if name == "paligemma-2" else "sdpa"  # soft caps
        model = auto.from_config(config, attn_implementation=attention)
        model = randomize_(model).to(dtype).eval().requires_grad_(False)
        for module in model.modules():  # norms that store their weight less 1
            if type(module).__name__.startswith("Gemma") and "RMSNorm" in type(module).__name__:
                module.weight.data -= 1
        return model

    return make


def _pixels(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _sample(name: str, index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + index)
    words = torch.randint(3, 259, (7,), generator=generator)
    base = name.partition("-")[0]
    extra: dict[str, torch.Tensor] = {}
    before, after = [], []
    if base in CLASSIFIERS:
        return {"pixel_values": _pixels(1, 3, 16, 16, seed=index)}
    if base.startswith("qwen"):
        count = 4
        patches = 16
        extra["pixel_values"] = _pixels(patches, 3 * 2 * 4 * 4, seed=index)
        extra["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        before, after = [262], [263]
    elif base in ("smolvlm", "idefics3"):
        count = 4
        extra["pixel_values"] = _pixels(1, 1, 3, 16, 16, seed=index)
        extra["pixel_attention_mask"] = torch.ones(1, 1, 16, 16, dtype=torch.long)
    elif base in ("llava_next", "llava_onevision"):
        extra["pixel_values"] = _pixels(1, 3, 3, 16, 16, seed=index)
        extra["image_sizes"] = torch.tensor([[16, 32]])
        count = 16 + 4 * 8 + 4  # the whole picture, two tiles, and the ends of four lines
    else:
        count = 4 if base in ("gemma3", "internvl", "mistral3") else 16
        extra["pixel_values"] = _pixels(1, 3, 16, 16, seed=index)
    if base == "kimi_k25":
        count = 4
        extra["pixel_values"] = _pixels(16, 3, 4, 4, seed=index)
        extra["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    if base == "mistral3":
        extra["image_sizes"] = torch.tensor([[16, 16]])
    picture = [*before, *[IMAGE] * count, *after]
    ids = torch.cat([words[:3], torch.tensor(picture), words[3:]])[None]
    if base in ("gemma3", "paligemma"):
        extra["token_type_ids"] = (ids == IMAGE).long()
    if base.startswith("qwen"):
        extra["mm_token_type_ids"] = (ids == IMAGE).int()
    return {"input_ids": ids, **extra}


@pytest.fixture(scope="session")
def make_feed():
    def make(name: str, samples: int = 2) -> Feed:
        return Feed([_sample(name, index) for index in range(samples)])

    return make


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def processor(tiny_tokenizer):
    """Of "llava": pictures of 16 x 16 pixels, 16 tokens each."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    while len(tokenizer) < IMAGE:
        tokenizer.add_tokens([f"<unused{len(tokenizer)}>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


@pytest.fixture
def llava_folder(tmp_path, make_vision, processor):
    """A checkpoint of "llava" with its processor."""
    folder = tmp_path / "model"
    make_vision("llava").save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """A folder of six pictures of several sizes and one broken file."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(6):
        noise = np.random.default_rng(index).integers(0, 255, (20 + index, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"not a picture")
    return folder


@pytest.fixture
def questions(tmp_path, pictures):
    """A .jsonl of six questions about the pictures, of two lengths."""
    path = tmp_path / "questions.jsonl"
    lines = []
    for index in range(6):
        content = [
            {"type": "image", "path": f"pictures/{index}.png"},
            {"type": "text", "text": "what?" if index % 2 else "which one?"},
        ]
        messages = [{"role": "user", "content": content}]
        lines.append(json.dumps({"messages": messages, "answers": ["a circle"]}))
    path.write_text("\n".join(lines) + "\n")
    return path
