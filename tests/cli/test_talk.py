"""Talking with a checkpoint, and how it is served."""

from __future__ import annotations

import io

import pytest

from lrquant.blocks import placement
from lrquant.cli import main
from lrquant.measures.subjects import stored


@pytest.fixture
def written(model_folder, data_dir, tmp_path):
    """A checkpoint with its tokenizer, of a model that was rounded to nearest."""

    def write(scheme: str, form: str):
        how = ("--nsamples", "2", "--seqlen", "16", "--epochs", "0", "--precision", "float32")
        places = ("--save_dir", tmp_path / "saved", "--format", form, "--data_dir", data_dir)
        model = ("--model", model_folder("llama"), "--scheme", scheme, "--no-report")
        assert main(list(map(str, ("quantize", *model, *how, *places)))) == 0
        return tmp_path / "saved"

    return write


def told(capsys, *words) -> str:
    code = main(list(map(str, words)))
    streams = capsys.readouterr()
    assert code == 0, streams.err
    return streams.out


def refused(capsys, *words) -> str:
    assert main(list(map(str, words))) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("scheme", "form"), [("W4A16", "compressed-tensors"), ("W4A4", "lrquant")])
def test_one_answer_is_that_of_the_model(written, scheme, form, capsys):
    place = written(scheme, form)
    words = ("generate", place, "some words", "--max-tokens", "5", "--temperature", "0")
    capsys.readouterr()
    answer = told(capsys, *words)
    assert answer == told(capsys, *words) and answer.endswith("\n")
    assert not answer.startswith("some words")
    drawn = {told(capsys, *words[:-1], "3", "--seed", seed) for seed in range(4)}
    assert len(drawn) > 1


def test_an_answer_of_a_checkpoint_that_no_device_has_room_for(written, capsys, monkeypatch):
    pytest.importorskip("accelerate", reason="needs the extra lrquant[eval]")
    words = ("generate", written("W4A4", "lrquant"), "some words", "--max-tokens", "5")
    capsys.readouterr()
    answer = told(capsys, *words, "--temperature", "0")
    for module in (placement, stored):
        monkeypatch.setattr(module, "free_memory", lambda device: 0)
    monkeypatch.setattr(placement, "free_room", lambda device: {"cpu": 1})
    where, again = told(capsys, *words, "--temperature", "0").split("\n", 1)
    assert where.endswith("GB: 2 blocks on the disk") and again == answer


def test_a_chat(written, capsys, monkeypatch):
    place = written("W4A16", "compressed-tensors")
    capsys.readouterr()
    first = told(capsys, "generate", place, "hello", "--max-tokens", "4", "--temperature", "0")
    capsys.readouterr()
    for words in ("hello\n/exit\nnever", "hello\n/new\n\nhello"):
        monkeypatch.setattr("sys.stdin", io.StringIO(words))
        out = told(capsys, "chat", place, "--max-tokens", "4", "--temperature", "0")
        assert out.count(first) == words.count("hello") and "/exit ends" in out


def test_the_chat_template_is_used(written, capsys):
    place = written("W4A16", "dequantized")
    capsys.readouterr()
    plain = told(capsys, "generate", place, "hello", "--max-tokens", "6", "--temperature", "0")
    (place / "lrquant.json").unlink()  # so that it may be changed
    (place / "chat_template.jinja").write_text(
        "{% for turn in messages %}<<{{ turn.content }}>>{% endfor %}"
    )
    assert (
        told(capsys, "generate", place, "hello", "--max-tokens", "6", "--temperature", "0") != plain
    )


def test_serving(saved, tmp_path, capsys):
    place = saved("llama", "W4A16")
    assert told(capsys, "serve", place).splitlines()[-1] == f"vllm serve {place}"
    cpu = told(capsys, "serve", place, "--target", "vllm-cpu").splitlines()
    assert "vllm.entrypoints.openai.api_server --model" in cpu[-1] and cpu[0].startswith("# ")
    assert "it has no server" in refused(capsys, "serve", place, "--target", "transformers")
    assert "use one of vllm" in refused(capsys, "serve", place, "--target", "vlm")
    assert "lrquant export" in refused(capsys, "serve", tmp_path / "run")
    assert "no checkpoint of lrquant" in refused(capsys, "serve", tmp_path)


def test_what_nothing_serves(saved, capsys):
    place = saved("llama", "W4A4", format="lrquant")
    assert "not for vllm: " in refused(capsys, "serve", place)
    assert "use 0 to" in refused(capsys, "generate", place, "x", "--temperature", "nan")
    assert "at least 1" in refused(capsys, "generate", place, "x", "--max-tokens", "0")


def test_a_run_and_nothing_to_talk_with(saved, tmp_path, capsys):
    saved("llama", "W4A16")
    assert "lrquant export" in refused(capsys, "generate", tmp_path / "run", "x")
    assert "no such folder" in refused(capsys, "chat", tmp_path / "none")
