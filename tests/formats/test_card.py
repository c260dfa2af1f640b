"""The model card: what the hub shows, no place on a machine, and commands that are to be typed."""

from __future__ import annotations

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from lrquant import quantize
from lrquant.blocks.plan import Plan
from lrquant.config.config import Config
from lrquant.files.manifest import MANIFEST
from lrquant.formats.card import model_card, without_paths
from lrquant.formats.choice import choose_format
from lrquant.model.publication import publication_of

FACTS = {
    **{"auto_class": "AutoModelForCausalLM", "base_model": "m", "tower": "", "method": "x"},
    **{"precision": "float32", "calibration": {"text": "t", "sha256": "s"}, "results": {}},
}
CARD = "---\nlicense: other\nlicense_name: mine\nlanguage: [en]\ntags: [x]\n---\n# A model\n"


def card_of(scheme="W4A16g32", form=None, **facts):
    config = Config(model="m", scheme=scheme).resolved()
    chosen = choose_format(Plan.of(config.quantizing), form, None)
    return model_card(config.schemes, 2, chosen, {**FACTS, "scheme": scheme, **facts})


def front_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_no_tag_stands_twice_and_the_hub_reads_it():
    card = card_of("W4A4", "lrquant")
    assert front_of(card)["tags"] == ["lrquant", "quantized", "w4a4"]
    assert "base_model" not in front_of(card)
    ModelCard(card_of(base_repository="org/base")).data.to_dict()
    front = front_of(card_of(base_repository="org/base", published={"license": "mit"}))
    assert front["base_model"] == "org/base" and front["base_model_relation"] == "quantized"
    assert front["license"] == "mit" and front["library_name"] == "transformers"


def test_results_stand_where_the_hub_shows_them():
    scores = {"text": "c4/x", "quantized": 9.5, "full_precision": 9.0}
    piqa = {"quantized": {"acc,none": 0.75, "acc_stderr,none": 0.1}}
    results = {"scheme": "W4A16", "perplexity": {"/my/c4.txt": scores}, "tasks": {"piqa": piqa}}
    (index,) = front_of(card_of(results=results))["model-index"]
    told = {each["dataset"]["name"]: each["metrics"][0] for each in index["results"]}
    assert told["c4.txt"] == {"type": "perplexity", "value": 9.5}
    assert told["piqa"]["type"] == "accuracy"
    assert "model-index" not in front_of(card_of())


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("/home/me/texts/mine.txt, 2 x 3", "mine.txt, 2 x 3"),
        ("base (../log/run)", "base (run)"),
        ("~/a/b", "b"),
        ("org/name and wikitext2/test, value/output", None),
        ("https://huggingface.co/org/name", None),
        ("± 0.1 / 2 or 4/4 (+/-)", None),
    ],
)
def test_places_are_named_by_their_last_part(text, plain):
    assert without_paths(text) == (text if plain is None else plain)


def test_commands_have_dtype_cache_and_the_place():
    card = card_of(dtype="float32")
    assert "\nvllm serve . --dtype bfloat16\n" in card and 'dtype="float32")' in card
    assert "FOLDER" not in card and "typed in this folder" in card
    native = card_of("W4A4", "lrquant", dtype="bfloat16")
    assert 'from_pretrained(".", dtype="float32")' in native
    assert "past_key_values=lrquant.QuantizedCache(model.config)" in native
    config = Config(model="m", scheme="W4A16g32").resolved()
    form = choose_format(Plan.of(config.quantizing), None, None)
    named = model_card(config.schemes, 2, form, {**FACTS, "scheme": "x"}, "me/packed")
    assert "vllm serve me/packed --dtype bfloat16" in named and "this folder" not in named
    assert (
        "VLLM_CPU_INT4_W4A8=0 python -m vllm.entrypoints.openai.api_server --model me/packed"
        in (named)
    )


def test_what_it_writes_stands_in_the_card():
    example = {"prompt": "The `moon`\n is", "full_precision": "far", "quantized": "near <b>"}
    card = card_of(results={"examples": [example]})
    assert "`The 'moon' is` …" in card and "- this: `near <b>`" in card
    assert "What it writes" not in card_of()


def test_the_scripts_of_a_card_run(
    make_model, tiny_tokenizer, data_dir, tmp_path, monkeypatch, capsys
):
    quantize(
        make_model("llama"),
        "W4A4",
        tokenizer=tiny_tokenizer,
        **{"output_dir": str(tmp_path / "run"), "save_dir": str(tmp_path / "saved")},
        **{"nsamples": 2, "seqlen": 16, "epochs": 1, "precision": "float32", "format": "lrquant"},
        data_dir=str(data_dir),
    )
    monkeypatch.chdir(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    scripts = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    assert len(scripts) == 1 and str(tmp_path) not in card
    exec(scripts[0], {})
    assert capsys.readouterr().out.startswith("The moon is")


def test_licence_and_name_are_the_sources(model_folder, data_dir, tmp_path):
    folder = model_folder("llama")
    assert publication_of(str(folder), folder).repository == ""
    (folder / "README.md").write_text(CARD)
    told = {"license": "other", "license_name": "mine", "language": ["en"]}
    assert publication_of(str(folder), folder).told == told
    assert publication_of("org/name", folder) == publication_of("org/name", folder)
    assert publication_of("org/name", folder).repository == "org/name"
    cached = tmp_path / "models--org--name" / "snapshots" / "abc"
    assert publication_of(str(cached), cached).repository == "org/name"
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert publication_of(str(folder), folder).told == {}
    quantize(
        str(folder),
        "W4A16",
        data_dir=str(data_dir),
        **{"output_dir": str(tmp_path / "run"), "save_dir": str(tmp_path / "saved")},
        **{"epochs": 0, "report": False, "precision": "float32", "nsamples": 2, "seqlen": 16},
    )
    facts = json.loads((tmp_path / "saved" / MANIFEST).read_text())
    assert facts["base_repository"] == "" and facts["published"] == {}
    assert facts["dtype"] == "float32"


def test_a_gguf_file_tells_its_own(tmp_path):
    import gguf

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/org/base")
    for write in (
        *(writer.write_header_to_file, writer.write_kv_data_to_file),
        *(writer.write_tensors_to_file, writer.close),
    ):
        write()
    told = publication_of(str(path), None)
    assert told.repository == "org/base" and told.told == {"license": "apache-2.0"}
    path.write_bytes(b"GGUF")
    assert publication_of(str(tmp_path), None).repository == ""
