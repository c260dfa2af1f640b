"""The beginning of windows: BOS where a model was trained with it, the stream of the field else."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tokenizers import processors

from lrquant import LRQuantError, evaluate, quantize
from lrquant.data.beginnings import STREAM, Beginning, beginning_of
from lrquant.data.samples import calibration_samples, perplexity_windows

BOS, EOS = 1, 2
TEXT = " ".join(f"{number * number} is the square of {number}." for number in range(60))


@pytest.fixture
def adding(tiny_tokenizer):
    """A tokenizer that begins a text with BOS, and ends it as `end` says."""

    def make(end: str = ""):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            f"<s> $A {end}".strip(), special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
        return tokenizer

    return make


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.mark.parametrize(
    ("model_type", "rule", "adds", "ids"),
    [
        ("llama", "auto", True, None),
        ("llama", "auto", False, None),
        ("llama", "always", True, (BOS,)),
        ("llama", "always", False, (BOS,)),
        ("llama", "never", True, ()),
        ("gemma3_text", "auto", True, (BOS,)),
        ("gemma3_text", "auto", False, (BOS,)),
        ("gemma", "never", True, ()),
        ("undeclared", "auto", True, (BOS,)),
        ("undeclared", "auto", False, ()),
    ],
)
def test_the_rule(tiny_tokenizer, adding, model_type, rule, adds, ids):
    tokenizer = adding() if adds else tiny_tokenizer
    beginning = beginning_of(tokenizer, model_type, rule)
    assert beginning.stream == (ids is None)
    assert beginning.ids == (ids or ())
    assert bool(beginning.text) == (bool(ids) or rule == "never")


@pytest.mark.parametrize("family", ["llama", "mistral", "opt", "qwen2", "qwen3", "qwen2_vl_text"])
def test_families_with_published_numbers_keep_the_fields_stream(adding, family):
    assert beginning_of(adding(), family, "auto") == STREAM


@pytest.mark.parametrize(("family", "rule"), [("gemma", "auto"), ("llama", "always")])
def test_a_bos_that_the_tokenizer_lacks_is_refused(tiny_tokenizer, family, rule):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(LRQuantError, match="--bos never"):
        beginning_of(tokenizer, family, rule)


@pytest.mark.parametrize("end", ["", "</s>"])
def test_each_window_has_it_once_and_the_text_goes_on(text, adding, end):
    tokenizer = adding(end)
    begun = Beginning((BOS,), text="with BOS")
    plain = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    windows = perplexity_windows(text, tokenizer, 16, beginning=begun)
    assert windows.ids.shape == (len(plain) // 15, 16)
    assert (windows.ids[:, 0] == BOS).all() and "with BOS" in windows.description
    assert windows.ids[:, 1:].flatten().tolist() == plain[: len(plain) // 15 * 15]
    drawn = calibration_samples(text, tokenizer, 8, 16, 0, beginning=begun)
    assert (drawn.ids == BOS).sum() == 8 and (drawn.ids[:, 0] == BOS).all()
    assert not (drawn.ids == EOS).any() and "with BOS" in drawn.description


def test_never_has_none_and_a_stream_has_the_tokenizers_own(text, adding):
    without = perplexity_windows(text, adding(), 16, beginning=Beginning())
    assert not (without.ids == BOS).any()
    stream = perplexity_windows(text, adding(), 16)
    assert (stream.ids == BOS).sum() == 1 and stream.ids[0, 0] == BOS


def test_a_stream_does_not_end_with_what_the_tokenizer_puts_after_a_text(text, adding):
    tokens = len(adding()(TEXT)["input_ids"])
    windows = perplexity_windows(text, adding("</s>"), tokens)
    assert not (windows.ids == EOS).any()
    with pytest.raises(LRQuantError, match=f"{tokens} tokens"):
        perplexity_windows(text, adding("</s>"), tokens + 1)


def test_a_bos_at_the_very_end_of_the_text_is_not_doubled(tmp_path, adding):
    path = tmp_path / "text.txt"
    path.write_text("x" * 15 + "<s>" + "y" * 14)
    windows = perplexity_windows(str(path), adding(), 16, beginning=Beginning((BOS,)))
    assert windows.ids.shape == (1, 16) and (windows.ids == BOS).sum() == 1


def test_a_template_that_writes_bos_does_not_double_it(tmp_path, adding):
    tokenizer = adding()
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    path = tmp_path / "chat.jsonl"
    rows = [{"messages": [{"role": "user", "content": "x" * 15}]}] * 6
    path.write_text("\n".join(map(json.dumps, rows)))
    begun = Beginning((BOS,))
    windows = perplexity_windows(str(path), tokenizer, 16, beginning=begun)
    assert (windows.ids[:, 0] == BOS).all() and (windows.ids == BOS).sum() == len(windows.ids) == 6
    drawn = calibration_samples(str(path), tokenizer, 4, 16, 0, beginning=begun)
    assert (drawn.ids[:, 0] == BOS).all() and not (drawn.ids[:, 1:] == BOS).any()


def test_gemma_is_learned_and_measured_with_bos_and_says_so(model_folder, text, tmp_path, adding):
    folder = model_folder("gemma")
    adding().save_pretrained(folder)
    settings = {"calib_dataset": text, "nsamples": 2, "seqlen": 16, "ppl": (text,), "limit": 3}
    settings |= {"precision": "float32", "epochs": 0, "report": False}
    run = quantize(folder, "W8A16", output_dir=str(tmp_path / "run"), **settings)
    scores = run.results["perplexity"][text]
    assert "each window begins with <s>" in scores["text"]
    assert "each window begins with <s>" in run.folder.identity["calibration"]
    never = evaluate(str(folder), ppl=(text,), limit=3, seqlen=16, bos="never", device="cpu")
    assert "without BOS" in never["perplexity"][text]["text"]


def test_its_perplexity_is_transformers_own_on_those_tokens(make_model, model_folder, text, adding):
    folder = model_folder("gemma3")
    adding().save_pretrained(folder)
    settings = {"ppl": (text,), "limit": 2, "seqlen": 16, "precision": "float32", "device": "cpu"}
    measured = evaluate(str(folder), **settings)["perplexity"][text]["full_precision"]
    ids = adding()(TEXT, add_special_tokens=False)["input_ids"][:30]
    rows = torch.tensor([[BOS, *ids[:15]], [BOS, *ids[15:]]])
    loss = make_model("gemma3")(rows, labels=rows).loss
    assert measured == pytest.approx(float(loss.exp()), rel=1e-5)
