"""Models whose towers stay in floating point: pictures, what blocks share, what each gets."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3nConfig,
    Gemma4Config,
    Gemma4UnifiedConfig,
    Llama4Config,
    PreTrainedConfig,
)

import lrquant
from lrquant.blocks.head import Head
from lrquant.blocks.inputs import BlockInputs
from lrquant.blocks.variants import full_precision
from lrquant.data.feeds import Feed
from lrquant.errors import LRQuantError
from lrquant.measures.scoring.predictions import send_through
from lrquant.model.loading import from_module

IMAGE = 260
TOWER = {"model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 24}
TOWER |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
TOWER |= {"head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 64}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 261, "audio_token_id": 259}
TOKENS |= {"boi_token_id": 262, "eoi_token_id": 263}
ROTATED = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "image_size": 16}
ROTATED |= {"num_attention_heads": 2, "patch_size": 4, "pixel_shuffle_ratio": 0.5}
ROTATED |= {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}
TOWERS = {"gemma4": "vision_tower", "gemma4-experts": "vision_tower", "llama4": "vision_model"}
TOWERS |= {"gemma4_unified": "embed_vision", "gemma3n": "vision_tower"}
EMBEDDER = {"patch_size": 4, "pooling_kernel_size": 1, "mm_embed_dim": 32, "mm_posemb_size": 8}
EMBEDDER |= {"output_proj_dims": 32}
OFFSETS = {"vocab_offset": 256, "vocab_size": 6}  # of pictures' tokens, before those of sound
CONVOLUTIONS = {"architecture": "test_resnet", "hidden_size": 96, **OFFSETS}
SOUND = {"hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1}
SOUND |= {"vocab_offset": 262, "vocab_size": 2, "sscp_conv_channel_size": (4, 4)}
LACKING = {"gemma3n": None if find_spec("timm") else "its tower is one of timm, not installed"}


def config_of(name: str, text: PreTrainedConfig, towers: bool = True) -> PreTrainedConfig:
    """The whole model's, of the language part's."""
    if name == "llama4":
        return Llama4Config(
            text_config=text.to_dict(), vision_config=ROTATED, image_token_index=IMAGE
        )
    if name == "gemma3n":
        return Gemma3nConfig(
            text_config=text.to_dict(),
            vision_config=CONVOLUTIONS,
            audio_config=SOUND,
            vision_soft_tokens_per_image=4,
            **TOKENS,
        )
    if name == "gemma4_unified":
        return Gemma4UnifiedConfig(text_config=text.to_dict(), vision_config=EMBEDDER, **TOKENS)
    tower = {"vision_config": TOWER} if towers else {}
    return Gemma4Config(text_config=text.to_dict(), **tower, **TOKENS)


@pytest.fixture(params=sorted(TOWERS))
def name(request):
    if LACKING.get(request.param):
        pytest.skip(LACKING[request.param])
    return request.param


@pytest.fixture
def model(name, tiny_configs, randomize_):
    config = config_of(name, tiny_configs[name])
    made = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    return randomize_(made).eval().requires_grad_(False)


def picture(name: str, ids: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A picture of which four tokens are made: of 4 x 4 patches, or of 2 x 2."""
    if name == "gemma3n":
        return {"pixel_values": torch.rand(1, 3, 64, 64, generator=generator)}
    if name == "llama4":
        return {"pixel_values": torch.rand(1, 3, 16, 16, generator=generator)}
    sides = torch.arange(2 if name == "gemma4_unified" else 4)
    places = torch.cartesian_prod(sides, sides).flip(1)
    return {
        "pixel_values": torch.rand(1, len(places), 48, generator=generator),
        "image_position_ids": places[None],
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


@pytest.fixture
def feed(name):
    """Two texts with a picture each."""

    def sample(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(3, 250, (7,), generator=generator)
        seen = torch.tensor([262, *[IMAGE] * 4, 263])
        ids = torch.cat([words[:3], seen, words[3:]])[None]
        return {"input_ids": ids, **picture(name, ids, generator)}

    return Feed([sample(0), sample(1)])


def test_blocks_in_a_row_are_the_model(model, feed, make_bench):
    bench = make_bench(model)
    entry = BlockInputs(bench.model, feed, 1, bench.device)
    (stream,) = bench.streams(entry, 1)
    send_through(bench.model, full_precision(bench), stream, entry)
    head = Head(bench.model, bench.device, torch.float32)
    found = torch.cat([head(stream.read(batch)) for batch in entry.batches])
    expected = torch.cat([model(**sample).logits for sample in feed.inputs])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.std()))
    without = torch.cat([model(input_ids=each["input_ids"]).logits for each in feed.inputs])
    assert not torch.allclose(without, expected, atol=1e-2), "the pictures say nothing"


def test_the_language_part_is_learned_and_the_tower_saved_as_it_is(
    name, model, feed, assert_alike, tmp_path
):
    settings = {"epochs": 1, "report": False, "precision": "float32", "format": "lrquant"}
    places = {"output_dir": str(tmp_path / "run"), "save_dir": str(tmp_path / "saved")}
    run = lrquant.quantize(model, "W4A4", calibration=feed, **settings, **places)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    inputs = feed.inputs[0]
    assert_alike(loaded.eval()(**inputs).logits, run.load_model()(**inputs).logits)
    own = {n: p for n, p in model.named_parameters() if TOWERS[name] in n}
    read = dict(loaded.named_parameters())
    assert len(own) >= 10 and all(torch.equal(read[n], tensor) for n, tensor in own.items())


def test_a_scheme_for_the_tower_is_refused(model, feed, tmp_path):
    said = f"the tower '{model.config.vision_config.model_type}' of this"
    with pytest.raises(LRQuantError, match=said):
        lrquant.quantize(
            model, "W4A4", calibration=feed, vision_scheme="W8A8", output_dir=str(tmp_path / "run")
        )


def test_one_without_a_tower_has_none(tiny_configs, randomize_):
    config = config_of("gemma4", tiny_configs["gemma4"], towers=False)
    model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(LRQuantError, match="'gemma4' has no tower"):
        from_module(randomize_(model)).require_tower()
