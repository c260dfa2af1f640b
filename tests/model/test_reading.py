"""Code in a model's folder never runs, whatever is answered; what can't be read is one line."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor
from transformers.dynamic_module_utils import resolve_trust_remote_code

import lrquant
from lrquant import LRQuantError, evaluate
from lrquant.cli import main
from lrquant.config.groups import Computing
from lrquant.measures.subjects.checkpoint import load_checkpoint
from lrquant.model.loading import load_model
from lrquant.model.reading import own_code, read_processor, reading

PLACES = {  # a file of the folder, the key of its auto_map, the class that it is for
    "config": ("config.json", "AutoConfig", "LlamaConfig"),
    "model": ("config.json", "AutoModelForCausalLM", "LlamaForCausalLM"),
    "tokenizer": ("tokenizer_config.json", "AutoTokenizer", "PreTrainedTokenizerFast"),
}
CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import *
class Own{base}({base}):
    pass
"""


def test_a_library_that_is_not_installed_is_named():
    needed = "\nTower requires the timm library but it was not found. You can install it:\npip"
    with pytest.raises(LRQuantError) as caught, reading("a model", Path("config.json")):
        raise ImportError(needed)
    assert str(caught.value) == (
        "config.json: a model cannot be read here (Tower requires the timm library but it was not "
        "found); install that"
    )


@pytest.fixture
def yes(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))


@pytest.fixture
def laid(tmp_path, model_folder):
    """laid(place, native) -> a folder whose file of that place names code that lies in it."""

    def make(place: str, *, native: bool = True) -> Path:
        folder = model_folder("llama")
        name, auto, base = PLACES[place]
        values = json.loads((folder / name).read_text())
        own = f"own_code.Own{base}"
        values["auto_map"] = {auto: [own, None] if auto == "AutoTokenizer" else own}
        if not native:
            values["model_type" if name == "config.json" else "tokenizer_class"] = "own_kind"
        (folder / name).write_text(json.dumps(values))
        mark = str(tmp_path / "mark")
        (folder / "own_code.py").write_text(CODE.format(mark=mark, base=base))
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(
            CODE.format(mark=mark, base="object")
        )
        return folder

    return make


def ran(tmp_path) -> bool:
    return (tmp_path / "mark").exists()


@pytest.mark.parametrize("place", PLACES)
def test_transformers_own_class_is_used_where_it_has_one(tmp_path, laid, yes, place):
    model = load_model(str(laid(place)))
    assert not ran(tmp_path) and type(model.skeleton).__module__.startswith("transformers.")
    assert type(model.tokenizer).__module__.startswith("transformers.")


def test_a_folder_that_needs_its_own_code_is_refused(tmp_path, laid, yes):
    folder = laid("config", native=False)
    with pytest.raises(LRQuantError) as caught:
        load_model(str(folder))
    assert not ran(tmp_path) and "\n" not in str(caught.value)
    assert "own_code.OwnLlamaConfig of config.json), which is never done" in str(caught.value)


@pytest.mark.parametrize("command", ["quantize", "check", "stats", "evaluate"])
def test_no_command_asks_or_runs(tmp_path, laid, yes, command, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = str(laid("config", native=False))
    rest = [folder] if command == "evaluate" else ["--model", folder]
    assert main([command, *rest]) == 2
    streams = capsys.readouterr()
    assert not ran(tmp_path) and "Do you wish" not in streams.out + streams.err
    assert "which is never done" in streams.out + streams.err


@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoints_code_does_not_run(tmp_path, laid, yes, place):
    computing = Computing("cpu", "float32", "auto")
    checkpoint = load_checkpoint(str(laid(place)), computing)
    ids = checkpoint.module.generate(torch.tensor([[5]]), max_new_tokens=1, do_sample=False)
    assert not ran(tmp_path) and ids.shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "auto", "loader"),
    [
        ("processor_config.json", "AutoProcessor", AutoProcessor),
        ("preprocessor_config.json", "AutoImageProcessor", AutoImageProcessor),
        ("preprocessor_config.json", "AutoProcessor", AutoProcessor),
    ],
)
def test_a_processors_code_does_not_run(tmp_path, yes, name, auto, loader):
    (tmp_path / name).write_text(json.dumps({"auto_map": {auto: "own_code.OwnProcessorMixin"}}))
    mark = str(tmp_path / "mark")
    (tmp_path / "own_code.py").write_text(CODE.format(mark=mark, base="ProcessorMixin"))
    with pytest.raises(LRQuantError):
        read_processor(tmp_path, loader)
    assert not ran(tmp_path) and own_code(tmp_path) == f"own_code.OwnProcessorMixin of {name}"


def test_a_class_that_asks_gets_no_answer(tmp_path, yes, capsys):
    """As those do that transformers loads within others without handing on what it was told."""

    class Asks:
        @staticmethod
        def from_pretrained(folder, **options):
            resolve_trust_remote_code(None, str(folder), False, True)

    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.T"]}}')
    with pytest.raises(LRQuantError, match=r"own.T of tokenizer_config.json\), which is never"):
        read_processor(tmp_path, Asks)
    streams = capsys.readouterr()
    assert not streams.out and not streams.err


def test_a_configs_attention_names_no_code_of_the_hub(laid):
    folder = laid("model")
    values = json.loads((folder / "config.json").read_text())
    values |= {"attn_implementation": "someone/kernels", "_attn_implementation": "someone/kernels"}
    (folder / "config.json").write_text(json.dumps(values))
    computing = Computing("cpu", "float32", "auto")
    assert load_checkpoint(str(folder), computing).module.config._attn_implementation == "sdpa"
    assert load_model(str(folder)).skeleton.config._attn_implementation == "sdpa"


def test_every_call_that_could_run_code_says_that_it_may_not():
    calls = []
    for path in Path(lrquant.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                if name in ("from_pretrained", "from_config", "HFLM", "HFMultimodalLM"):
                    calls.append((path.name, node))
    assert len(calls) >= 8
    for name, call in calls:
        owner = getattr(getattr(call.func, "value", None), "id", "")
        allowed = {key.arg: ast.unparse(key.value) for key in call.keywords}
        assert owner == "GenerationConfig" or allowed.get("trust_remote_code") == "False", name


def test_an_unreadable_tokenizer_is_one_line(model_folder):
    folder = model_folder("llama")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 7}')
    with pytest.raises(LRQuantError, match="its tokenizer cannot be read"):
        evaluate(str(folder))
