"""Tokenising by pieces: the ids of the whole, whatever the tokenizer is and the text looks like."""

from __future__ import annotations

import random

import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from lrquant.data import tokens
from lrquant.data.tokens import put_before, tokenise

SYLLABLES = ["ka", "to", "mi", "ner", "al", "über", "zu", "ß", "日本", "語", "é", "e\u0301", "🙂"]
SPECIAL = ["<unk>", "<s>", "</s>"]


def prose(length, seed=0, spaces=True):
    """Words of syllables with punctuation, numbers and blank lines, or none of it."""
    draw, parts, size = random.Random(seed), [], 0
    between = [" "] * 12 + ["  ", ", ", ".\n", "\n\n", " \t ", " 12345 ", "-", "      "]
    while size < length:
        word = "".join(draw.choices(SYLLABLES, k=draw.randint(1, 5)))
        parts.append(word + (draw.choice(between) if spaces else ""))
        size += len(parts[-1])
    return "".join(parts)


TEXTS = {
    "prose": prose(30_000),
    "no-whitespace": prose(30_000, 1, spaces=False),
    "one-character": "a" * 30_000,
    "periodic": "abc" * 10_000,
    "long-rules": (prose(2500, 2) + "-" * 4000 + "\n" * 3000 + " " * 5000) * 3,
    "special": prose(15_000, 3).replace("ka", "</s>"),
    "words-alike": "ka " * 10_000,
}


def byte_level(trainer_text):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([trainer_text], trainer)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    return core


def llama_3(trainer_text):
    core = byte_level(trainer_text)
    pattern = r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return core


def bytes_alone(trainer_text):
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return core


def sentencepiece_bpe(trainer_text):
    """As LLaMA 2 and Gemma: no pre-tokenizer, the whole text is one word, bytes as a way out."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    alphabet = sorted(set("▁" + trainer_text) - set("ß🙂 "))
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    core.train_from_iterator([trainer_text.replace(" ", " ▁")], trainer)
    return core


def word_piece(trainer_text):
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    core.train_from_iterator([trainer_text], trainer)
    return core


def unigram(trainer_text):
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator([trainer_text], trainer)
    return core


def unigram_whole(trainer_text):
    core = unigram(trainer_text)
    core.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return core


KINDS = {
    kind.__name__: kind
    for kind in (
        *(byte_level, llama_3, bytes_alone, sentencepiece_bpe, word_piece, unigram),
        unigram_whole,
    )
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    core = KINDS[request.param](prose(20_000, 9))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 2000)
    monkeypatch.setattr(tokens, "OVERLAP", 500)


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_those_of_the_whole(tokenizer, small_pieces, name):
    text = TEXTS[name]
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenise(tokenizer, text).tolist() == whole


@pytest.mark.parametrize("seed", range(6))
def test_at_any_size_of_pieces(tokenizer, monkeypatch, seed):
    draw = random.Random(seed)
    overlap = draw.randint(150, 900)
    monkeypatch.setattr(tokens, "OVERLAP", overlap)
    monkeypatch.setattr(tokens, "PIECE", overlap + draw.randint(50, 1500))
    text = prose(draw.randint(6000, 20_000), seed)
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenise(tokenizer, text).tolist() == whole


def test_no_call_is_larger_than_a_piece(tiny_tokenizer, small_pieces, monkeypatch):
    sizes = []
    encode = type(tiny_tokenizer).__call__

    def seen(tokenizer, text, **settings):
        sizes.append(len(text))
        return encode(tokenizer, text, **settings)

    monkeypatch.setattr(type(tiny_tokenizer), "__call__", seen)
    assert len(tokenise(tiny_tokenizer, "x y" * 20_000)) == 60_000
    assert len(sizes) > 20 and max(sizes) == 2000


def test_a_joint_at_the_first_place_that_looks_alike_would_be_wrong(tiny_tokenizer):
    """Control: cutting at a fixed place does change ids where a word goes across it."""
    core = byte_level(prose(20_000, 9))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    text = prose(4000, 4)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    cuts = [
        tokenizer(text[:cut], add_special_tokens=False)["input_ids"]
        + tokenizer(text[cut:], add_special_tokens=False)["input_ids"]
        for cut in range(1000, 1040)
    ]
    assert sum(ids != whole for ids in cuts) > 20


def test_what_a_tokenizer_puts_before_a_text(tiny_tokenizer):
    core = bytes_alone("")
    core.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert put_before(PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")) == (1,)
    assert put_before(tiny_tokenizer) == ()
