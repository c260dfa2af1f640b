"""The golden test: tiny runs of every form give the losses and the bytes that are pinned.

What a run learns is pinned as a SHA-256 of each block's parameters and of each format's tensors, by
class of machine (processor, instruction set and torch decide how sums are rounded), and as losses,
which hold on every machine to a tenth.  `make pins` pins anew, on purpose: after a change that is
meant to change what is learned, with a line in CHANGELOG.md.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, LlavaConfig

from lrquant import quantize
from lrquant.data.feeds import Feed
from lrquant.formats.checkpoint import save_checkpoint
from lrquant.formats.choice import formats

PINS = Path(__file__).parent / "pins"
LOSSES = "losses.json"
SAMPLES, TOKENS, PICTURE_TOKEN = 3, 16, 260
PLUS = {"lr_plus": True, "epochs": 2}
NATIVE, PACKED = ("lrquant", "dequantized"), ("compressed-tensors", "dequantized")
TEXT = "".join(f"{number} times {number} is {number * number}. " for number in range(60))
FORMS: dict[str, tuple[str, str, dict, tuple[str, ...]]] = {  # model, scheme, settings, formats
    "plus-site": ("llama", "W4A4", PLUS, NATIVE),
    "plus-linear": ("qwen3", "W4A4", {**PLUS, "rotation_sharing": "linear"}, NATIVE),
    "plus-none": ("gemma", "W4A4", {**PLUS, "rotation_sharing": "none"}, NATIVE),
    "plus-weight": ("mistral", "W4A4", {**PLUS, "rotate_rank": 2}, ("dequantized",)),
    "plus-groups": ("qwen2", "W3A16g16", PLUS, PACKED),
    "plus-bfloat16": ("llama", "W4A4", {**PLUS, "precision": "bfloat16"}, NATIVE),
    "plus-post-norm": ("opt-post-norm", "W4A4", PLUS, NATIVE),
    "groups": ("llama-no-gqa", "W4A16g16", {"epochs": 2}, PACKED),
    "rows": ("llama-biases", "W4A16", {"epochs": 2}, ("awq", "compressed-tensors")),
    "symmetric": (
        "gemma3",
        "W8A8-sym-qkv16",
        {"epochs": 2, "let": True, "lwc": True, "activation_symmetric": True},
        (*PACKED, "lrquant"),
    ),
    "published": ("llama", "W4A4", {"preset": "paper", "epochs": 2}, ("lrquant",)),
    "published-plus": ("llama", "W4A4", {**PLUS, "preset": "paper"}, ()),
    "shifts": ("opt", "W4A4", {"epochs": 2, "two_branch": True}, NATIVE),
    "adapted": ("llama", "W3A4", {"epochs": 1, "tta": True, "tta_blocks": 2, "limit": 2}, ()),
    "tower": ("llava", "W4A4", {**PLUS, "vision_scheme": "W8A8"}, NATIVE),
}


def machine_class() -> str:
    """What decides how sums are rounded; the tests run on one thread."""
    path = Path("/proc/cpuinfo")
    pairs = [line.partition(":") for line in path.read_text().splitlines()] if path.exists() else []
    processor = {key.strip(): value.strip() for key, _, value in pairs}
    parts = [processor.get(key, "") for key in ("vendor_id", "cpu family", "model")]
    flags = sorted(processor.get("flags", "").split())
    parts += [platform.machine(), " ".join(flags), torch.__version__]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return f"{torch.backends.cpu.get_cpu_capability()}-{digest}"


def digest_of(paths) -> str:
    """SHA-256 over name, dtype, shape and bytes of all tensors in some files, by name."""
    tensors = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def make_llava(randomize_):
    text = {"model_type": "llama", "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tower = {"model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 40}
    tower |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_id=PICTURE_TOKEN)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    return randomize_(model).eval().requires_grad_(False)


def pictures(ids: torch.Tensor) -> Feed:
    """Each row of token ids (samples, tokens) with a picture of sixteen tokens before it."""
    generator = torch.Generator().manual_seed(11)
    mark = torch.full((1, 16), PICTURE_TOKEN)
    return Feed(
        [
            {
                "input_ids": torch.cat([mark, row[None]], 1),
                "pixel_values": torch.randn((1, 3, 16, 16), generator=generator),
            }
            for row in ids
        ]
    )


@pytest.fixture
def carry_out(tmp_path, make_model, randomize_, token_ids, tiny_tokenizer):
    def run(form: str) -> dict:
        name, scheme, settings, names = FORMS[form]
        ids = token_ids(SAMPLES, TOKENS)
        (tmp_path / "text.txt").write_text(TEXT)
        if settings.get("tta"):
            settings = {**settings, "ppl": (str(tmp_path / "text.txt"),)}
        folder = tmp_path / "run"
        result = quantize(
            make_llava(randomize_) if name == "llava" else make_model(name),
            scheme,
            tokenizer=tiny_tokenizer,
            calibration=pictures(ids) if name == "llava" else ids,
            output_dir=str(folder),
            seqlen=TOKENS,
            **{"precision": "float32", "device": "cpu", "report": False, **settings},
            let_init=1.0,  # of several that are tried two may err alike, and another machine decide
        )
        blocks = {
            f"{kind.rstrip('/*')}/{path.stem}": digest_of([path])
            for kind in ("blocks", "tower/blocks", "adapted/*")
            for path in sorted(folder.glob(f"{kind}/*.safetensors"))
        }
        records = [*result.folder.tower.records(), *result.records]
        losses = [[r.initial_loss, *r.epoch_losses, r.final_loss] for r in records]
        return {"losses": losses, "blocks": blocks, "formats": saved(result, tmp_path, names)}

    return run


def saved(run, place: Path, names) -> dict[str, str]:
    """A digest of a run's checkpoint in each of some formats."""
    digests = {}
    for name in names:
        save_checkpoint(run.workbench, run.config.origin, run.folder, place / name, formats()[name])
        digests[name] = digest_of(sorted((place / name).glob("*.safetensors")))
    return digests


@pytest.mark.parametrize("form", FORMS)
def test_what_is_learned_and_written_is_what_is_pinned(form, carry_out, request):
    values = carry_out(form)
    losses = values.pop("losses")
    exact = PINS / f"{machine_class()}.json"
    if request.config.getoption("--pin"):
        pin(PINS / LOSSES, form, losses)
        pin(exact, form, values)
        return
    pinned = json.loads((PINS / LOSSES).read_text())[form]
    assert [len(each) for each in losses] == [len(each) for each in pinned]
    for found, expected in zip(losses, pinned, strict=True):
        assert found == pytest.approx(expected, rel=0.1)
    if exact.exists():
        assert values == json.loads(exact.read_text())[form]


def pin(path: Path, form: str, values) -> None:
    pins = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**pins, form: values}, indent=1, sort_keys=True) + "\n")


def test_a_changed_bit_is_seen(tmp_path):
    tensor = torch.arange(6, dtype=torch.float32)
    save_file({"a": tensor}, tmp_path / "one")
    tensor[3] = torch.nextafter(tensor[3], torch.tensor(9.0))
    save_file({"a": tensor}, tmp_path / "two")
    assert digest_of([tmp_path / "one"]) != digest_of([tmp_path / "two"])
